"""A place in an object, and what stands there: what rules walk over. Reading it raises nothing, whatever it is."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipelines.manifests.check.documents import ADMISSION, Document, Finding, Place, dotted


@dataclass(frozen=True)
class Field:
    document: Document
    place: Place = ()
    value: Any = None
    grade: str = ADMISSION
    """Of findings in it: the pods of a job are refused after the job was accepted."""
    inlined: str = ""
    """A field that stands here itself: its fields are beside the others."""

    def __getitem__(self, name: str | int) -> "Field":
        inner = self.value.get(name) if isinstance(self.value, dict) else None
        place = self.place if self.inlined and name == self.inlined else (*self.place, name)
        return Field(self.document, place, inner, self.grade)

    def __bool__(self) -> bool:
        """Something is there."""
        return self.value is not None

    def each(self, name: str) -> Iterator["Field"]:
        """The mappings of a list."""
        return (one for one in self[name].items() if isinstance(one.value, dict))

    def items(self) -> Iterator["Field"]:
        """What is in a list."""
        for index, inner in enumerate(self.value if isinstance(self.value, list) else ()):
            yield Field(self.document, (*self.place, index), inner, self.grade)

    def text(self, name: str) -> str:
        inner = self[name].value
        return inner if isinstance(inner, str) else ""

    def list(self, name: str) -> list[Any]:
        inner = self[name].value
        return inner if isinstance(inner, list) else []

    def number(self, name: str) -> int | None:
        inner = self[name].value
        return inner if isinstance(inner, int) and not isinstance(inner, bool) else None

    def mapping(self, name: str) -> dict[str, Any]:
        inner = self[name].value
        return inner if isinstance(inner, dict) else {}

    def names(self) -> set[str]:
        """Of the fields that are given."""
        given = self.value.items() if isinstance(self.value, dict) else ()
        return {name for name, inner in given if inner is not None}

    def wrong(self, message: str, rule: str = "validation") -> Finding:
        said = f"{dotted(self.place) or 'the object'}: {message}"
        return Finding(self.document.file, self.document.line(self.place), self.grade, rule, said)
