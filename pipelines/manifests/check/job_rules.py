"""What no schema says of a training job: the training operator's validating webhook (v1.9), deadlines, Kueue's labels.

Each rule is a generator of findings, named as the findings are.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.manifests.check.documents import Document, Finding
from pipelines.manifests.check.pods import is_of_known_runtime, mapping, pods, sequence
from zhllama.kubernetes.job_manifest import RUNTIME

TRAINING_KINDS = ("PyTorchJob", "TrainJob")
RENDEZVOUS = ("c10d", "etcd", "etcd-v2")
RESTARTS = ("Always", "OnFailure", "Never", "ExitCode")
LONGEST_JOB_NAME = 63 - len("-worker-999")
"""The operator appends to it to name pods and services, whose names are DNS labels."""
QUEUE = "kueue.x-k8s.io/queue-name"
PRIORITY = "kueue.x-k8s.io/priority-class"
REPLICAS = ("spec", "pytorchReplicaSpecs")


def operator(document: Document) -> Iterator[Finding]:
    """What the operators' webhooks refuse, and what they should."""
    if document.kind not in TRAINING_KINDS:
        return
    name = document.name
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > LONGEST_JOB_NAME:
        yield document.error(
            ("metadata", "name"), "dns-name",
            f"the job's name {name!r} becomes part of host names: lower-case letters, digits and dashes, a letter "
            f"first, at most {LONGEST_JOB_NAME} characters",
        )  # fmt: skip
    if document.kind == "PyTorchJob":
        yield from _replicas(document)
    elif not is_of_known_runtime(document):
        yield document.warning(
            ("spec", "runtimeRef"), "runtime",
            f"its pods come of a runtime that is not {RUNTIME}: what they are is not known here, and not checked",
        )  # fmt: skip


def _replicas(document: Document) -> Iterator[Finding]:
    replicas = mapping(document.value, *REPLICAS)
    masters = mapping(replicas, "Master")
    if mapping(document.value, "spec").get("elasticPolicy") is not None:
        yield from _elastic(document, replicas)
    elif not masters or masters.get("replicas", 1) != 1:
        yield document.error(
            (*REPLICAS, "Master", "replicas") if masters else REPLICAS,
            "one-master", "exactly one Master is needed; the other nodes are Workers",
        )  # fmt: skip
    for replica, value in replicas.items():
        place = (*REPLICAS, replica)
        restart = mapping(value).get("restartPolicy")
        if restart is not None and restart not in RESTARTS:
            yield document.error(
                (*place, "restartPolicy"), "restart-policy", f"restartPolicy {restart!r}: use {', '.join(RESTARTS)}"
            )
        containers = sequence(mapping(value, "template", "spec").get("containers"))
        if "pytorch" not in [mapping(container).get("name") for container in containers]:
            yield document.error(
                (*place, "template", "spec", "containers"), "container-name",
                "no container is named pytorch: the operator sets its variables in that one alone, and refuses the job",
            )  # fmt: skip


def _elastic(document: Document, replicas: Mapping[str, Any]) -> Iterator[Finding]:
    place = ("spec", "elasticPolicy")
    elastic = mapping(document.value, *place)
    if "nProcPerNode" in elastic and "nprocPerNode" in mapping(document.value, "spec"):
        yield document.error(
            (*place, "nProcPerNode"), "nproc-elastic", "nProcPerNode stands beside spec.nprocPerNode; keep the latter"
        )
    if elastic.get("rdzvBackend", "c10d") not in RENDEZVOUS:
        wrong = f"rdzvBackend {elastic['rdzvBackend']!r}: use {', '.join(RENDEZVOUS)}"
        yield document.error((*place, "rdzvBackend"), "rendezvous", wrong)
    if "Master" in replicas:
        yield document.error(
            (*REPLICAS, "Master"), "elastic-master",
            "an elastic job has Workers alone: which of them leads is found by rendezvous",
        )  # fmt: skip
    least, most = elastic.get("minReplicas"), elastic.get("maxReplicas")
    count = mapping(replicas, "Worker").get("replicas", 1)
    if isinstance(least, int) and isinstance(most, int) and isinstance(count, int) and not least <= count <= most:
        yield document.error(
            (*REPLICAS, "Worker", "replicas"), "elastic-range",
            f"{count} Workers are not between minReplicas {least} and maxReplicas {most}",
        )  # fmt: skip


def deadlines(document: Document) -> Iterator[Finding]:
    """A training that hangs is ended, a finished one goes away, and a dead pod's logs stay until then."""
    if document.kind == "TrainJob" and "activeDeadlineSeconds" not in mapping(document.value, "spec"):
        yield document.error(
            ("spec",), "deadlines", "no activeDeadlineSeconds: a job that hangs holds its GPUs for ever"
        )
    if document.kind != "PyTorchJob":
        return
    place = ("spec", "runPolicy")
    policy = mapping(document.value, *place)
    for name, why in (
        ("activeDeadlineSeconds", "a job that hangs holds its GPUs for ever"),
        ("ttlSecondsAfterFinished", "finished jobs stay for ever"),
        ("backoffLimit", "a job that cannot start is started again for ever"),
    ):
        if name not in policy:
            yield document.error(place, "deadlines", f"no {name}: {why}")
    if policy.get("cleanPodPolicy") != "Running":
        yield document.error(
            (*place, "cleanPodPolicy"), "deadlines",
            "cleanPodPolicy must be Running: with None the other pods run on after a failure, with All the logs go too",
        )  # fmt: skip


def operators_pods(document: Document) -> Iterator[Finding]:
    """The operator puts an init container of its own into Workers' pods, and its default fails the standard."""
    if document.kind == "PyTorchJob" and "Worker" in mapping(document.value, *REPLICAS):
        yield document.warning(
            (*REPLICAS, "Worker"), "operator-init",
            "the operator adds an init container to Workers that sets no securityContext by default: in a restricted "
            "namespace its configuration has to replace it (docs/checking-manifests.md)",
        )  # fmt: skip


def processes(document: Document) -> Iterator[Finding]:
    """One process a GPU."""
    spec = mapping(document.value, "spec")
    name = "numProcPerNode" if document.kind == "TrainJob" else "nprocPerNode"
    count = (mapping(spec, "trainer") if document.kind == "TrainJob" else spec).get(name)
    if document.kind not in TRAINING_KINDS or count is None or not str(count).isdecimal():
        return
    for pod in pods(document):
        for container in pod.containers():
            for kind, cards in container.gpus():
                if not container.init and cards not in (None, float(count)):
                    yield document.error(
                        (*container.place, "resources", "limits", kind), "processes",
                        f"{container.limits[kind]} GPUs for {name} {count}: one process a GPU is needed",
                    )  # fmt: skip


def queue_label(document: Document) -> Iterator[Finding]:
    """Kueue reads its labels on the job itself: on a pod template or as an annotation they do nothing."""
    for name in (QUEUE, PRIORITY):
        if name in mapping(document.value, "metadata", "annotations"):
            yield document.error(
                ("metadata", "annotations", name), "queue-label", f"{name} is a label of the job, not an annotation"
            )
        for pod in pods(document):
            if pod.at and name in mapping(pod.value, "metadata", "labels"):
                yield document.error(
                    (*pod.at, "metadata", "labels", name), "queue-label",
                    f"{name} belongs to the job's own labels: here Kueue does not see it",
                )  # fmt: skip
    labels = mapping(document.value, "metadata", "labels")
    if PRIORITY in labels and QUEUE not in labels:
        yield document.error(("metadata", "labels", PRIORITY), "queue-label", f"a priority without {QUEUE}")
