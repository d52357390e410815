"""Folders of kustomize: what a kustomization names as a patch is a part of an object, and no object."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zhllama.artifacts.yaml_file import documents_of

NO_OBJECTS = ("Kustomization", "Component")
"""Kinds that kustomize reads and no cluster sees."""
_NAMES = ("kustomization.yaml", "kustomization.yml", "Kustomization")
_LISTS = ("patchesStrategicMerge", "transformers", "generators", "validators", "configurations", "crds")
_OF_PATHS = ("patches", "patchesJson6902", "replacements")
_GENERATORS = ("configMapGenerator", "secretGenerator")


def patches(folder: Path) -> set[Path]:
    """The files below a folder that its kustomizations name, and that are no objects."""
    found: set[Path] = set()
    for path in folder.rglob("*"):
        if path.name in _NAMES and path.is_file():
            found |= {(path.parent / name).resolve() for name in _named(path)}
    return found


def _named(path: Path) -> Iterator[str]:
    try:
        documents = documents_of(path.read_bytes())
    except (OSError, ValueError):
        return  # the check of the file says so
    value: Any = documents[0] if documents and isinstance(documents[0], dict) else {}

    def items(name: str) -> list[Any]:
        there = value.get(name)
        return there if isinstance(there, list) else []

    for name in _LISTS:
        yield from (one for one in items(name) if isinstance(one, str) and "\n" not in one)
    for name in _OF_PATHS:
        yield from (one["path"] for one in items(name) if isinstance(one, dict) and isinstance(one.get("path"), str))
    for name in _GENERATORS:
        for one in items(name):
            for file in (one.get("files") or []) if isinstance(one, dict) else []:
                yield str(file).rpartition("=")[2]
    for chart in items("helmCharts"):
        if isinstance(chart, dict) and isinstance(chart.get("valuesFile"), str):
            yield chart["valuesFile"]
