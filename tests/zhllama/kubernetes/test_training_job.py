"""The job's renderings: what the operator's schema and webhook take, what the restricted standard asks, the same
variables here and there."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.manifests.check.check import check
from tests.recordings import crds
from zhllama.errors import InputError
from zhllama.kubernetes.job_manifest import (
    local_environments,
    lost_in_trainjob,
    pod_environment,
    pytorchjob,
    trainer_environment,
    trainjob,
)
from zhllama.kubernetes.names import job_name, label_value
from zhllama.kubernetes.pods import S3_KEYS, S3_OPTIONAL_KEYS
from zhllama.kubernetes.training_job import TrainingJob

CRDS = crds()


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


def findings(manifest: dict[str, Any], tmp_path: Path) -> list[str]:
    """What `zhllama check` says of a manifest: schema, webhook, pod security."""
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(manifest))
    return [str(finding) for finding in check([tmp_path], CRDS) if finding.level == "error"]


ELASTIC = {"min_nodes": 1, "max_nodes": 4}


ALONE = {"nodes": 1, "gpu_resource": "", "queue": "", "priority_class": "", "owner": None}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, ALONE, ELASTIC], ids=["two nodes", "one", "elastic"])
def test_an_api_server_and_the_operator_take_it(changes, tmp_path):
    assert findings(pytorchjob(job(**changes)), tmp_path) == []


@pytest.mark.parametrize("changes", [{}, ALONE], ids=["two nodes", "one"])
def test_kubeflow_trainer_takes_it(changes, tmp_path):
    assert findings(trainjob(job(**changes)), tmp_path) == []


def test_the_operators_schema_is_strict_here(tmp_path):
    manifest = pytorchjob(job())
    manifest["spec"]["nprocPerNode"] = 8
    next(pods(manifest))["containers"][0]["securityContext"]["readonly"] = True
    said = " ".join(findings(manifest, tmp_path))
    assert "8 is not of type 'string'" in said
    assert "'readonly' was unexpected" in said


def test_a_trainjob_carries_what_it_can_and_says_what_it_cannot():
    wanted, manifest = job(), trainjob(job())
    (pod,) = {id(pod): pod for pod in list(pods(pytorchjob(wanted)))[:1]}.values()
    trainer = manifest["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 8)
    assert trainer["env"] == pod["containers"][0]["env"]
    assert trainer["resourcesPerNode"] == pod["containers"][0]["resources"]
    (patch,) = manifest["spec"]["runtimePatches"]
    (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]["template"]["spec"]
    for name in ("volumes", "tolerations", "nodeSelector", "serviceAccountName", "securityContext"):
        assert spec[name] == pod[name]
    assert spec["containers"][0]["securityContext"] == pod["containers"][0]["securityContext"]
    assert manifest["metadata"] == pytorchjob(wanted)["metadata"]
    # every field of the pod's spec is carried or named
    lost = " ".join(lost_in_trainjob(wanted))
    assert {name for name in pod if name not in spec} == {name for name in pod if f"{name}: " in lost}
    for name in pytorchjob(wanted)["spec"]["runPolicy"]:
        assert name in lost or name in manifest["spec"]
    with pytest.raises(InputError, match="a TrainJob cannot be elastic"):
        trainjob(job(**ELASTIC))


def test_an_elastic_job_has_workers_alone_and_finds_itself_by_rendezvous():
    manifest = pytorchjob(job(**ELASTIC))
    assert list(manifest["spec"]["pytorchReplicaSpecs"]) == ["Worker"]
    assert manifest["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == 2
    policy = manifest["spec"]["elasticPolicy"]
    assert (policy["minReplicas"], policy["maxReplicas"], policy["rdzvBackend"]) == (1, 4, "c10d")
    assert policy["rdzvId"] == "run-lora-a1"
    first = local_environments(job(**ELASTIC), 4711)[0]
    assert first["PET_NNODES"] == "1:4"
    assert not {"RANK", "WORLD_SIZE", "PET_NODE_RANK", "MASTER_ADDR"} & set(first)


@pytest.mark.parametrize(
    "given", [{"min_nodes": 3, "max_nodes": 4}, {"max_nodes": 4}, {"min_nodes": 1, "max_nodes": 1}]
)
def test_an_elastic_range_holds_the_number_of_nodes(given):
    with pytest.raises(InputError, match=r"--nodes 2 .*in that order"):
        job(**given)


def test_the_pods_environment_names_secrets_and_shows_none():
    found = pod_environment(job(), 1)
    assert found["PET_MASTER_ADDR"] == "run-lora-a1-master-0"
    assert found["AWS_SECRET_ACCESS_KEY"] == "(secret zhllama-s3, a file in /etc/zhllama-s3)"
    assert found["ZHLLAMA_S3_ENDPOINT"] == "http://s3:8333"
    assert pod_environment(job(**ELASTIC), 1)["PET_RDZV_ENDPOINT"] == "run-lora-a1-worker-0:23456"
    trainer = trainer_environment(job(), 1)
    assert {name.removeprefix("PET_") for name in trainer} == {
        "NNODES", "NPROC_PER_NODE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT",
    }  # fmt: skip


def test_the_webhooks_rules_hold():
    manifest = pytorchjob(job())
    replicas = manifest["spec"]["pytorchReplicaSpecs"]
    assert (replicas["Master"]["replicas"], replicas["Worker"]["replicas"]) == (1, 1)
    assert manifest["spec"]["nprocPerNode"] == "8"
    assert all(pod["containers"][0]["name"] == "pytorch" for pod in pods(manifest))
    assert "Worker" not in pytorchjob(job(nodes=1))["spec"]["pytorchReplicaSpecs"]


def test_every_job_ends_and_goes():
    policy = pytorchjob(job(deadline_seconds=77, ttl_seconds=88, restarts=9, nodes=1))["spec"]["runPolicy"]
    assert policy == {
        "cleanPodPolicy": "Running",
        "backoffLimit": 9,
        "activeDeadlineSeconds": 77,
        "ttlSecondsAfterFinished": 88,
    }


@pytest.mark.parametrize(("nodes", "elastic", "limit"), [(1, {}, 3), (4, {}, 12), (2, (1, 5), 15)])
def test_the_limit_of_restarts_grows_with_the_nodes(nodes, elastic, limit):
    """The operator adds up the restarts of all pods, and one lost node restarts every one."""
    more = dict(zip(("min_nodes", "max_nodes"), elastic))
    assert pytorchjob(job(restarts=3, nodes=nodes, **more))["spec"]["runPolicy"]["backoffLimit"] == limit


def test_on_openshift_pods_name_no_user():
    (pod, *_) = pods(pytorchjob(job(run_as_user=None)))
    assert pod["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


def test_pods_pass_the_restricted_standard():
    for pod in pods(pytorchjob(job())):
        # the operator's init container is root's, and takes the pod's user
        assert pod["securityContext"] == {
            "runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"},
        }  # fmt: skip
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            writable = {one["mountPath"] for one in container["volumeMounts"] if not one.get("readOnly")}
            caches = [one["value"] for one in container["env"] if str(one.get("value", "")).startswith("/")]
            assert caches
            assert all(path.startswith("/tmp") for path in caches)
            assert writable == {"/tmp", "/dev/shm"}


def test_requests_are_limits_with_one_gpu_for_each_process():
    for pod in pods(pytorchjob(job(cpu="64", memory="256Gi", ephemeral_storage="1Ti"))):
        resources = pod["containers"][0]["resources"]
        wanted = {"cpu": "64", "memory": "256Gi", "ephemeral-storage": "1Ti", "nvidia.com/gpu": "8"}
        assert resources["requests"] == resources["limits"] == wanted
    (pod,) = pods(pytorchjob(job(nodes=1, gpu_resource="")))
    assert "gpu" not in str(pod["containers"][0]["resources"])


@pytest.mark.parametrize("changes", [{}, {"nodes": 1}, ELASTIC, {"run_as_user": None}], ids=str)
def test_secrets_are_files_of_every_pod_that_any_uid_reads_and_none_writes(changes):
    for pod in pods(pytorchjob(job(**changes))):
        (container,) = pod["containers"]
        assert not any("valueFrom" in variable for variable in container["env"])
        mounts = {one["name"]: one for one in container["volumeMounts"]}
        (volume,) = [one for one in pod["volumes"] if "projected" in one]
        assert mounts[volume["name"]] == {"name": "s3-secret", "mountPath": "/etc/zhllama-s3", "readOnly": True}
        assert volume["projected"]["defaultMode"] == 0o444
        needed, others = (one["secret"] for one in volume["projected"]["sources"])
        assert needed["name"] == others["name"] == "zhllama-s3"
        assert {one["key"]: one["path"] for one in needed["items"]} == {key: key for key in S3_KEYS}
        assert {one["key"]: one["path"] for one in others["items"]} == {key: key for key in S3_OPTIONAL_KEYS}
        assert (needed.get("optional"), others["optional"]) == (None, True)
        kinds = {kind for one in pod["volumes"] for kind in one if kind != "name"}
        assert kinds == {"emptyDir", "projected"}
    (pod, *_) = pods(pytorchjob(job(s3_secret="", **changes)))
    assert not [one for one in pod["volumes"] if "projected" in one]


def test_the_queues_label_is_on_the_job_and_not_on_its_pods():
    manifest = pytorchjob(job())
    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    for replicas in manifest["spec"]["pytorchReplicaSpecs"].values():
        assert not [name for name in replicas["template"]["metadata"]["labels"] if "kueue" in name]


def test_the_workers_stop_before_the_kubelet_kills_them():
    pod = next(pods(pytorchjob(job(grace_seconds=600))))
    values = {one["name"]: one.get("value") for one in pod["containers"][0]["env"]}
    assert int(values["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] or 0) < pod["terminationGracePeriodSeconds"] == 600


def test_a_local_node_has_the_variables_that_the_operator_sets():
    first, second = local_environments(job(), 4711)
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
