"""What operators and trainings do with a job that was created: functions for `cluster.on_create`."""

from collections.abc import Callable
from typing import Any

from tests.components.launch_training.fake_cluster import FakeCluster
from zhllama import storage
from zhllama.artifacts.writer import ArtifactWriter

Operator = Callable[[dict[str, Any]], None]


def command_of(job: dict[str, Any]) -> list[str]:
    """The command that the job's pods run."""
    if job["kind"] == "TrainJob":
        return list(job["spec"]["trainer"]["command"])
    replicas = job["spec"]["pytorchReplicaSpecs"]
    role = replicas.get("Master") or replicas["Worker"]
    return list(role["template"]["spec"]["containers"][0]["command"])


def train(job: dict[str, Any]) -> None:
    """What the job's training leaves: an artifact, and a copy of its manifest where `--output` says."""
    words = command_of(job)
    options = dict(zip(words[3::2], words[4::2], strict=True))
    out = ArtifactWriter(options["--store"], "pretrain", "key")
    out.add_bytes("adapter_model.safetensors", b"weights")
    manifest = out.publish("adapter")
    storage.write_bytes(options["--output"], manifest.to_json(manifest.root))


def nodes_of(job: dict[str, Any]) -> int:
    replicas = job["spec"].get("pytorchReplicaSpecs") or {"Node": {}}
    return sum(one.get("replicas") or 1 for one in replicas.values())


def name_of(job: dict[str, Any]) -> str:
    return str(job["metadata"]["name"])


def run(cluster: FakeCluster, job: dict[str, Any], *lines: str) -> None:
    """It runs, and its first pod says something."""
    name = name_of(job)
    cluster.set_condition(name, "Running")
    for index in range(nodes_of(job)):
        cluster.set_pod(name, "Running", index=index)
    if lines:
        cluster.write_log(cluster.pod(name)[0], *lines)


def succeed(cluster: FakeCluster) -> Operator:
    def operate(job: dict[str, Any]) -> None:
        name = name_of(job)
        run(cluster, job)
        train(job)
        cluster.set_pod(name, "Succeeded", 0)
        if job["kind"] == "TrainJob":
            cluster.set_condition(name, "Complete")

    return operate


def fail(cluster: FakeCluster, times: int, exit_code: int = 1, message: str = "fault: a bug") -> Operator:
    """The first `times` jobs fail, the next succeeds."""
    begun: list[str] = []

    def operate(job: dict[str, Any]) -> None:
        name = name_of(job)
        begun.append(name)
        if len(begun) > times:
            return succeed(cluster)(job)
        run(cluster, job)
        return give_up(cluster, job, exit_code, message)

    return operate


def give_up(cluster: FakeCluster, job: dict[str, Any], exit_code: int = 1, message: str = "fault: a bug") -> None:
    """The first pod's container ends like that once too often: the operator of a PyTorchJob deletes the pod then."""
    if job["kind"] == "TrainJob":
        cluster.set_pod(name_of(job), "Failed", exit_code, message)
        cluster.set_condition(name_of(job), "Failed", "too many restarts")
    else:
        cluster.set_pod(name_of(job), "Running", exit_code, message, restarts=job["spec"]["runPolicy"]["backoffLimit"])
