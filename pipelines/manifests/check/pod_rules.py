"""What no schema says of a pod: the *restricted* Pod Security Standard, and what has cost people days: a shared memory
that is too small, an image that moves, a secret in plain text, a pod that no machine holds.

Each rule is a generator of findings, of a pod or of one of its containers.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.manifests.check.documents import Document, Finding
from pipelines.manifests.check.pods import Container, Pod, is_gpu, mapping, sequence
from zhllama.kubernetes.quantity import quantity

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


@dataclass(frozen=True)
class Node:
    """The largest machine there is: what one pod may ask for. Cores, bytes, bytes, cards."""

    cpu: float = 448
    memory: float = 24 * 2**40
    ephemeral_storage: float = 100 * 2**40
    gpus: float = 16


# --- of a pod ---------------------------------------------------------------------------------------------------------


def grace(document: Document, pod: Pod) -> Iterator[Finding]:
    seconds = pod.spec.get("terminationGracePeriodSeconds", 30)
    if pod.training and isinstance(seconds, int) and seconds < LEAST_GRACE:
        yield document.error(
            (*pod.at, "spec", "terminationGracePeriodSeconds"), "grace",
            f"{seconds} s from SIGTERM to SIGKILL: a checkpoint needs {LEAST_GRACE} or more",
        )  # fmt: skip


def restricted(document: Document, pod: Pod) -> Iterator[Finding]:
    """The *restricted* Pod Security Standard (Kubernetes 1.25 and later)."""
    at = (*pod.at, "spec")
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.spec.get(name):
            yield document.error((*at, name), "restricted", f"{name} is not allowed")
    for index, volume in enumerate(sequence(pod.spec.get("volumes"))):
        for kind in sorted(set(mapping(volume)) - {"name", *VOLUMES}):
            yield document.error((*at, "volumes", index), "restricted", f"a volume of kind {kind} is not allowed")
    if mapping(pod.spec, "securityContext").get("sysctls"):
        yield document.error((*at, "securityContext", "sysctls"), "restricted", "sysctls are not set by a pod")


def token(document: Document, pod: Pod) -> Iterator[Finding]:
    """A pod that talks to no API server holds no token for it."""
    automatic = pod.spec.get("automountServiceAccountToken")
    if document.kind == "TrainJob":
        # it cannot say so: its service account does
        return
    if automatic is None:
        yield document.error(
            (*pod.at, "spec"), "token",
            "automountServiceAccountToken is not set: false, or true where the pod talks to the API server",
        )  # fmt: skip
    elif automatic and pod.training:
        yield document.error(
            (*pod.at, "spec", "automountServiceAccountToken"), "token", "a training pod needs no Kubernetes token"
        )


def fits(document: Document, pod: Pod, node: Node) -> Iterator[Finding]:
    """A pod that no machine can hold waits for ever, and says so to nobody."""
    total: dict[str, float] = {}
    for container in pod.containers():
        for kind, value in {} if container.init else {**container.limits, **container.requests}.items():
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


# --- of a container ---------------------------------------------------------------------------------------------------


def shared_memory(document: Document, pod: Pod, container: Container) -> Iterator[Finding]:
    """Processes of one node talk through /dev/shm, of which a container has 64 MiB unless it says more."""

    def wrong(message: str) -> Finding:
        return document.error(container.place, "shm", message)

    volumes = {mapping(volume).get("name"): volume for volume in sequence(pod.spec.get("volumes"))}
    mounts = {mapping(mount).get("mountPath"): mount for mount in sequence(container.value.get("volumeMounts"))}
    mount = mounts.get("/dev/shm")
    if mount is None:
        if pod.training and not container.init:
            yield wrong("/dev/shm is 64 MiB without a volume of its own: mount an emptyDir, medium Memory")
        return
    empty = mapping(volumes.get(mount.get("name")), "emptyDir")
    size, limit = quantity(empty.get("sizeLimit")), quantity(container.limits.get("memory"))
    if empty.get("medium") != "Memory":
        yield wrong("the volume at /dev/shm must be an emptyDir with medium: Memory")
    elif size is None:
        yield wrong("the emptyDir at /dev/shm has no sizeLimit: it may fill the node")
    elif limit is not None and size >= limit:
        yield wrong(
            f"/dev/shm may take {empty['sizeLimit']}, which is all of the container's memory: it counts against the "
            "limit"
        )


def restricted_container(document: Document, pod: Pod, container: Container) -> Iterator[Finding]:
    own, shared = mapping(container.value, "securityContext"), mapping(pod.spec, "securityContext")
    at = (*container.place, "securityContext")

    def wrong(message: str, *more: str) -> Finding:
        return document.error((*at, *more), "restricted", f"container {container.name}: {message}")

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
    capabilities = mapping(own, "capabilities")
    if "ALL" not in sequence(capabilities.get("drop")):
        yield wrong("capabilities must drop ALL")
    for added in sequence(capabilities.get("add")):
        if added != "NET_BIND_SERVICE":
            yield wrong(f"the capability {added} is not allowed", "capabilities")
    if own.get("procMount", "Default") != "Default":
        yield wrong("procMount must be Default", "procMount")
    if any(mapping(port).get("hostPort") for port in sequence(container.value.get("ports"))):
        place = (*container.place, "ports")
        yield document.error(place, "restricted", f"container {container.name}: hostPort is not allowed")


def read_only_root(document: Document, pod: Pod, container: Container) -> Iterator[Finding]:
    if mapping(container.value, "securityContext").get("readOnlyRootFilesystem") is not True:
        yield document.error(
            (*container.place, "securityContext"), "read-only-root",
            f"container {container.name}: readOnlyRootFilesystem must be true; mount what it writes to",
        )  # fmt: skip


def images(document: Document, pod: Pod, container: Container) -> Iterator[Finding]:
    if document.kind == "TrainJob" and "image" not in container.value:
        # the runtime's
        return
    image = str(container.value.get("image", ""))
    name, _, digest = image.partition("@")
    tag = name.rpartition("/")[2].partition(":")[2]
    if not digest and tag in ("", "latest"):
        yield document.error(
            (*container.place, "image"), "image-pinned",
            f"{image or 'no image'}: what runs may change between two pods; name a version or a digest",
        )  # fmt: skip


def plain_secrets(document: Document, pod: Pod, container: Container) -> Iterator[Finding]:
    """A secret in a manifest is in every listing, in the repository, and in the logs of who applies it."""
    for index, variable in enumerate(map(mapping, sequence(container.value.get("env")))):
        name, value = str(variable.get("name", "")), variable.get("value")
        named = SECRET_NAME.search(name) and not NO_SECRET.search(name)
        if value and (named or SECRET_VALUE.search(str(value))):
            yield document.error(
                (*container.place, "env", index), "plain-secret",
                f"{name} looks like a secret in plain text; take it from one with valueFrom.secretKeyRef",
            )  # fmt: skip
    for kind in ("command", "args"):
        for index, word in enumerate(map(str, sequence(container.value.get(kind)))):
            if SECRET_VALUE.search(word):
                place = (*container.place, kind, index)
                yield document.error(place, "plain-secret", "a secret on a command line: take it from a variable")


def resources(document: Document, pod: Pod, container: Container) -> Iterator[Finding]:
    """Every container says what it needs; GPUs are never shared, so requests and limits agree."""
    at, requests, limits = (*container.place, "resources"), container.requests, container.limits
    missing = [kind for kind in ("cpu", "memory", "ephemeral-storage") if kind not in {**limits, **requests}]
    missing += [f"a {kind} limit" for kind in ("memory", "ephemeral-storage") if kind not in limits]
    if missing:
        yield document.error(at, "resources", f"container {container.name} does not say {', '.join(missing)}")
    for kind in sorted({*requests, *limits}):
        place = (*at, "requests", kind)
        asked, most = quantity(requests.get(kind)), quantity(limits.get(kind))
        if "/" in kind and kind not in limits:
            yield document.error(place, "gpu-limits", f"{kind} is in no limits: give it there too")
        elif asked is not None and (asked != most if "/" in kind else most is not None and asked > most):
            rule = "gpu-limits" if "/" in kind else "resources"
            yield document.error(place, rule, f"{kind}: {requests[kind]} requested, {limits[kind]} the limit")
