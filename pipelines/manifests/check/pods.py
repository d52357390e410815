"""The pod templates of an object, wherever its kind keeps them, and their containers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.manifests.check.documents import ADMISSION, WORKS, Document, Finding, Place, mapping
from pipelines.manifests.check.field import Field
from zhllama.kubernetes.job_manifest import RUNTIME

_OF_TRAINER = {"image": "image", "command": "command", "args": "args", "env": "env", "resourcesPerNode": "resources"}
"""Fields of a TrainJob's trainer, and of the container that they are."""
_TEMPLATES: Mapping[str, Place] = {
    "Pod": (),
    "CronJob": ("spec", "jobTemplate", "spec", "template"),
    **dict.fromkeys(("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job"), ("spec", "template")),
}


def sequence(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else ()


def is_gpu(kind: str) -> bool:
    return "/" in kind and "gpu" in kind.lower()


@dataclass(frozen=True)
class Pod:
    """A pod template in an object: `at` is the way to its `spec`'s parent."""

    document: Document
    at: Place
    value: Mapping[str, Any]
    training: bool = False
    inlined: bool = False
    """Whether its spec stands at `at` itself."""
    from_runtime: bool = False
    """Whether a runtime that is not here brings a part of it: its security context, say."""

    @property
    def spec(self) -> Mapping[str, Any]:
        return mapping(self.value, "spec")

    @property
    def field(self) -> Field:
        """Its metadata and spec. The server looks at a Pod at once, at the pods of others when they are made."""
        grade = ADMISSION if self.document.kind == "Pod" else WORKS
        return Field(self.document, self.at, dict(self.value), grade, "spec" if self.inlined else "")

    @property
    def spec_at(self) -> Place:
        return self.at if self.inlined else (*self.at, "spec")

    def works(self, rule: str, message: str, *place: str | int) -> Finding:
        """`place`: in its spec."""
        return self.document.works(rule, message, *self.spec_at, *place)

    def advice(self, rule: str, message: str, *place: str | int) -> Finding:
        return self.document.advice(rule, message, *self.spec_at, *place)

    def containers(self) -> Iterator["Container"]:
        for kind in ("containers", "initContainers"):
            for index, container in enumerate(sequence(self.spec.get(kind))):
                yield Container(self, (kind, index), mapping(container), kind == "initContainers")


@dataclass(frozen=True)
class Container:
    """A container of a pod: `place` is the way to it in the pod's spec."""

    pod: Pod
    place: Place
    value: Mapping[str, Any]
    init: bool

    @property
    def name(self) -> Any:
        return self.value.get("name")

    @property
    def requests(self) -> Mapping[str, Any]:
        return mapping(self.value, "resources", "requests")

    @property
    def limits(self) -> Mapping[str, Any]:
        return mapping(self.value, "resources", "limits")

    def works(self, rule: str, message: str, *place: str | int) -> Finding:
        """`place`: in the container."""
        return self.pod.works(rule, message, *self.place, *place)

    def advice(self, rule: str, message: str, *place: str | int) -> Finding:
        return self.pod.advice(rule, message, *self.place, *place)


def pods(document: Document) -> list[Pod]:
    """The pod templates of an object."""
    value, kind = document.value, document.kind
    if kind in _TEMPLATES:
        return [Pod(document, _TEMPLATES[kind], mapping(value, *_TEMPLATES[kind]))]
    if kind == "TrainJob" and is_of_known_runtime(document):
        return [_trainjobs_pod(document)]
    if kind == "PyTorchJob":
        way = ("spec", "pytorchReplicaSpecs")
        replicas = mapping(value, *way).items()
        return [Pod(document, (*way, name, "template"), mapping(one, "template"), True) for name, one in replicas]
    if kind == "InferenceService":
        return [pod for name in _OF_KSERVE for pod in _served(document, name)]
    return []


_OF_KSERVE = ("predictor", "transformer", "explainer")


def _served(document: Document, name: str) -> Iterator[Pod]:
    """A component of KServe: a pod's spec with KServe's own fields beside it, of which `model` is a container that a
    runtime completes."""
    part = mapping(document.value, "spec", name)
    if not part:
        return
    at: Place = ("spec", name)
    containers = list(sequence(part.get("containers")))
    model = mapping(part, "model")
    if model:
        for place, line in list(document.lines.items()):
            if place[:3] == (*at, "model"):
                document.lines.setdefault((*at, "containers", len(containers), *place[3:]), line)
        containers.append({"name": "kserve-container", "image": "", **model})
    yield Pod(document, at, {"spec": {**part, "containers": containers}}, inlined=True, from_runtime=bool(model))


def is_of_known_runtime(document: Document) -> bool:
    return mapping(document.value, "spec", "runtimeRef").get("name") == RUNTIME


def _trainjobs_pod(document: Document) -> Pod:
    """A node's pod, as the trainer and the patches of a TrainJob make it of the runtime that Kubeflow Trainer ships for
    torch, which says nothing of what is checked here."""
    trainer = mapping(document.value, "spec", "trainer")
    at: Place = ("spec", "trainer")
    template: Mapping[str, Any] = {}
    # in a runtime patch: the jobs of a TrainJob, of which `node` is the training
    way = ("trainingRuntimeSpec", "template", "spec")
    for number, patch in enumerate(sequence(mapping(document.value, "spec").get("runtimePatches"))):
        for index, job in enumerate(sequence(mapping(patch, *way).get("replicatedJobs"))):
            if mapping(job).get("name") == "node":
                at = ("spec", "runtimePatches", number, *way, "replicatedJobs", index, "template", "spec", "template")
                template = mapping(job, "template", "spec", "template")
    pod = mapping(template, "spec")
    containers = [dict(mapping(container)) for container in sequence(pod.get("containers"))] or [{"name": "node"}]
    index = next((number for number, one in enumerate(containers) if one.get("name") == "node"), 0)
    containers[index] |= {own: trainer[field] for field, own in _OF_TRAINER.items() if field in trainer}
    # findings name the lines of the trainer's fields
    for place, line in list(document.lines.items()):
        if place[:2] == ("spec", "trainer") and len(place) > 2 and place[2] in _OF_TRAINER:
            own = _OF_TRAINER[str(place[2])]
            document.lines.setdefault((*at, "spec", "containers", index, own, *place[3:]), line)
    return Pod(document, at, {**template, "spec": {**pod, "containers": containers}}, True, from_runtime=True)
