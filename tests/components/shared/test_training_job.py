"""The job's renderings: what the operator's schema and webhook take, what the restricted standard asks, the same
variables here and there."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from components.shared.errors import InputError
from components.shared.training_job import TrainingJob, job_name, label_value

CRD = Path(__file__).resolve().parents[4] / "shared/crds/training-operator-v1.9.4_kubeflow.org_pytorchjobs.yaml"


def job(**changes: Any) -> TrainingJob:
    chosen = {
        "name": "run-lora-a1",
        "command": ("python", "-m", "components.pretrain"),
        "image": "registry.example/zhllama-pretrain:0.1.0",
        "namespace": "team",
        "nodes": 2,
        "processes_per_node": 8,
        "gpu_resource": "nvidia.com/gpu",
        "environment": {"ZHLLAMA_S3_ENDPOINT": "http://s3:8333"},
        "s3_secret": "zhllama-s3",
        "pull_secret": "registry",
        "service_account": "zhllama-training",
        "queue": "gpus",
        "priority_class": "low",
        "node_selector": {"pool": "gpu"},
        "tolerations": ({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},),
        "labels": {"zhllama.io/run": "run"},
        "annotations": {"team": "nlp"},
        "owner": {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "w", "uid": "u"},
        **changes,
    }
    return TrainingJob(**chosen)


def pods(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for replicas in manifest["spec"]["pytorchReplicaSpecs"].values():
        yield replicas["template"]["spec"]


def strict(schema: Any) -> Any:
    """The schema with every object that lists its properties closed: an unknown field is an error."""
    if isinstance(schema, dict):
        closed = {name: strict(value) for name, value in schema.items()}
        if "properties" in closed and closed.get("type") == "object":
            closed.setdefault("additionalProperties", False)
        return closed
    return [strict(value) for value in schema] if isinstance(schema, list) else schema


def schema_errors(manifest: dict[str, Any]) -> list[str]:
    """What the operator's schema has against a manifest. metadata is the API server's own, and left out."""
    if not CRD.exists():
        pytest.skip(f"NOT CHECKED: the PyTorchJob's schema is not here ({CRD.name})")
    import jsonschema
    import yaml

    versions = yaml.safe_load(CRD.read_text())["spec"]["versions"]
    schema = next(version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1")
    found = jsonschema.Draft7Validator(strict(schema)).iter_errors(manifest)
    return [error.message for error in found if list(error.absolute_path)[:1] != ["metadata"]]


@pytest.mark.parametrize("changes", [{}, {"nodes": 1, "gpu_resource": "", "queue": "", "owner": None}], ids=["2", "1"])
def test_the_operators_schema_takes_it(changes):
    assert schema_errors(job(**changes).pytorchjob()) == []


def test_the_operators_schema_is_strict_here():
    manifest = job().pytorchjob()
    manifest["spec"]["nprocPerNode"] = 8
    next(pods(manifest))["containers"][0]["securityContext"]["readonly"] = True
    said = " ".join(schema_errors(manifest))
    assert "8 is not of type 'string'" in said
    assert "'readonly' was unexpected" in said


def test_the_webhooks_rules_hold():
    manifest = job().pytorchjob()
    replicas = manifest["spec"]["pytorchReplicaSpecs"]
    assert (replicas["Master"]["replicas"], replicas["Worker"]["replicas"]) == (1, 1)
    assert manifest["spec"]["nprocPerNode"] == "8"
    assert all(pod["containers"][0]["name"] == "pytorch" for pod in pods(manifest))
    assert "Worker" not in job(nodes=1).pytorchjob()["spec"]["pytorchReplicaSpecs"]


def test_every_job_ends_and_goes():
    policy = job(deadline_seconds=77, ttl_seconds=88, restarts=9).pytorchjob()["spec"]["runPolicy"]
    assert policy == {
        "cleanPodPolicy": "Running",
        "backoffLimit": 9,
        "activeDeadlineSeconds": 77,
        "ttlSecondsAfterFinished": 88,
    }


def test_pods_pass_the_restricted_standard():
    for pod in pods(job().pytorchjob()):
        assert pod["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
            caches = [one["value"] for one in container["env"] if str(one.get("value", "")).startswith("/")]
            assert caches
            assert all(path.startswith("/tmp") for path in caches)
            assert mounted == {"/tmp", "/dev/shm"}


def test_requests_are_limits_with_one_gpu_for_each_process():
    for pod in pods(job(cpu="64", memory="256Gi", ephemeral_storage="1Ti").pytorchjob()):
        resources = pod["containers"][0]["resources"]
        wanted = {"cpu": "64", "memory": "256Gi", "ephemeral-storage": "1Ti", "nvidia.com/gpu": "8"}
        assert resources["requests"] == resources["limits"] == wanted
    (pod,) = pods(job(nodes=1, gpu_resource="").pytorchjob())
    assert "gpu" not in str(pod["containers"][0]["resources"])


def test_secrets_come_by_reference_and_what_is_given_plainly_is_not_asked_of_them():
    variables = next(pods(job().pytorchjob()))["containers"][0]["env"]
    names = [variable["name"] for variable in variables]
    assert len(names) == len(set(names))
    by_reference = {one["name"]: one["valueFrom"]["secretKeyRef"] for one in variables if "valueFrom" in one}
    assert by_reference["AWS_SECRET_ACCESS_KEY"] == {"name": "zhllama-s3", "key": "AWS_SECRET_ACCESS_KEY"}
    assert by_reference["AWS_SESSION_TOKEN"]["optional"] is True
    assert "ZHLLAMA_S3_ENDPOINT" not in by_reference
    assert not [one for one in next(pods(job(s3_secret="").pytorchjob()))["containers"][0]["env"] if "valueFrom" in one]


def test_the_queues_label_is_on_the_job_and_not_on_its_pods():
    manifest = job().pytorchjob()
    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    for replicas in manifest["spec"]["pytorchReplicaSpecs"].values():
        assert not [name for name in replicas["template"]["metadata"]["labels"] if "kueue" in name]


def test_the_workers_stop_before_the_kubelet_kills_them():
    pod = next(pods(job(grace_seconds=600).pytorchjob()))
    values = {one["name"]: one.get("value") for one in pod["containers"][0]["env"]}
    assert int(values["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] or 0) < pod["terminationGracePeriodSeconds"] == 600


def test_a_local_node_has_the_variables_that_the_operator_sets():
    first, second = job().local_environments(4711)
    assert first == {
        "PYTHONUNBUFFERED": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "4711",
        "WORLD_SIZE": "16",
        "RANK": "0",
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": "4711",
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "8",
        "PET_NODE_RANK": "0",
    }
    assert {name for name in first if first[name] != second[name]} == {"RANK", "PET_NODE_RANK"}


@pytest.mark.parametrize("run", ["run-1", "2f6e-…-ID", "A Team's Run", "x" * 200, "-", "9"])
def test_a_jobs_name_is_a_dns_label_that_leaves_room_for_its_pods(run):
    name = job_name(run, "embeddings", 12)
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name)
    assert name.endswith("-embeddings-a12")
    assert len(f"{name}-worker-999") <= 63
    assert job(name=name).name == name


@pytest.mark.parametrize("text", ["run 1", "x" * 100, "…", "a/b:c", ".dots."])
def test_a_labels_value_is_allowed(text):
    assert re.fullmatch(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?", label_value(text))
    assert len(label_value(text)) <= 63


@pytest.mark.parametrize("changes", [{"name": "Run.1"}, {"nodes": 0}, {"processes_per_node": 0}])
def test_a_job_that_no_operator_would_take_is_refused(changes):
    with pytest.raises(InputError):
        job(**changes)
