"""What requests ask for and what is taken of the answers: catalogue.yaml, or a file of the user's in its place.

What depends on the language of the data is in that file, so that data in another language needs no code. But for two
things: the line before the examples of --seeds is Chinese (request.py; its text is part of the key that answers are
kept under), and the words that mean "no input" are Chinese and English (validate.py).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

from zhllama.errors import InputError

SCRIPTS = {
    "han": ("\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af", False),
    "kana": ("\u3040-\u30ff", False),
    "hangul": ("\uac00-\ud7af\u1100-\u11ff", False),
    "latin": ("A-Za-z\u00c0-\u024f", True),
    "cyrillic": ("\u0400-\u052f", True),
    "arabic": ("\u0600-\u06ff\u0750-\u077f", True),
}
"""Name → the characters, and whether a run of them counts as one (a word)."""
FILLED_IN = ("count", "language", "topics", "task_types", "input", "output")
"""The places of the request's text."""


@dataclass(frozen=True)
class Catalogue:
    """A catalogue that was read and checked. Lengths are in characters."""

    language: str
    script: str
    share: float
    asked: Mapping[str, int]
    """Numbers of topics, task_types and examples in a request; lengths of input and output that it asks for."""
    accepted: Mapping[str, tuple[int, int]]
    """Field of an item → shortest and longest."""
    request: str
    topics: Sequence[str]
    task_types: Sequence[str]
    refusals: Sequence[re.Pattern[str]] = field(default_factory=tuple)
    self_mentions: Sequence[re.Pattern[str]] = field(default_factory=tuple)


def load_catalogue(content: bytes | None = None, where: str = "catalogue.yaml") -> Catalogue:
    """The project's own catalogue, or the one in `content`. InputError names what is missing or wrong in it."""
    import yaml

    if content is None:
        content = (Path(__file__).parent / "catalogue.yaml").read_bytes()
    try:
        value = yaml.safe_load(content)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: not YAML ({error}); mend it") from error
    return _Checked(value, where).catalogue()


class _Checked:
    """Takes a catalogue out of a YAML value, and says which part is not what it must be."""

    def __init__(self, value: Any, where: str) -> None:
        self._value, self._where = value, where
        if not isinstance(value, dict):
            raise self._wrong("the file", "a mapping")
        known = {"language", "asked", "accepted", "request", "topics", "task_types", "refusals", "self_mentions"}
        if unknown := sorted(set(map(str, value)) - known):
            raise InputError(f"{where}: {unknown[0]} is not known; there are {', '.join(sorted(known))}")

    def catalogue(self) -> Catalogue:
        language = self._mapping("language", ("name", "script", "share"))
        script, share = language["script"], language["share"]
        if script not in (*SCRIPTS, "any"):
            raise self._wrong("language.script", f"one of {', '.join(SCRIPTS)}, any")
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise self._wrong("language.share", "a number between 0 and 1")
        asked = self._mapping("asked", ("topics", "task_types", "examples", "input", "output"))
        for name, number in asked.items():
            if isinstance(number, bool) or not isinstance(number, int) or number < (name not in ("examples", "input")):
                raise self._wrong(f"asked.{name}", "a whole number above 0")
        accepted = self._mapping("accepted", ("instruction", "input", "output"))
        return Catalogue(
            language=str(language["name"]),
            script=script,
            share=float(share),
            asked=asked,
            accepted={name: self._range(f"accepted.{name}", value) for name, value in accepted.items()},
            request=self._request(),
            topics=self._texts("topics", 1),
            task_types=self._texts("task_types", 1),
            refusals=self._patterns("refusals"),
            self_mentions=self._patterns("self_mentions"),
        )

    def _wrong(self, name: str, wanted: str) -> InputError:
        return InputError(f"{self._where}: {name} must be {wanted}; mend it, or copy the project's catalogue.yaml")

    def _mapping(self, name: str, fields: tuple[str, ...]) -> dict[str, Any]:
        value = self._value.get(name)
        if not isinstance(value, dict) or set(value) != set(fields):
            raise self._wrong(name, f"a mapping of {', '.join(fields)}")
        return value

    def _range(self, name: str, value: Any) -> tuple[int, int]:
        right = isinstance(value, list) and len(value) == 2 and all(type(end) is int and end >= 0 for end in value)
        if not right or value[0] > value[1]:
            raise self._wrong(name, "[shortest, longest]")
        return value[0], value[1]

    def _texts(self, name: str, least: int) -> tuple[str, ...]:
        value = self._value.get(name)
        if not isinstance(value, list) or len(value) < least or not all(isinstance(one, str) and one for one in value):
            raise self._wrong(name, "a list of texts")
        if len(set(value)) < len(value):
            raise self._wrong(name, "a list without repetitions")
        return tuple(value)

    def _patterns(self, name: str) -> tuple[re.Pattern[str], ...]:
        found = []
        for text in self._texts(name, 0):
            try:
                found.append(re.compile(text))
            except re.error as error:
                raise InputError(f"{self._where}: {name}: {text!r} is no regular expression ({error})") from error
        return tuple(found)

    def _request(self) -> str:
        text = self._value.get("request")
        if not isinstance(text, str):
            raise self._wrong("request", "a text")
        try:
            Template(text).substitute(dict.fromkeys(FILLED_IN, ""))
        except (KeyError, ValueError) as error:
            raise self._wrong("request", f"a text with ${', $'.join(FILLED_IN)} alone ({error})") from error
        for name in ("count", "topics", "task_types"):
            if f"${name}" not in text and f"${{{name}}}" not in text:
                raise self._wrong("request", f"a text that names ${name}")
        return text
