"""The whole check: files or folders in, findings out, in the order of files and lines.

Each object is held to what the API server decodes and validates (server/, schema.py), to what admits its pods
(pod_security.py), to the webhooks of training jobs, and to rules of our own: generators of findings.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.manifests.check import job_rules, pod_rules
from pipelines.manifests.check.compiled import TEMPLATE, check_pipeline
from pipelines.manifests.check.documents import ADMISSION, WORKS, Document, Finding, mapping, read_documents
from pipelines.manifests.check.field import Field
from pipelines.manifests.check.kustomize import NO_OBJECTS, patches
from pipelines.manifests.check.pod_rules import Node
from pipelines.manifests.check.pod_security import pod_security as held_to_standard
from pipelines.manifests.check.pods import Pod, pods, sequence
from pipelines.manifests.check.schema import check_custom, definitions
from pipelines.manifests.check.server.metadata import object_metadata
from pipelines.manifests.check.server.types import VERSION, check_own, check_part, is_own
from pipelines.manifests.check.server.types import definitions as types
from zhllama.errors import InputError
from zhllama.kubernetes.formats import amount


def check(
    paths: Sequence[Path],
    crds: Path | None = None,
    node: Node | None = None,
    pod_security: str = "restricted",
    version: str = VERSION,
    namespace: str = "",
) -> list[Finding]:
    """Every finding of the objects in these files and folders. InputError for a path that is not there.

    `pod_security`: the standard of the objects' namespace; `namespace`: the one that `kubectl -n` names.
    """
    known = definitions(crds) if crds else {}
    types(version)
    found: list[Finding] = []
    seen: dict[tuple[str, str, str], Document] = {}
    executors: dict[str, Mapping[str, Any]] = {}
    for path in paths:
        before, objects = len(found), 0
        for file in _files(path):
            for read in read_documents(file):
                objects += 1
                if isinstance(read, Finding):
                    found.append(read)
                elif read.is_pipeline:
                    found += [*read.repeated, *check_pipeline(read, version, executors, pod_security)]
                elif read.kind not in NO_OBJECTS:
                    found += _check_object(read, known, version, namespace)
                    found += _twice(read, seen)
                    found += _check_rules(read, node or Node(), pod_security, version, bool(known))
        if not objects and len(found) == before:
            found.append(Finding(str(path), 1, ADMISSION, "yaml", "no object is in it; give manifests to check"))
    return sorted(dict.fromkeys(found), key=lambda finding: (finding.file, finding.line, finding.rule))


def _files(path: Path) -> Iterator[Path]:
    if str(path) == "-":
        yield path
        return
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; give manifests to check")
    found = sorted(filter(_is_yaml, path.rglob("*"))) if path.is_dir() else [path]
    if not found:
        raise InputError(f"{path}: no YAML file is in it; give manifests to check")
    no_objects = patches(path) if path.is_dir() else set()
    yield from (file for file in found if file.resolve() not in no_objects)


def _is_yaml(path: Path) -> bool:
    """Of what is in a folder; a pipe or a device, which may have no end, is no manifest unless it is named."""
    return path.suffix in (".yaml", ".yml") and (path.is_file() or path.is_dir() or not path.exists())


def _check_object(
    document: Document, known: Mapping[tuple[str, str], dict[str, Any]], version: str, namespace: str
) -> Iterator[Finding]:
    """What the server says before it makes the object."""
    yield from document.repeated
    if is_own(document, version):
        yield from check_own(document, version)
        yield from object_metadata(Field(document, value=document.value)["metadata"], document.kind)
    else:
        yield from check_custom(document, known, version)
    own = document.metadata.get("namespace")
    if namespace and isinstance(own, str) and own and own != namespace:
        wrong = f"{own} is another namespace than --namespace {namespace}"
        yield Field(document, value=document.value)["metadata"]["namespace"].wrong(wrong)


def _twice(document: Document, seen: dict[tuple[str, str, str], Document]) -> Iterator[Finding]:
    space = str(document.metadata.get("namespace", ""))
    first = seen.setdefault((document.kind, space, document.name), document)
    # what two manifests share word for word (a policy that both bring) may be applied twice
    if document.name and first.value != document.value:
        where = f"{document.kind} {document.name} stands in {first.file}:{first.line()} too"
        yield document.works("twice", f"{where}: the later one wins", "metadata", "name")


def _check_rules(document: Document, node: Node, standard: str, version: str, defined: bool) -> Iterator[Finding]:
    """What its webhook says of the object, what its pods meet, and what is better otherwise."""
    for of_training in job_rules.OF_TRAININGS if document.kind in job_rules.TRAINING_KINDS else ():
        yield from of_training(document)
    yield from job_rules.queue_label(document)
    yield from job_rules.pods_metadata(document)
    for pod in pods(document):
        if not is_own(document, version):
            yield from _made_later(pod, version, defined)
        if not pod.from_runtime or document.kind == "TrainJob":
            yield from held_to_standard(pod.field, standard)
        for of_pod in pod_rules.OF_PODS:
            yield from of_pod(pod)
        yield from pod_rules.fits(pod, node)
        for container in pod.containers():
            for of_container in pod_rules.OF_CONTAINERS:
                yield from of_container(container)


def _made_later(pod: Pod, version: str, defined: bool) -> Iterator[Finding]:
    """What the server will say of the pods of a custom resource, when its operator makes them."""
    spec_fields = types(version)["io.k8s.api.core.v1.PodSpec"]["properties"]
    container_fields = types(version)["io.k8s.api.core.v1.Container"]["properties"]
    spec = {name: value for name, value in pod.spec.items() if name in spec_fields or not pod.inlined}
    if pod.document.kind == "PyTorchJob":
        spec.pop("restartPolicy", None)  # the replica's takes its place
    for kind in ("containers", "initContainers") if pod.from_runtime else ():
        own = [mapping(one) for one in sequence(spec.get(kind))]
        there = [{name: value for name, value in one.items() if name in container_fields and value} for one in own]
        spec[kind] = [{"image": "of-the-runtime", **one} for one in there]
    value = {"metadata": pod.value.get("metadata"), "spec": spec}
    field = Field(pod.document, pod.at, value, WORKS, "spec" if pod.inlined else "")
    for found in check_part(field, TEMPLATE, version):
        if found.rule != "schema" or not defined:  # which the definition has said
            yield found


_NODE = {"cpu": "cpu", "memory": "memory", "ephemeral-storage": "ephemeral_storage", "gpus": "gpus"}


def node_of(text: str) -> Node:
    """`cpu=96,memory=1Ti,gpus=8`; what is not named is as large as machines come. InputError for what is none."""
    given: dict[str, float] = {}
    for part in filter(None, re.split(r"[,\s]+", text)):
        name, _, value = part.partition("=")
        number = amount(value)
        if name not in _NODE or number is None:
            raise InputError(f"--largest-node {part}: write {', '.join(f'{name}=…' for name in _NODE)}, as cpu=96")
        given[_NODE[name]] = float(number)
    return Node(**given)
