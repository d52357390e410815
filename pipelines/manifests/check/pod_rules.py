"""What the server takes, and what has cost people days: a shared memory that is too small, an image that moves, a
secret in plain text, a pod that no machine holds."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from pipelines.manifests.check.documents import Finding, mapping
from pipelines.manifests.check.pods import Container, Pod, is_gpu, sequence
from zhllama.kubernetes.formats import amount
from zhllama.secret_text import is_secret, is_secret_name
from zhllama.stage.images import image_reference

LEAST_GRACE = 60
"""Seconds of a training pod between SIGTERM and SIGKILL: a checkpoint has to be written in them."""


@dataclass(frozen=True)
class Node:
    """The largest machine there is: what one pod may ask for. Cores, bytes, bytes, cards."""

    cpu: float = 448
    memory: float = 24 * 2**40
    ephemeral_storage: float = 100 * 2**40
    gpus: float = 16


# --- of a pod ---------------------------------------------------------------------------------------------------------


def grace(pod: Pod) -> Iterator[Finding]:
    seconds = pod.spec.get("terminationGracePeriodSeconds", 30)
    if pod.training and isinstance(seconds, int) and seconds < LEAST_GRACE:
        wrong = f"{seconds} s from SIGTERM to SIGKILL: a checkpoint needs {LEAST_GRACE} or more"
        yield pod.advice("grace", wrong, "terminationGracePeriodSeconds")


def token(pod: Pod) -> Iterator[Finding]:
    """A pod that talks to no API server holds no token for it."""
    automatic = pod.spec.get("automountServiceAccountToken")
    if pod.document.kind == "TrainJob":
        # it cannot say so: its service account does
        return
    if automatic is None:
        wrong = "automountServiceAccountToken is not set: false, or true where the pod talks to the API server"
        yield pod.advice("token", wrong)
    elif automatic and pod.training:
        yield pod.advice("token", "a training pod needs no Kubernetes token", "automountServiceAccountToken")


def fits(pod: Pod, node: Node) -> Iterator[Finding]:
    """A pod that no machine can hold waits for ever, and says so to nobody."""
    total: dict[str, float] = {}
    for container in (container for container in pod.containers() if not container.init):
        for kind, value in {**container.limits, **container.requests}.items():
            name = "gpus" if is_gpu(kind) else kind.replace("-", "_")
            total[name] = total.get(name, 0) + float(amount(value) or 0)
    for name, most in asdict(node).items():
        if total.get(name, 0) > most:
            unit, of = ("", 1) if name in ("cpu", "gpus") else (" GiB", 2**30)
            asked, there = f"{total[name] / of:g}{unit}", f"{most / of:g}{unit}"
            yield pod.works("fits", f"{name.replace('_', '-')}: the pod asks for {asked}, the largest node has {there}")


# --- of a container ---------------------------------------------------------------------------------------------------


def shared_memory(container: Container) -> Iterator[Finding]:
    """Processes of one node talk through /dev/shm, of which a container has 64 MiB unless it says more."""
    pod = container.pod
    volumes = {str(mapping(volume).get("name")): volume for volume in sequence(pod.spec.get("volumes"))}
    mounts = {str(mapping(mount).get("mountPath")): mount for mount in sequence(container.value.get("volumeMounts"))}
    mount = mounts.get("/dev/shm")
    if mount is None:
        if pod.training and not container.init:
            wrong = "/dev/shm is 64 MiB without a volume of its own: mount an emptyDir, medium Memory"
            yield container.advice("shm", wrong)
        return
    empty = mapping(volumes.get(str(mount.get("name"))), "emptyDir")
    size, limit = amount(empty.get("sizeLimit")), amount(container.limits.get("memory"))
    if empty.get("medium") != "Memory":
        yield container.advice("shm", "the volume at /dev/shm must be an emptyDir with medium: Memory")
    elif size is None:
        yield container.advice("shm", "the emptyDir at /dev/shm has no sizeLimit: it may fill the node")
    elif limit is not None and size >= limit:
        wrong = "which is all of the container's memory: it counts against the limit"
        yield container.advice("shm", f"/dev/shm may take {empty['sizeLimit']}, {wrong}")


def read_only_root(container: Container) -> Iterator[Finding]:
    if mapping(container.value, "securityContext").get("readOnlyRootFilesystem") is not True:
        wrong = "readOnlyRootFilesystem must be true; mount what it writes to"
        yield container.advice("read-only-root", f"container {container.name}: {wrong}", "securityContext")


UNPINNED = ("vllm/vllm-openai", "chrislusf/seaweedfs")
"""Images of others that our manifests name by tag: which digest is theirs, a registry says."""


def images(container: Container) -> Iterator[Finding]:
    if container.pod.document.kind == "TrainJob" and "image" not in container.value:
        # the runtime's
        return
    image = str(container.value.get("image", ""))
    if image and (wrong := image_reference(image)):
        # the API server takes any text, and the pod waits for ever with InvalidImageName
        yield container.works("image-name", f"{image!r} {wrong}", "image")
        return
    name, _, digest = image.partition("@")
    tag = name.rpartition("/")[2].partition(":")[2]
    if not digest and tag in ("", "latest"):
        wrong = "what runs may change between two pods; name a version or a digest"
        yield container.advice("image-pinned", f"{image or 'no image'}: {wrong}", "image")
    elif not digest and name.rpartition(":")[0] in UNPINNED:
        wrong = "a tag may be moved to other content; name it by digest, @sha256:… (render serving --vllm-image)"
        yield container.advice("image-pinned", f"{image}: {wrong}", "image")


def plain_secrets(container: Container) -> Iterator[Finding]:
    """A secret in a manifest is in every listing, in the repository, and in the logs of who applies it."""
    for index, variable in enumerate(map(mapping, sequence(container.value.get("env")))):
        name, value = str(variable.get("name", "")), variable.get("value")
        if value and (is_secret_name(name) or is_secret(str(value))):
            wrong = f"{name} looks like a secret in plain text; take it from one with valueFrom.secretKeyRef"
            yield container.advice("plain-secret", wrong, "env", index)
    for kind in ("command", "args"):
        for index, word in enumerate(map(str, sequence(container.value.get(kind)))):
            if is_secret(word):
                wrong = "a secret on a command line: take it from a variable"
                yield container.advice("plain-secret", wrong, kind, index)


def resources(container: Container) -> Iterator[Finding]:
    """Every container says what it needs."""
    requests, limits = container.requests, container.limits
    missing = [kind for kind in ("cpu", "memory", "ephemeral-storage") if kind not in {**limits, **requests}]
    missing += [f"a {kind} limit" for kind in ("memory", "ephemeral-storage") if kind not in limits]
    if missing:
        wrong = f"container {container.name} does not say {', '.join(missing)}"
        yield container.advice("resources", wrong, "resources")


OF_PODS = (grace, token)
OF_CONTAINERS = (shared_memory, read_only_root, images, plain_secrets, resources)
