"""The whole check: files or folders in, findings out, in the order of files and lines."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipelines.manifests.check.documents import Document, Finding, read_documents
from pipelines.manifests.check.pod_rules import Node
from pipelines.manifests.check.rules import check_rules
from pipelines.manifests.check.schema import NO_OBJECTS, Definitions, check_schema
from zhllama.errors import InputError
from zhllama.kubernetes.quantity import quantity


def check(paths: Sequence[Path], crds: Path | None = None, node: Node | None = None) -> list[Finding]:
    """Every finding of the objects in these files and folders. InputError for a path that is not there."""
    definitions = Definitions(crds)
    found: list[Finding] = []
    seen: dict[tuple[str, str, str], Document] = {}
    for file in _files(paths):
        for read in read_documents(file):
            if isinstance(read, Finding):
                found.append(read)
                continue
            if read.kind in NO_OBJECTS:
                continue
            wrong = list(check_schema(read, definitions))
            found += wrong
            found += _twice(read, seen)
            if not any(finding.level == "error" for finding in wrong):
                found += check_rules(read, node or Node())
    return sorted(found, key=lambda finding: (finding.file, finding.line, finding.rule))


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix in (".yaml", ".yml"))
            if not found:
                raise InputError(f"{path}: no YAML file is in it; give manifests to check")
            yield from found
        elif path.exists():
            yield path
        else:
            raise InputError(f"{path}: no such file or folder; give manifests to check")


def _twice(document: Document, seen: dict[tuple[str, str, str], Document]) -> Iterator[Finding]:
    namespace = str((document.value.get("metadata") or {}).get("namespace", ""))
    key = (document.kind, namespace, document.name)
    first = seen.setdefault(key, document)
    # what two manifests share word for word (a policy that both bring) may be applied twice
    if document.name and first.value != document.value:
        yield document.error(
            ("metadata", "name"), "twice",
            f"{document.kind} {document.name} stands in {first.file}:{first.line()} too: the later one wins",
        )  # fmt: skip


_NODE = {"cpu": "cpu", "memory": "memory", "ephemeral-storage": "ephemeral_storage", "gpus": "gpus"}


def node_of(text: str) -> Node:
    """`cpu=96,memory=1Ti,gpus=8`; what is not named is as large as machines come. InputError for what is none."""
    given: dict[str, float] = {}
    for part in filter(None, re.split(r"[,\s]+", text)):
        name, equals, value = part.partition("=")
        number = quantity(value)
        if not equals or name not in _NODE or number is None:
            raise InputError(f"--largest-node {part}: write {', '.join(f'{name}=…' for name in _NODE)}, as cpu=96")
        given[_NODE[name]] = number
    return Node(**given)
