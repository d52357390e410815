"""What no schema says: each rule is a generator of findings, named as the findings are.

Sources: the training operator's validating webhook (v1.9), the *restricted* Pod Security Standard, Kueue's labels, and
what has cost people days: a shared memory that is too small, an image that moves, a secret in plain text.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.manifests.check.documents import Document, Finding, Place
from zhllama.kubernetes.quantity import quantity
from zhllama.kubernetes.training_job import RUNTIME

TRAINING_KINDS = ("PyTorchJob", "TrainJob")


RENDEZVOUS = ("c10d", "etcd", "etcd-v2")


RESTARTS = ("Always", "OnFailure", "Never", "ExitCode")


LONGEST_JOB_NAME = 63 - len("-worker-999")
"""The operator appends to it to name pods and services, whose names are DNS labels."""


LEAST_GRACE = 60
"""Seconds of a training pod between SIGTERM and SIGKILL: a checkpoint has to be written in them."""


VOLUMES = (
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret",
)  # fmt: skip
"""Kinds of volumes that the restricted standard allows."""


SECRET_NAME = re.compile(r"(SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY)", re.IGNORECASE)


SECRET_VALUE = re.compile(r"\b(AKIA[0-9A-Z]{16}|sk-[A-Za-z0-9_-]{20,}|hf_[A-Za-z0-9]{20,}|ghp_[A-Za-z0-9]{30,})\b")


NO_SECRET = re.compile(r"(_FILE|_PATH|_DIR|_URL|_NAME)$", re.IGNORECASE)
"""A variable that ends so says where a secret is, not what it is."""


QUEUE = "kueue.x-k8s.io/queue-name"


QUEUE_LABELS = (QUEUE, "kueue.x-k8s.io/priority-class")


@dataclass(frozen=True)
class Node:
    """The largest machine there is: what one pod may ask for. Cores, bytes, bytes, cards."""

    cpu: float = 448
    memory: float = 24 * 2**40
    ephemeral_storage: float = 100 * 2**40
    gpus: float = 16


@dataclass(frozen=True)
class Pod:
    """A pod template in an object: `at` is the way to its `spec`'s parent."""

    at: Place
    value: Mapping[str, Any]
    training: bool
    replicas: int = 1

    @property
    def spec(self) -> Mapping[str, Any]:
        return mapping(self.value.get("spec"))

    def containers(self) -> Iterator[tuple[Place, Mapping[str, Any], bool]]:
        """(way, container, whether it is an init container)."""
        for kind in ("containers", "initContainers"):
            for index, container in enumerate(sequence(self.spec.get(kind))):
                yield (*self.at, "spec", kind, index), mapping(container), kind == "initContainers"


def mapping(value: Any) -> Mapping[str, Any]:
    """The value, or an empty mapping where something else stands (the schema's finding, not a rule's)."""
    return value if isinstance(value, Mapping) else {}


def sequence(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else ()


def pods(document: Document) -> list[Pod]:
    """The pod templates of an object."""
    value, kind = document.value, document.kind
    spec = mapping(value.get("spec"))
    if kind == "Pod":
        return [Pod((), value, False)]
    if kind == "CronJob":
        template = mapping(mapping(mapping(spec.get("jobTemplate")).get("spec")).get("template"))
        return [Pod(("spec", "jobTemplate", "spec", "template"), template, False)]
    if kind in ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job"):
        return [Pod(("spec", "template"), mapping(spec.get("template")), False)]
    if kind == "TrainJob":
        return [_trainjobs_pod(document)] if _is_of_known_runtime(document) else []
    if kind == "PyTorchJob":
        return [
            Pod(
                ("spec", "pytorchReplicaSpecs", name, "template"),
                mapping(mapping(replica).get("template")),
                True,
                mapping(replica).get("replicas", 1),
            )
            for name, replica in mapping(spec.get("pytorchReplicaSpecs")).items()
        ]
    if kind == "InferenceService":
        # a predictor is a pod's spec with KServe's own fields beside it
        return [Pod(("spec", "predictor"), {"spec": spec.get("predictor")}, False)] if "predictor" in spec else []
    return []


def _is_of_known_runtime(document: Document) -> bool:
    return mapping(mapping(document.value.get("spec")).get("runtimeRef")).get("name") == RUNTIME


_OF_TRAINER = {"image": "image", "command": "command", "args": "args", "env": "env", "resourcesPerNode": "resources"}
"""Fields of a TrainJob's trainer, and of the container that they are."""


def _trainjobs_pod(document: Document) -> Pod:
    """A node's pod, as the trainer and the patches of a TrainJob make it of the runtime that Kubeflow Trainer ships for
    torch, which says nothing of what is checked here."""
    spec = mapping(document.value.get("spec"))
    trainer = mapping(spec.get("trainer"))
    at: Place = ("spec", "trainer")
    template: Mapping[str, Any] = {}
    for number, patch in enumerate(map(mapping, sequence(spec.get("runtimePatches")))):
        patched = mapping(mapping(mapping(patch.get("trainingRuntimeSpec")).get("template")).get("spec"))
        for index, job in enumerate(map(mapping, sequence(patched.get("replicatedJobs")))):
            if job.get("name") == "node":
                way = (
                    "trainingRuntimeSpec",
                    "template",
                    "spec",
                    "replicatedJobs",
                    index,
                    "template",
                    "spec",
                    "template",
                )
                at = ("spec", "runtimePatches", number, *way)
                template = mapping(mapping(mapping(job.get("template")).get("spec")).get("template"))
    pod = mapping(template.get("spec"))
    containers = [dict(mapping(container)) for container in sequence(pod.get("containers"))] or [{"name": "node"}]
    index = next((number for number, one in enumerate(containers) if one.get("name") == "node"), 0)
    containers[index] |= {own: trainer[field] for field, own in _OF_TRAINER.items() if field in trainer}
    # findings name the lines of the trainer's fields
    for place, line in list(document.lines.items()):
        if place[:2] == ("spec", "trainer") and len(place) > 2 and place[2] in _OF_TRAINER:
            own = _OF_TRAINER[str(place[2])]
            document.lines.setdefault((*at, "spec", "containers", index, own, *place[3:]), line)
    return Pod(at, {**template, "spec": {**pod, "containers": containers}}, True)


# --- the training operator --------------------------------------------------------------------------------------------
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
    elif not _is_of_known_runtime(document):
        yield document.warning(
            ("spec", "runtimeRef"), "runtime",
            f"its pods come of a runtime that is not {RUNTIME}: what they are is not known here, and not checked",
        )  # fmt: skip


def _replicas(document: Document) -> Iterator[Finding]:
    spec = mapping(document.value.get("spec"))
    replicas = mapping(spec.get("pytorchReplicaSpecs"))
    elastic = spec.get("elasticPolicy")
    masters = mapping(replicas.get("Master"))
    if elastic is None and (not masters or masters.get("replicas", 1) != 1):
        yield document.error(
            ("spec", "pytorchReplicaSpecs", "Master", "replicas") if masters else ("spec", "pytorchReplicaSpecs"),
            "one-master", "exactly one Master is needed; the other nodes are Workers",
        )  # fmt: skip
    if elastic is not None:
        yield from _elastic(document, spec, mapping(elastic), replicas)
    for replica, value in replicas.items():
        place = ("spec", "pytorchReplicaSpecs", replica)
        restart = mapping(value).get("restartPolicy")
        if restart is not None and restart not in RESTARTS:
            yield document.error(
                (*place, "restartPolicy"), "restart-policy", f"restartPolicy {restart!r}: use {', '.join(RESTARTS)}"
            )
        names = [
            mapping(container).get("name")
            for container in sequence(mapping(mapping(mapping(value).get("template")).get("spec")).get("containers"))
        ]
        if "pytorch" not in names:
            yield document.error(
                (*place, "template", "spec", "containers"), "container-name",
                "no container is named pytorch: the operator sets its variables in that one alone, and refuses the job",
            )  # fmt: skip


def _elastic(
    document: Document, spec: Mapping[str, Any], elastic: Mapping[str, Any], replicas: Mapping[str, Any]
) -> Iterator[Finding]:
    place = ("spec", "elasticPolicy")
    if "nProcPerNode" in elastic and "nprocPerNode" in spec:
        yield document.error(
            (*place, "nProcPerNode"), "nproc-elastic", "nProcPerNode stands beside spec.nprocPerNode; keep the latter"
        )
    if elastic.get("rdzvBackend", "c10d") not in RENDEZVOUS:
        yield document.error(
            (*place, "rdzvBackend"),
            "rendezvous",
            f"rdzvBackend {elastic['rdzvBackend']!r}: use {', '.join(RENDEZVOUS)}",
        )
    if "Master" in replicas:
        yield document.error(
            ("spec", "pytorchReplicaSpecs", "Master"), "elastic-master",
            "an elastic job has Workers alone: which of them leads is found by rendezvous",
        )  # fmt: skip
    least, most = elastic.get("minReplicas"), elastic.get("maxReplicas")
    count = mapping(replicas.get("Worker")).get("replicas", 1)
    if isinstance(least, int) and isinstance(most, int) and isinstance(count, int) and not least <= count <= most:
        yield document.error(
            ("spec", "pytorchReplicaSpecs", "Worker", "replicas"), "elastic-range",
            f"{count} Workers are not between minReplicas {least} and maxReplicas {most}",
        )  # fmt: skip


def deadlines(document: Document) -> Iterator[Finding]:
    """A training that hangs is ended, a finished one goes away, and a dead pod's logs stay until then."""
    if document.kind == "TrainJob" and "activeDeadlineSeconds" not in mapping(document.value.get("spec")):
        yield document.error(
            ("spec",), "deadlines", "no activeDeadlineSeconds: a job that hangs holds its GPUs for ever"
        )
    if document.kind != "PyTorchJob":
        return
    place = ("spec", "runPolicy")
    policy = mapping(mapping(document.value.get("spec")).get("runPolicy"))
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


def grace(document: Document) -> Iterator[Finding]:
    for pod in pods(document):
        seconds = pod.spec.get("terminationGracePeriodSeconds", 30)
        if pod.training and isinstance(seconds, int) and seconds < LEAST_GRACE:
            yield document.error(
                (*pod.at, "spec", "terminationGracePeriodSeconds"), "grace",
                f"{seconds} s from SIGTERM to SIGKILL: a checkpoint needs {LEAST_GRACE} or more",
            )  # fmt: skip


def shared_memory(document: Document) -> Iterator[Finding]:
    """Processes of one node talk through /dev/shm, of which a container has 64 MiB unless it says more."""
    for pod in pods(document):
        volumes = {mapping(volume).get("name"): volume for volume in sequence(pod.spec.get("volumes"))}
        for place, container, init in pod.containers():
            mounts = {
                mapping(mount).get("mountPath"): mapping(mount) for mount in sequence(container.get("volumeMounts"))
            }
            mount = mounts.get("/dev/shm")
            if mount is None:
                if pod.training and not init:
                    yield document.error(
                        place, "shm", "/dev/shm is 64 MiB without a volume of its own: mount an emptyDir, medium Memory"
                    )
                continue
            empty = mapping(mapping(volumes.get(mount.get("name"))).get("emptyDir"))
            size, limit = quantity(empty.get("sizeLimit")), quantity(_limits(container).get("memory"))
            if empty.get("medium") != "Memory":
                yield document.error(place, "shm", "the volume at /dev/shm must be an emptyDir with medium: Memory")
            elif size is None:
                yield document.error(place, "shm", "the emptyDir at /dev/shm has no sizeLimit: it may fill the node")
            elif limit is not None and size >= limit:
                yield document.error(
                    place, "shm", f"/dev/shm may take {empty['sizeLimit']}, which is all of the container's memory: it "
                    "counts against the limit",
                )  # fmt: skip


# --- pods -------------------------------------------------------------------------------------------------------------
def restricted(document: Document) -> Iterator[Finding]:
    """The *restricted* Pod Security Standard (Kubernetes 1.25 and later)."""
    for pod in pods(document):
        spec, at = pod.spec, (*pod.at, "spec")
        for name in ("hostNetwork", "hostPID", "hostIPC"):
            if spec.get(name):
                yield document.error((*at, name), "restricted", f"{name} is not allowed")
        for index, volume in enumerate(sequence(spec.get("volumes"))):
            for kind in sorted(set(mapping(volume)) - {"name", *VOLUMES}):
                yield document.error((*at, "volumes", index), "restricted", f"a volume of kind {kind} is not allowed")
        shared = mapping(spec.get("securityContext"))
        if shared.get("sysctls"):
            yield document.error((*at, "securityContext", "sysctls"), "restricted", "sysctls are not set by a pod")
        for place, container, _ in pod.containers():
            yield from _restricted_container(document, place, container, shared)


def _restricted_container(
    document: Document, place: Place, container: Mapping[str, Any], shared: Mapping[str, Any]
) -> Iterator[Finding]:
    own = mapping(container.get("securityContext"))
    at = (*place, "securityContext")
    name = container.get("name")

    def wrong(message: str, *more: str) -> Finding:
        return document.error((*at, *more), "restricted", f"container {name}: {message}")

    if own.get("runAsNonRoot", shared.get("runAsNonRoot")) is not True:
        yield wrong("runAsNonRoot must be true, here or for the pod")
    if own.get("runAsUser", shared.get("runAsUser")) == 0:
        yield wrong("runAsUser 0 is root", "runAsUser")
    profile = mapping(own.get("seccompProfile", shared.get("seccompProfile"))).get("type")
    if profile not in ("RuntimeDefault", "Localhost"):
        yield wrong("seccompProfile must be RuntimeDefault, here or for the pod")
    if own.get("privileged"):
        yield wrong("privileged is not allowed", "privileged")
    if own.get("allowPrivilegeEscalation") is not False:
        yield wrong("allowPrivilegeEscalation must be false")
    capabilities = mapping(own.get("capabilities"))
    if "ALL" not in sequence(capabilities.get("drop")):
        yield wrong("capabilities must drop ALL")
    for added in sequence(capabilities.get("add")):
        if added != "NET_BIND_SERVICE":
            yield wrong(f"the capability {added} is not allowed", "capabilities")
    if own.get("procMount", "Default") != "Default":
        yield wrong("procMount must be Default", "procMount")
    for port in sequence(container.get("ports")):
        if mapping(port).get("hostPort"):
            yield document.error((*place, "ports"), "restricted", f"container {name}: hostPort is not allowed")


def operators_pods(document: Document) -> Iterator[Finding]:
    """The operator puts an init container of its own into Workers' pods, and its default fails the standard."""
    if document.kind == "PyTorchJob" and "Worker" in mapping(
        mapping(document.value.get("spec")).get("pytorchReplicaSpecs")
    ):
        yield document.warning(
            ("spec", "pytorchReplicaSpecs", "Worker"), "operator-init",
            "the operator adds an init container to Workers that sets no securityContext by default: in a restricted "
            "namespace its configuration has to replace it (docs/checking-manifests.md)",
        )  # fmt: skip


def read_only_root(document: Document) -> Iterator[Finding]:
    for pod in pods(document):
        for place, container, _ in pod.containers():
            if mapping(container.get("securityContext")).get("readOnlyRootFilesystem") is not True:
                yield document.error(
                    (*place, "securityContext"), "read-only-root",
                    f"container {container.get('name')}: readOnlyRootFilesystem must be true; mount what it writes to",
                )  # fmt: skip


def token(document: Document) -> Iterator[Finding]:
    """A pod that talks to no API server holds no token for it."""
    if document.kind == "TrainJob":
        # it cannot say so: its service account does
        return
    for pod in pods(document):
        automatic = pod.spec.get("automountServiceAccountToken")
        if automatic is None:
            yield document.error(
                (*pod.at, "spec"), "token",
                "automountServiceAccountToken is not set: false, or true where the pod talks to the API server",
            )  # fmt: skip
        elif automatic and pod.training:
            yield document.error(
                (*pod.at, "spec", "automountServiceAccountToken"), "token", "a training pod needs no Kubernetes token"
            )


def images(document: Document) -> Iterator[Finding]:
    for pod in pods(document):
        for place, container, _ in pod.containers():
            if document.kind == "TrainJob" and "image" not in container:
                # the runtime's
                continue
            image = str(container.get("image", ""))
            name, _, digest = image.partition("@")
            tag = name.rpartition("/")[2].partition(":")[2]
            if not digest and tag in ("", "latest"):
                yield document.error(
                    (*place, "image"), "image-pinned",
                    f"{image or 'no image'}: what runs may change between two pods; name a version or a digest",
                )  # fmt: skip


def plain_secrets(document: Document) -> Iterator[Finding]:
    """A secret in a manifest is in every listing, in the repository, and in the logs of who applies it."""
    for pod in pods(document):
        for place, container, _ in pod.containers():
            for index, variable in enumerate(map(mapping, sequence(container.get("env")))):
                name, value = str(variable.get("name", "")), variable.get("value")
                named = SECRET_NAME.search(name) and not NO_SECRET.search(name)
                if value and (named or SECRET_VALUE.search(str(value))):
                    yield document.error(
                        (*place, "env", index), "plain-secret",
                        f"{name} looks like a secret in plain text; take it from one with valueFrom.secretKeyRef",
                    )  # fmt: skip
            for kind in ("command", "args"):
                for index, word in enumerate(map(str, sequence(container.get(kind)))):
                    if SECRET_VALUE.search(word):
                        yield document.error(
                            (*place, kind, index), "plain-secret", "a secret on a command line: take it from a variable"
                        )


def _limits(container: Mapping[str, Any]) -> Mapping[str, Any]:
    return mapping(mapping(container.get("resources")).get("limits"))


def _requests(container: Mapping[str, Any]) -> Mapping[str, Any]:
    return mapping(mapping(container.get("resources")).get("requests"))


def resources(document: Document) -> Iterator[Finding]:
    """Every container says what it needs; GPUs are never shared, so requests and limits agree."""
    for pod in pods(document):
        for place, container, _ in pod.containers():
            at, name = (*place, "resources"), container.get("name")
            requests, limits = _requests(container), _limits(container)
            missing = [kind for kind in ("cpu", "memory", "ephemeral-storage") if kind not in {**limits, **requests}]
            missing += [f"a {kind} limit" for kind in ("memory", "ephemeral-storage") if kind not in limits]
            if missing:
                yield document.error(at, "resources", f"container {name} does not say {', '.join(missing)}")
            for kind in sorted({*requests, *limits}):
                asked, most = quantity(requests.get(kind)), quantity(limits.get(kind))
                if "/" in kind and kind not in limits:
                    yield document.error(
                        (*at, "requests", kind), "gpu-limits", f"{kind} is in no limits: give it there too"
                    )
                elif "/" in kind and asked is not None and asked != most:
                    yield document.error(
                        (*at, "requests", kind),
                        "gpu-limits",
                        f"{kind}: {requests[kind]} requested, {limits[kind]} the limit",
                    )
                elif asked is not None and most is not None and asked > most:
                    yield document.error(
                        (*at, "requests", kind),
                        "resources",
                        f"{kind}: {requests[kind]} requested, {limits[kind]} the limit",
                    )


def processes(document: Document) -> Iterator[Finding]:
    """One process a GPU."""
    spec = mapping(document.value.get("spec"))
    name = "numProcPerNode" if document.kind == "TrainJob" else "nprocPerNode"
    count = (mapping(spec.get("trainer")) if document.kind == "TrainJob" else spec).get(name)
    if document.kind not in TRAINING_KINDS or count is None or not str(count).isdecimal():
        return
    for pod in pods(document):
        for place, container, init in pod.containers():
            for kind, cards in _limits(container).items():
                if is_gpu(kind) and not init and quantity(cards) not in (None, float(count)):
                    yield document.error(
                        (*place, "resources", "limits", kind), "processes",
                        f"{cards} GPUs for {name} {count}: one process a GPU is needed",
                    )  # fmt: skip


def is_gpu(kind: str) -> bool:
    return "/" in kind and "gpu" in kind.lower()


def fits(document: Document, node: Node) -> Iterator[Finding]:
    """A pod that no machine can hold waits for ever, and says so to nobody."""
    for pod in pods(document):
        total: dict[str, float] = {}
        for _, container, init in pod.containers():
            if init:
                continue
            for kind, value in {**_limits(container), **_requests(container)}.items():
                name = "gpus" if is_gpu(kind) else kind.replace("-", "_")
                total[name] = total.get(name, 0) + (quantity(value) or 0)
        for name in ("cpu", "memory", "ephemeral_storage", "gpus"):
            most = getattr(node, name)
            if total.get(name, 0) > most:
                unit = "" if name in ("cpu", "gpus") else " GiB"
                asked, there = (value if not unit else value / 2**30 for value in (total[name], most))
                yield document.error(
                    (*pod.at, "spec"), "fits",
                    f"{name.replace('_', '-')}: the pod asks for {asked:g}{unit}, the largest node has {there:g}{unit}",
                )  # fmt: skip


# --- queues -----------------------------------------------------------------------------------------------------------
def queue_label(document: Document) -> Iterator[Finding]:
    """Kueue reads its labels on the job itself: on a pod template or as an annotation they do nothing."""
    annotations = mapping(mapping(document.value.get("metadata")).get("annotations"))
    labels = mapping(mapping(document.value.get("metadata")).get("labels"))
    for name in QUEUE_LABELS:
        if name in annotations:
            yield document.error(
                ("metadata", "annotations", name), "queue-label", f"{name} is a label of the job, not an annotation"
            )
        for pod in pods(document):
            given = mapping(mapping(pod.value.get("metadata")).get("labels"))
            if pod.at and name in given:
                yield document.error(
                    (*pod.at, "metadata", "labels", name), "queue-label",
                    f"{name} belongs to the job's own labels: here Kueue does not see it",
                )  # fmt: skip
    if "kueue.x-k8s.io/priority-class" in labels and QUEUE not in labels:
        yield document.error(
            ("metadata", "labels", "kueue.x-k8s.io/priority-class"), "queue-label", f"a priority without {QUEUE}"
        )


RULES: tuple[Callable[[Document], Iterator[Finding]], ...] = (
    operator, deadlines, grace, shared_memory, restricted, operators_pods, read_only_root, token, images, plain_secrets,
    resources, processes, queue_label,
)  # fmt: skip


def check_rules(document: Document, node: Node) -> Iterator[Finding]:
    for rule in RULES:
        yield from rule(document)
    yield from fits(document, node)
