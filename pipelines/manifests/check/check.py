"""The whole check: files or folders in, findings out, in the order of files and lines.

Each object is held to its schema, strictly (schema.py), and to rules: generators of findings, named as those are.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipelines.manifests.check import job_rules, pod_rules
from pipelines.manifests.check.documents import Document, Finding, read_documents
from pipelines.manifests.check.pod_rules import Node
from pipelines.manifests.check.pods import pods
from pipelines.manifests.check.schema import NO_OBJECTS, check_schema, definitions
from zhllama.errors import InputError
from zhllama.kubernetes.quantity import quantity


def check(paths: Sequence[Path], crds: Path | None = None, node: Node | None = None) -> list[Finding]:
    """Every finding of the objects in these files and folders. InputError for a path that is not there."""
    known = definitions(crds) if crds else {}
    found: list[Finding] = []
    seen: dict[tuple[str, str, str], Document] = {}
    for read in (read for file in _files(paths) for read in read_documents(file)):
        if isinstance(read, Finding):
            found.append(read)
        elif read.kind not in NO_OBJECTS:
            wrong = list(check_schema(read, known))
            found += [*wrong, *_twice(read, seen)]
            if not any(finding.level == "error" for finding in wrong):
                found += _check_rules(read, node or Node())
    return sorted(found, key=lambda finding: (finding.file, finding.line, finding.rule))


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such file or folder; give manifests to check")
        found = sorted(p for p in path.rglob("*") if p.suffix in (".yaml", ".yml")) if path.is_dir() else [path]
        if not found:
            raise InputError(f"{path}: no YAML file is in it; give manifests to check")
        yield from found


def _twice(document: Document, seen: dict[tuple[str, str, str], Document]) -> Iterator[Finding]:
    namespace = str(document.metadata.get("namespace", ""))
    first = seen.setdefault((document.kind, namespace, document.name), document)
    # what two manifests share word for word (a policy that both bring) may be applied twice
    if document.name and first.value != document.value:
        where = f"{document.kind} {document.name} stands in {first.file}:{first.line()} too"
        yield document.error("twice", f"{where}: the later one wins", "metadata", "name")


def _check_rules(document: Document, node: Node) -> Iterator[Finding]:
    """All that no schema says of one object."""
    for of_training in job_rules.OF_TRAININGS if document.kind in job_rules.TRAINING_KINDS else ():
        yield from of_training(document)
    yield from job_rules.queue_label(document)
    for pod in pods(document):
        for of_pod in pod_rules.OF_PODS:
            yield from of_pod(pod)
        yield from pod_rules.fits(pod, node)
        for container in pod.containers():
            for of_container in pod_rules.OF_CONTAINERS:
                yield from of_container(container)


_NODE = {"cpu": "cpu", "memory": "memory", "ephemeral-storage": "ephemeral_storage", "gpus": "gpus"}


def node_of(text: str) -> Node:
    """`cpu=96,memory=1Ti,gpus=8`; what is not named is as large as machines come. InputError for what is none."""
    given: dict[str, float] = {}
    for part in filter(None, re.split(r"[,\s]+", text)):
        name, _, value = part.partition("=")
        number = quantity(value)
        if name not in _NODE or number is None:
            raise InputError(f"--largest-node {part}: write {', '.join(f'{name}=…' for name in _NODE)}, as cpu=96")
        given[_NODE[name]] = number
    return Node(**given)
