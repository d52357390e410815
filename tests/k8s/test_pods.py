"""Every pod of ours is confined, says what it needs, holds no token it has no use for, and ends in its own time."""

from collections.abc import Iterator
from typing import Any

import pytest

from pipelines import sizes
from tests.k8s.kustomizations import OVERLAYS, Object, build, of_kind, place
from zhllama.kubernetes.formats import amount
from zhllama.kubernetes.names import LABEL

UPLOAD = 27e6
"""Bytes a second that a node uploads of a checkpoint, hashed. `make bench ONLY=checkpoint_stall` gave it on two cores
that a training, the S3 server and other work shared (460 MB in 17 s): the least that was ever measured."""
LEFT_FOR_THE_END = 15
"""Seconds of the grace period that are not the training's own (TORCH_ELASTIC_SHUTDOWN_TIMEOUT is the rest)."""
WIDTHS = {"7b": (6.7e9, 4096), "13b": (13e9, 5120), "33b": (32.5e9, 6656), "65b": (65.2e9, 8192)}
"""Parameters and hidden size."""


def templates(value: Object) -> Iterator[tuple[str, Any]]:
    """(name, template) of the pods of an object."""
    spec, name = value.get("spec", {}), value["metadata"]["name"]
    if value["kind"] == "PyTorchJob":
        for replica, one in spec["pytorchReplicaSpecs"].items():
            yield f"{name} {replica}", one["template"]
    elif value["kind"] == "CronJob":
        yield name, spec["jobTemplate"]["spec"]["template"]
    elif value["kind"] in ("Deployment", "StatefulSet"):
        yield name, spec["template"]
    else:
        assert "template" not in spec, value["kind"]


def pods(value: Object) -> Iterator[tuple[str, Any]]:
    """(name, spec) of the pods of an object."""
    return ((name, template["spec"]) for name, template in templates(value))


def containers(spec: Any) -> list[Any]:
    return [*spec.get("initContainers", ()), *spec["containers"]]


PODS = [
    pytest.param(spec, id=f"{place(folder)}: {name}")
    for folder in OVERLAYS
    for value in build(folder)
    for name, spec in pods(value)
]


@pytest.mark.parametrize("spec", PODS)
def test_a_pod_is_confined_and_says_what_it_needs(spec):
    shared = spec["securityContext"]
    assert shared["runAsNonRoot"] is True
    assert shared["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    for container in containers(spec):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        for kind in ("cpu", "memory", "ephemeral-storage"):
            asked, most = (amount(container["resources"][side][kind]) for side in ("requests", "limits"))
            assert asked is not None
            assert most is not None
            assert 0 < asked <= most
        # what it writes goes to a mount
        assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}
        for variable in container.get("env", ()):
            if any(word in variable["name"] for word in ("SECRET", "TOKEN", "KEY")):
                assert set(variable["valueFrom"]) == {"secretKeyRef"}


@pytest.mark.parametrize("spec", PODS)
def test_no_pod_but_the_reapers_has_a_token(spec):
    reaper = spec.get("serviceAccountName") == "zhllama-reaper"
    assert spec["automountServiceAccountToken"] is reaper
    assert spec["enableServiceLinks"] is False


def test_no_pod_gets_a_sidecar_that_its_network_policy_would_cut_off():
    for value in (value for folder in OVERLAYS for value in build(folder)):
        for name, template in templates(value):
            assert template["metadata"]["labels"]["sidecar.istio.io/inject"] == "false", name


def test_on_openshift_no_pod_names_a_uid():
    # trainings, what is served and SeaweedFS lose theirs by components/openshift, the rest never had any
    for name in ("overlays/serving-openshift", "overlays/cluster"):
        for value in build(name):
            for pod, spec in pods(value):
                for context in (spec["securityContext"], *(one["securityContext"] for one in containers(spec))):
                    assert not {"runAsUser", "runAsGroup", "fsGroup"} & set(context), pod


JOBS = [
    pytest.param(value, id=name)
    for size in WIDTHS
    for name, value in of_kind(build(f"pytorchjob/{size}"), "PyTorchJob").items()
]


@pytest.mark.parametrize("job", JOBS)
def test_after_sigterm_there_is_time_for_the_step_and_its_checkpoint(job):
    """All ranks end the step that they are in, then each node uploads its part of the checkpoint: the trained weights,
    and twelve bytes a parameter of optimizer and masters, which ZeRO divides among the nodes."""
    labels = job["metadata"]["labels"]
    size = sizes.load(labels[f"{LABEL}size"])
    stage = labels[f"{LABEL}stage"]
    machine = size.training(stage)
    parameters, hidden = WIDTHS[size.name]
    embeddings = stage != "sft" or size.sft_trains_embeddings
    # embed_tokens and lm_head of the recipe's 49,953 pieces; LoRA of rank 8 on every projection is 0.3% of a model
    trained = 2 * 49_953 * hidden * embeddings + 0.003 * parameters
    checkpoint = (2 + 12 / machine.nodes) * trained / UPLOAD
    # 8 FLOP a parameter and token with recomputation, at 30% of an A100's 312 TFLOP/s
    step = 8 * parameters * machine.global_batch * size.block_size / (machine.processes * 0.3 * 312e12)
    for name, spec in pods(job):
        grace = spec["terminationGracePeriodSeconds"]
        assert grace - LEFT_FOR_THE_END > step + checkpoint, name
        (container,) = spec["containers"]
        timeout = {one["name"]: one.get("value") for one in container["env"]}["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
        assert int(timeout) == grace - LEFT_FOR_THE_END
