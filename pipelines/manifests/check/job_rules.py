"""What no schema says of a training job: the training operator's webhook (v1.9), deadlines, Kueue's labels."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.manifests.check.documents import Document, Finding
from pipelines.manifests.check.pods import is_gpu, is_of_known_runtime, mapping, pods, sequence
from zhllama.kubernetes.job_manifest import RUNTIME
from zhllama.kubernetes.names import LONGEST_JOB_NAME
from zhllama.kubernetes.quantity import quantity

TRAINING_KINDS = ("PyTorchJob", "TrainJob")
RENDEZVOUS = ("c10d", "etcd", "etcd-v2")
RESTARTS = ("Always", "OnFailure", "Never", "ExitCode")
QUEUE = "kueue.x-k8s.io/queue-name"
PRIORITY = "kueue.x-k8s.io/priority-class"
REPLICAS = ("spec", "pytorchReplicaSpecs")


def operator(document: Document) -> Iterator[Finding]:
    """What the operators' webhooks refuse, and what they should."""
    name = document.name
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > LONGEST_JOB_NAME:
        form = f"lower-case letters, digits and dashes, a letter first, at most {LONGEST_JOB_NAME} characters"
        wrong = f"the job's name {name!r} becomes part of host names: {form}"
        yield document.error("dns-name", wrong, "metadata", "name")
    if document.kind == "PyTorchJob":
        yield from _replicas(document)
    elif not is_of_known_runtime(document):
        wrong = f"its pods come of a runtime that is not {RUNTIME}: what they are is not known here, and not checked"
        yield document.warning("runtime", wrong, "spec", "runtimeRef")


def _replicas(document: Document) -> Iterator[Finding]:
    replicas = mapping(document.value, *REPLICAS)
    masters = mapping(replicas, "Master")
    if mapping(document.value, "spec").get("elasticPolicy") is not None:
        yield from _elastic(document, replicas)
    elif not masters or masters.get("replicas", 1) != 1:
        place = ("Master", "replicas") if masters else ()
        wrong = "exactly one Master is needed; the other nodes are Workers"
        yield document.error("one-master", wrong, *REPLICAS, *place)
    for replica, value in replicas.items():
        restart = mapping(value).get("restartPolicy")
        if restart is not None and restart not in RESTARTS:
            wrong = f"restartPolicy {restart!r}: use {', '.join(RESTARTS)}"
            yield document.error("restart-policy", wrong, *REPLICAS, replica, "restartPolicy")
        containers = sequence(mapping(value, "template", "spec").get("containers"))
        if "pytorch" not in [mapping(container).get("name") for container in containers]:
            why = "the operator sets its variables in that one alone, and refuses the job"
            wrong = f"no container is named pytorch: {why}"
            yield document.error("container-name", wrong, *REPLICAS, replica, "template", "spec", "containers")


def _elastic(document: Document, replicas: Mapping[str, Any]) -> Iterator[Finding]:
    place = ("spec", "elasticPolicy")
    elastic = mapping(document.value, *place)
    if "nProcPerNode" in elastic and "nprocPerNode" in mapping(document.value, "spec"):
        wrong = "nProcPerNode stands beside spec.nprocPerNode; keep the latter"
        yield document.error("nproc-elastic", wrong, *place, "nProcPerNode")
    if elastic.get("rdzvBackend", "c10d") not in RENDEZVOUS:
        wrong = f"rdzvBackend {elastic['rdzvBackend']!r}: use {', '.join(RENDEZVOUS)}"
        yield document.error("rendezvous", wrong, *place, "rdzvBackend")
    if "Master" in replicas:
        wrong = "an elastic job has Workers alone: which of them leads is found by rendezvous"
        yield document.error("elastic-master", wrong, *REPLICAS, "Master")
    least, most = elastic.get("minReplicas"), elastic.get("maxReplicas")
    count = mapping(replicas, "Worker").get("replicas", 1)
    if isinstance(least, int) and isinstance(most, int) and isinstance(count, int) and not least <= count <= most:
        wrong = f"{count} Workers are not between minReplicas {least} and maxReplicas {most}"
        yield document.error("elastic-range", wrong, *REPLICAS, "Worker", "replicas")


def deadlines(document: Document) -> Iterator[Finding]:
    """A training that hangs is ended, a finished one goes away, and a dead pod's logs stay until then."""
    place = ("spec",) if document.kind == "TrainJob" else ("spec", "runPolicy")
    policy = mapping(document.value, *place)
    why = {
        "activeDeadlineSeconds": "a job that hangs holds its GPUs for ever",
        "ttlSecondsAfterFinished": "finished jobs stay for ever",
        "backoffLimit": "a job that cannot start is started again for ever",
    }
    for name in why if document.kind == "PyTorchJob" else ("activeDeadlineSeconds",):
        if name not in policy:
            yield document.error("deadlines", f"no {name}: {why[name]}", *place)
    if document.kind == "PyTorchJob" and policy.get("cleanPodPolicy") != "Running":
        wrong = "with None the other pods run on after a failure, with All the logs go too"
        yield document.error("deadlines", f"cleanPodPolicy must be Running: {wrong}", *place, "cleanPodPolicy")


def operators_pods(document: Document) -> Iterator[Finding]:
    """The operator puts an init container of its own into Workers' pods, and its default fails the standard."""
    if document.kind == "PyTorchJob" and "Worker" in mapping(document.value, *REPLICAS):
        yield document.warning(
            "operator-init",
            "the operator adds an init container to Workers that sets no securityContext by default: in a restricted "
            "namespace its configuration has to replace it (docs/checking-manifests.md)", *REPLICAS, "Worker",
        )  # fmt: skip


def processes(document: Document) -> Iterator[Finding]:
    """One process a GPU."""
    way, name = (("spec", "trainer"), "numProcPerNode") if document.kind == "TrainJob" else (("spec",), "nprocPerNode")
    count = mapping(document.value, *way).get(name)
    if count is None or not str(count).isdecimal():
        return
    for container in (container for pod in pods(document) for container in pod.containers() if not container.init):
        for kind in filter(is_gpu, container.limits):
            if quantity(container.limits[kind]) not in (None, float(count)):
                wrong = f"{container.limits[kind]} GPUs for {name} {count}: one process a GPU is needed"
                yield container.error("processes", wrong, "resources", "limits", kind)


def queue_label(document: Document) -> Iterator[Finding]:
    """Kueue reads its labels on the job itself: on a pod template or as an annotation they do nothing."""
    for name in (QUEUE, PRIORITY):
        if name in mapping(document.value, "metadata", "annotations"):
            wrong = f"{name} is a label of the job, not an annotation"
            yield document.error("queue-label", wrong, "metadata", "annotations", name)
        for pod in pods(document):
            if pod.at and name in mapping(pod.value, "metadata", "labels"):
                wrong = f"{name} belongs to the job's own labels: here Kueue does not see it"
                yield document.error("queue-label", wrong, *pod.at, "metadata", "labels", name)
    labels = mapping(document.value, "metadata", "labels")
    if PRIORITY in labels and QUEUE not in labels:
        yield document.error("queue-label", f"a priority without {QUEUE}", "metadata", "labels", PRIORITY)


OF_TRAININGS = (operator, deadlines, operators_pods, processes)
