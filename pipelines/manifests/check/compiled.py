"""The pods of a compiled pipeline: each executor's container, and what the platform's settings add to its pod."""

from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.manifests.check.documents import WORKS, Document, Finding, mapping
from pipelines.manifests.check.field import Field
from pipelines.manifests.check.pod_rules import images, plain_secrets
from pipelines.manifests.check.pod_security import pod_security as held_to_standard
from pipelines.manifests.check.pods import Container, Pod, sequence
from pipelines.manifests.check.server.types import check_part

TEMPLATE = "io.k8s.api.core.v1.PodTemplateSpec"
_RESOURCES = {
    ("requests", "cpu"): ("resourceCpuRequest", "cpuRequest"),
    ("requests", "memory"): ("resourceMemoryRequest",),
    ("limits", "cpu"): ("resourceCpuLimit", "cpuLimit"),
    ("limits", "memory"): ("resourceMemoryLimit",),
}
_SAFE: dict[str, Any] = {
    "runAsNonRoot": True, "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}  # fmt: skip
"""What a restricted namespace wants. What of it Kubeflow Pipelines says by itself is its business, and differs by its
version: a step is held to what the package says."""
_VOLUMES = {"secretAsVolume": ("secret", "secretName", "secretName")}
_VOLUMES["configMapAsVolume"] = ("configMap", "configMapName", "name")


def check_pipeline(
    document: Document, version: str, executors: dict[str, Mapping[str, Any]], standard: str
) -> Iterator[Finding]:
    """Of a document of a compiled pipeline. `executors`: those of the first document, for the platform's settings;
    `standard`: pod security's, of the runs' namespace."""
    spec = document.value
    if "pipelineInfo" in spec:
        executors.clear()
        executors |= mapping(spec, "deploymentSpec", "executors")
        at: tuple[str, ...] = ("deploymentSpec", "executors")
        settings: Mapping[str, Any] = {}
    else:
        at = ("platforms", "kubernetes", "deploymentSpec", "executors")
        settings = mapping(spec, *at)
    for name, executor in executors.items():
        container = mapping(executor, "container")
        place = (*at, name)
        alone = _pod(container, {})
        said = list(_held(document, place, alone, version)) if container else []
        if container and "pipelineInfo" in spec:
            yield from said
            whole = Pod(document, place, alone)
            own = Container(whole, ("container",), alone["spec"]["containers"][0], False)
            yield from images(own)
            yield from plain_secrets(own)
        elif container and settings.get(name):
            pod = _pod(container, mapping(settings[name]))
            held = _held(document, place, pod, version)
            yield from (found for found in held if found.message not in {one.message for one in said})
            pod["spec"]["containers"][0]["securityContext"] = _SAFE | _context(mapping(settings[name]))
            yield from _of_step(place, held_to_standard(Field(document, place, pod, WORKS), standard))


def _held(document: Document, place: tuple[str, ...], pod: Any, version: str) -> Iterator[Finding]:
    """What the server will say of a step's pod."""
    yield from _of_step(place, check_part(Field(document, place, pod, WORKS), TEMPLATE, version))


def _of_step(place: tuple[str, ...], findings: Iterator[Finding]) -> Iterator[Finding]:
    for found in findings:
        inner = found.message.removeprefix(".".join(place)).lstrip(".")
        yield Finding(found.file, found.line, WORKS, found.rule, f"{place[-1].removeprefix('exec-')}'s pod: {inner}")


def _pod(container: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """As Kubeflow Pipelines' driver makes it. What a run's parameters say is left out."""
    made = {name: container[name] for name in ("image", "command", "args", "env") if name in container}
    if "{{" in str(made.get("image", "")):
        made["image"] = "of-a-parameter"
    made |= {"name": "main", "resources": _resources(mapping(container, "resources")), "volumeMounts": []}
    made["env"] = list(sequence(container.get("env")))
    volumes: list[dict[str, Any]] = []
    for kind, (source, of, name) in _VOLUMES.items():
        for mount in map(mapping, sequence(settings.get(kind))):
            if of in mount:
                _mount(made, volumes, f"v{len(volumes)}", {source: {name: mount[of]}}, mount)
    for mount in map(mapping, sequence(settings.get("emptyDirMounts"))):
        given = {"medium": mount.get("medium"), "sizeLimit": mount.get("sizeLimit")}
        empty_dir = {"emptyDir": {name: value for name, value in given.items() if value}}
        _mount(made, volumes, mount.get("volumeName"), empty_dir, mount)
    for mount in map(mapping, sequence(settings.get("pvcMount"))):
        if isinstance(mount.get("constant"), str):
            claim: dict[str, Any] = {"persistentVolumeClaim": {"claimName": mount["constant"]}}
            _mount(made, volumes, f"v{len(volumes)}", claim, mount)
    spec: dict[str, Any] = {"containers": [made], "volumes": volumes, "restartPolicy": "Never"}
    spec["nodeSelector"] = dict(mapping(settings, "nodeSelector", "labels"))
    tolerations = [dict(one) for one in map(mapping, sequence(settings.get("tolerations")))]
    spec["tolerations"] = [one for one in tolerations if one and "tolerationJson" not in one]
    for one in spec["tolerations"]:
        if str(one.get("tolerationSeconds", "")).isdecimal():
            one["tolerationSeconds"] = int(one["tolerationSeconds"])
    metadata = mapping(settings, "podMetadata")
    return {"metadata": {name: metadata[name] for name in ("labels", "annotations") if name in metadata}, "spec": spec}


def _context(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The security context of a step. Whole numbers are texts there."""
    given = mapping(settings, "securityContext")
    return {name: int(one) if isinstance(one, str) and one.isdecimal() else one for name, one in given.items()}


def _mount(
    container: dict[str, Any], volumes: list[dict[str, Any]], name: Any, source: Mapping[str, Any], mount: Any
) -> None:
    volumes.append({"name": name, **source})
    container["volumeMounts"].append({"name": name, "mountPath": mount.get("mountPath")})


def _resources(given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    made: dict[str, dict[str, Any]] = {"requests": {}, "limits": {}}
    for (group, kind), names in _RESOURCES.items():
        for name in names:
            value = given.get(name)
            if value not in (None, "") and "{{" not in str(value):
                made[group][kind] = value
                break
    gpu, count = (mapping(given, "accelerator").get(name) for name in ("resourceType", "resourceCount"))
    if isinstance(gpu, str) and "{{" not in f"{gpu}{count}" and count not in (None, "", "0", 0):
        made["limits"][gpu] = count
    return made
