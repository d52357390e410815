"""YAML documents with the line of every field, so that a finding can name the place to mend."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zhllama.errors import InputError

Place = tuple[str | int, ...]
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
    value: Any = None
    lines: dict[Place, int] = field(default_factory=dict)
    repeated: list[Finding] = field(default_factory=list)
    """Of fields that are given twice in one mapping: all but the last are lost to every reader."""

    def line(self, place: Place = ()) -> int:
        while place not in self.lines:
            place = place[:-1]
        return self.lines[place]

    @property
    def kind(self) -> str:
        return str(self.value.get("kind", ""))

    @property
    def metadata(self) -> dict[str, Any]:
        found = self.value.get("metadata")
        return found if isinstance(found, dict) else {}

    @property
    def name(self) -> str:
        return str(self.metadata.get("name", ""))

    def error(self, rule: str, message: str, *place: str | int) -> Finding:
        return Finding(self.file, self.line(place), "error", rule, message)

    def warning(self, rule: str, message: str, *place: str | int) -> Finding:
        return Finding(self.file, self.line(place), "warning", rule, message)


def read_documents(path: Path) -> Iterator[Document | Finding]:
    """Every object of a YAML file, `List` objects taken apart; a Finding for what is no object, or no YAML. InputError
    when the file cannot be read."""
    import yaml

    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', 'not UTF-8')}; give YAML files") from error
    try:
        for node in yaml.compose_all(text, Loader=yaml.SafeLoader):
            yield from _documents(str(path), node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        yield Finding(str(path), line, "error", "yaml", f"not YAML: {getattr(error, 'problem', None) or error}")


def _documents(file: str, node: Any) -> Iterator[Document | Finding]:
    fields = {str(key.value): value for key, value in node.value} if node.id == "mapping" else {}
    items = fields.get("items")
    if "kind" in fields and fields["kind"].value == "List" and items is not None and items.id == "sequence":
        for item in items.value:
            yield from _documents(file, item)
        return
    document = Document(file)
    value = document.value = _value(node, (), document)
    named = [value.get(name) for name in ("kind", "apiVersion")] if isinstance(value, dict) else [None]
    if all(name and isinstance(name, str) for name in named):
        yield document
    elif value is not None:  # an empty document between two separators
        yield document.error("yaml", "not a Kubernetes object: it needs apiVersion and kind, each a text")


def _value(node: Any, place: Place, document: Document) -> Any:
    """The plain value of a composed node, as PyYAML's safe loader would have it; puts its lines into the document."""
    import yaml

    document.lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        return [_value(inner, (*place, index), document) for index, inner in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return yaml.SafeLoader("").construct_object(node)
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key is no text", problem_mark=key.start_mark)
        if key.value in seen and key.value != "<<":
            wrong = f"{dotted((*place, str(key.value)))} is given twice; keep one"
            document.repeated.append(Finding(document.file, key.start_mark.line + 1, "error", "yaml", wrong))
        seen.add(key.value)
    yaml.SafeLoader("").flatten_mapping(node)  # `<<: *anchor`
    found: dict[str, Any] = {}
    for key, inner in node.value:
        name = str(key.value)
        document.lines[(*place, name)] = key.start_mark.line + 1
        found[name] = _value(inner, (*place, name), document)
    return found


def dotted(place: Place) -> str:
    """`spec.containers[0].image`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place).removeprefix(".")
