"""YAML documents as the API server reads them, with the line of every field: a finding names the place to mend."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.manifests.check import go_yaml

Place = tuple[str | int, ...]
"""The way to a value: ("spec", "containers", 0, "image")."""
ADMISSION, WORKS, ADVICE = LEVELS = ("admission", "works", "advice")
"""How much a finding weighs: refused by the API server; accepted, and does not work; better otherwise."""


@dataclass(frozen=True)
class Finding:
    """Something wrong."""

    file: str
    line: int
    grade: str
    """One of LEVELS."""
    rule: str
    message: str

    def counts_at(self, level: str = WORKS) -> bool:
        """Whether it is an error to who asks for this level."""
        return LEVELS.index(self.grade) <= LEVELS.index(level)

    @property
    def level(self) -> str:
        """`error` or `warning`, at the level that is asked for unless another one is named."""
        return "error" if self.counts_at() else "warning"

    def said(self, level: str = WORKS) -> str:
        word = "error" if self.counts_at(level) else "warning"
        return f"{self.file}:{self.line}: {word} [{self.rule}] {self.message} ({self.grade})"

    def __str__(self) -> str:
        return self.said()


@dataclass
class Document:
    """One object of a file: plain data, and `line(place)`, the line of a field or of the nearest one around it."""

    file: str
    value: Any = None
    lines: dict[Place, int] = field(default_factory=dict)
    repeated: list[Finding] = field(default_factory=list)
    """Of fields that are given twice in one mapping: the server refuses the object."""

    def line(self, place: Place = ()) -> int:
        while place not in self.lines:
            place = place[:-1]
        return self.lines[place]

    @property
    def kind(self) -> str:
        return str(self.value.get("kind", ""))

    @property
    def api_version(self) -> str:
        return str(self.value.get("apiVersion", ""))

    @property
    def metadata(self) -> dict[str, Any]:
        found = self.value.get("metadata")
        return found if isinstance(found, dict) else {}

    @property
    def name(self) -> str:
        return str(self.metadata.get("name", ""))

    @property
    def is_pipeline(self) -> bool:
        """Of a compiled pipeline: its intermediate representation, or what it adds for a platform."""
        return "kind" not in self.value and bool({"pipelineInfo", "platforms"} & set(self.value))

    def found(self, grade: str, rule: str, message: str, *place: str | int) -> Finding:
        return Finding(self.file, self.line(place), grade, rule, message)

    def works(self, rule: str, message: str, *place: str | int) -> Finding:
        return self.found(WORKS, rule, message, *place)

    def advice(self, rule: str, message: str, *place: str | int) -> Finding:
        return self.found(ADVICE, rule, message, *place)


def read_text(path: Path) -> str | Finding:
    """`-` is standard input."""
    try:
        content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        return content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8"
        return Finding(str(path), 1, ADMISSION, "yaml", f"not readable: {why}; give YAML files")


def read_documents(path: Path) -> Iterator[Document | Finding]:
    """Every object of a YAML file, `List` objects taken apart; a Finding for what is no object, or no YAML."""
    text = read_text(path)
    if isinstance(text, Finding):
        yield text
        return
    # a pattern would look for each beginning's end, and there may be many without one
    helm = any("}}" in line.partition("{{")[2] for line in text.split("\n"))
    try:
        for node in go_yaml.compose(text):
            for read in _documents(str(path), node):
                if helm and isinstance(read, Finding):
                    raise go_yaml.NoYaml("", read.line)
                yield read
    except go_yaml.NoYaml as error:
        wrong = f"not YAML: {error}"
        if helm:
            wrong = "a template of Helm, not YAML yet: check what `helm template` makes of it"
        yield Finding(str(path), error.line, ADMISSION, "yaml", wrong)


def _documents(file: str, node: Any) -> Iterator[Document | Finding]:
    fields = {str(key.value): value for key, value in node.value} if node.id == "mapping" else {}
    items = fields.get("items")
    if "kind" in fields and str(fields["kind"].value).endswith("List") and items is not None and items.id == "sequence":
        for item in items.value:
            yield from _documents(file, item)
        return
    document = Document(file)
    value = document.value = go_yaml.value(node, lambda place, line: document.lines.setdefault(place, line))
    for place, line in go_yaml.repeated(node):
        wrong = f"{dotted(place)} is given twice; keep one"
        document.repeated.append(Finding(file, line, ADMISSION, "yaml", wrong))
    if value is None:  # an empty document between two separators
        return
    if not isinstance(value, dict):
        yield document.found(ADMISSION, "yaml", "not a Kubernetes object: it needs apiVersion and kind, each a text")
    elif document.is_pipeline or all(isinstance(value.get(name), str) and value[name] for name in _NAMED):
        yield document
    else:
        # a client that names the path may leave them out; kubectl cannot send it
        left_out = all(value.get(name, "") in (None, "") or isinstance(value[name], str) for name in _NAMED)
        wrong = "not a Kubernetes object: it needs apiVersion and kind, each a text"
        yield document.found(WORKS if left_out and set(value) & _OBJECTS else ADMISSION, "yaml", wrong)


_NAMED = ("apiVersion", "kind")
_OBJECTS = {"metadata", *_NAMED}


def dotted(place: Place) -> str:
    """`spec.containers[0].image`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place).removeprefix(".")


def mapping(value: Any, *way: str | int) -> Mapping[str, Any]:
    """The mapping at the end of the way, or an empty one where something else stands (the schema's finding, not a
    rule's)."""
    for name in way:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}
