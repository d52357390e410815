"""YAML documents with the line of every field, so that a finding can name the place to mend."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zhllama.errors import InputError

Step = str | int
Place = tuple[Step, ...]
"""The way to a value: ("spec", "containers", 0, "image")."""


@dataclass(frozen=True)
class Finding:
    """Something wrong (level "error": it will not be admitted, or not work; "warning": it deserves a look)."""

    file: str
    line: int
    level: str
    rule: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.level} [{self.rule}] {self.message}"


@dataclass
class Document:
    """One object of a file: plain data, and `line(place)`, the line of a field or of the nearest one around it."""

    file: str
    value: Any
    lines: dict[Place, int]
    repeated: list[tuple[Place, int]] = field(default_factory=list)
    """Fields that are given twice in one mapping: all but the last are lost to every reader."""

    def line(self, place: Place = ()) -> int:
        while place not in self.lines:
            place = place[:-1]
        return self.lines[place]

    @property
    def kind(self) -> str:
        return str(self.value.get("kind", ""))

    @property
    def name(self) -> str:
        return str((self.value.get("metadata") or {}).get("name", ""))

    def error(self, place: Place, rule: str, message: str) -> Finding:
        return Finding(self.file, self.line(place), "error", rule, message)

    def warning(self, place: Place, rule: str, message: str) -> Finding:
        return Finding(self.file, self.line(place), "warning", rule, message)


def read_documents(path: Path) -> Iterator[Document | Finding]:
    """Every object of a YAML file, `List` objects taken apart; a Finding for what is no object, or no YAML.

    InputError when the file cannot be read.
    """
    import yaml

    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InputError(f"{path}: {reason}; give YAML files") from error
    try:
        for node in yaml.compose_all(text, Loader=yaml.SafeLoader):
            yield from _documents(str(path), node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        yield Finding(str(path), line, "error", "yaml", f"not YAML: {getattr(error, 'problem', None) or error}")


def _documents(file: str, node: Any) -> Iterator[Document | Finding]:
    fields = {key.value: value for key, value in node.value} if node.id == "mapping" else {}
    items = fields.get("items")
    if "kind" in fields and fields["kind"].value == "List" and items is not None and items.id == "sequence":
        for item in items.value:
            yield from _documents(file, item)
        return
    lines: dict[Place, int] = {}
    repeated: list[tuple[Place, int]] = []
    value = _value(node, (), lines, repeated)
    if value is None:  # an empty document between two separators
        return
    line = node.start_mark.line + 1
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str) or not value.get("apiVersion"):
        yield Finding(file, line, "error", "yaml", "not a Kubernetes object: apiVersion and kind are missing")
        return
    yield Document(file, value, lines, repeated)


def _value(node: Any, place: Place, lines: dict[Place, int], repeated: list[tuple[Place, int]]) -> Any:
    """The plain value of a composed node, as PyYAML's safe loader would have it."""
    import yaml

    lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        loader = yaml.SafeLoader("")
        seen = {key.value for key, _ in node.value}
        if len(seen) < len(node.value):
            repeated.extend(_twice(node, place))
        loader.flatten_mapping(node)  # `<<: *anchor`
        found: dict[str, Any] = {}
        for key, inner in node.value:
            lines[(*place, str(key.value))] = key.start_mark.line + 1
            found[str(key.value)] = _value(inner, (*place, str(key.value)), lines, repeated)
        return found
    if isinstance(node, yaml.SequenceNode):
        return [_value(inner, (*place, index), lines, repeated) for index, inner in enumerate(node.value)]
    return yaml.SafeLoader("").construct_object(node)


def _twice(node: Any, place: Place) -> Iterator[tuple[Place, int]]:
    seen = set()
    for key, _ in node.value:
        if key.value in seen and key.value != "<<":
            yield (*place, str(key.value)), key.start_mark.line + 1
        seen.add(key.value)
