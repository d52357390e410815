"""What is asked and what is taken of the answers: catalogue.yaml, or a file of the user's in its place.

Request number n is made of the seed and its number alone, so that a run that goes on asks what it would have asked.
What depends on the language is in the catalogue, but for the line before the examples of --seeds (Chinese; part of the
answers' key) and the words that mean "no input" (harvest.py: Chinese and English).
"""

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from zhllama.artifacts.yaml_file import documents_of
from zhllama.errors import InputError
from zhllama.tokenizer.han import HAN

SCRIPTS = {
    "han": (HAN, False),
    "kana": ("\u3040-\u30ff", False),
    "hangul": ("\uac00-\ud7af\u1100-\u11ff", False),
    "latin": ("A-Za-z\u00c0-\u024f", True),
    "cyrillic": ("\u0400-\u052f", True),
    "arabic": ("\u0600-\u06ff\u0750-\u077f", True),
}
"""Name → the characters, and whether a run of them counts as one (a word)."""
FILLED_IN = ("count", "language", "topics", "task_types", "input", "output")
"""The places of the request's text."""
MAPPINGS = {
    "language": ("name", "script", "share"),
    "asked": ("topics", "task_types", "examples", "input", "output"),
    "accepted": ("instruction", "input", "output"),
}
LISTS = ("topics", "task_types", "refusals", "self_mentions")
MESSAGE_OVERHEAD = 64
"""Tokens that a chat template puts around one message, at most."""
_FIELDS = {
    **{name: {"type": "integer"} for name in ("topic", "task_type")},
    **{name: {"type": "string"} for name in MAPPINGS["accepted"]},
}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


SCHEMA: dict[str, Any] = {
    "name": "instructions",
    "strict": True,
    "schema": _object({"items": {"type": "array", "items": _object(_FIELDS)}}),
}
"""The answer's form, as structured output wants it: strict, every field required, nothing else."""


@dataclass(frozen=True)
class Catalogue:
    """A catalogue that was read and checked. Lengths are in characters."""

    language: Mapping[str, Any]
    """name, script, and the least share of it."""
    asked: Mapping[str, int]
    """Numbers of topics, task_types and examples in a request; lengths of input and output that it asks for."""
    accepted: Mapping[str, Sequence[int]]
    """Field of an item → shortest and longest."""
    request: str
    topics: Sequence[str]
    task_types: Sequence[str]
    refusals: Sequence[re.Pattern[str]]
    self_mentions: Sequence[re.Pattern[str]]


def load_catalogue(content: bytes | None = None, where: str = "catalogue.yaml") -> Catalogue:
    """The project's own catalogue, or the one in `content`. InputError names what is missing or wrong in it."""
    if content is None:
        content = (Path(__file__).parent / "catalogue.yaml").read_bytes()
    try:
        value, *more = documents_of(content) or [None]
        if more:
            raise ValueError("it holds several documents")
    except ValueError as error:
        raise InputError(f"{where}: not YAML ({error}); mend it") from error
    known = {*MAPPINGS, *LISTS, "request"}
    if isinstance(value, dict) and (unknown := sorted(set(map(str, value)) - known)):
        raise InputError(f"{where}: {unknown[0]} is not known; there are {', '.join(sorted(known))}")
    for name, wanted in _faults(value):
        raise InputError(f"{where}: {name} must be {wanted}; mend it, or copy the project's catalogue.yaml")
    for name in ("refusals", "self_mentions"):
        try:
            value[name] = [re.compile(text) for text in value[name]]
        except re.error as error:
            raise InputError(f"{where}: {name}: {error.pattern!r} is no regular expression ({error})") from error
    return Catalogue(**value)


def _faults(value: Any) -> Iterator[tuple[str, str]]:
    """What is not as it must be, and how that is; whoever goes on after one has no use for the next."""
    if not isinstance(value, dict):
        yield "the file", "a mapping"
    for name, fields in MAPPINGS.items():
        if not isinstance(value.get(name), dict) or set(value[name]) != set(fields):
            yield name, f"a mapping of {', '.join(fields)}"
    language = value["language"]
    if language["script"] not in (*SCRIPTS, "any"):
        yield "language.script", f"one of {', '.join(SCRIPTS)}, any"
    if type(language["share"]) not in (int, float) or not 0 <= language["share"] <= 1:
        yield "language.share", "a number between 0 and 1"
    for name, number in value["asked"].items():
        if type(number) is not int or number < (name not in ("examples", "input")):
            yield f"asked.{name}", "a whole number above 0"
    for name, ends in value["accepted"].items():
        if not isinstance(ends, list) or list(map(type, ends)) != [int, int] or not 0 <= ends[0] <= ends[1]:
            yield f"accepted.{name}", "[shortest, longest]"
    for name in LISTS:
        texts = value.get(name)
        right = isinstance(texts, list) and (texts or name in ("refusals", "self_mentions"))
        if not right or not all(isinstance(text, str) and text for text in texts):
            yield name, "a list of texts"
        if len(set(texts)) < len(texts):
            yield name, "a list without repetitions"
    text = value.get("request")
    if not isinstance(text, str):
        yield "request", "a text"
    try:
        Template(text).substitute(dict.fromkeys(FILLED_IN, ""))
    except (KeyError, ValueError) as error:
        yield "request", f"a text with ${', $'.join(FILLED_IN)} alone ({error})"
    for name in ("count", "topics", "task_types"):
        if f"${name}" not in text and f"${{{name}}}" not in text:
            yield "request", f"a text that names ${name}"


@dataclass(frozen=True)
class Request:
    """Its messages, and the topics and task types in the order it numbers them, from 1."""

    messages: list[dict[str, str]]
    topics: tuple[str, ...]
    task_types: tuple[str, ...]

    @property
    def most_prompt_tokens(self) -> int:
        """No tokenizer makes more tokens of a text than it has bytes; the schema may be put into the prompt too."""
        texts = [*(message["content"] for message in self.messages), json.dumps(SCHEMA)]
        return sum(len(text.encode()) for text in texts) + MESSAGE_OVERHEAD * len(self.messages)


@dataclass(frozen=True)
class Requests:
    """All requests there can be: `requests[n]` for n = 0, 1, …, each for `count` items."""

    catalogue: Catalogue
    count: int
    seeds: Sequence[Mapping[str, str]]
    seed: int

    def __getitem__(self, number: int) -> Request:
        chance = random.Random(f"{self.seed}/{number}")
        asked = self.catalogue.asked

        def drawn(name: str, some: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(chance.sample(some, min(asked[name], len(some))))

        topics, types = drawn("topics", self.catalogue.topics), drawn("task_types", self.catalogue.task_types)
        numbered = {"topics": _numbered(topics), "task_types": _numbered(types)}
        language = self.catalogue.language["name"]
        text = Template(self.catalogue.request).substitute({**asked, **numbered}, count=self.count, language=language)
        if shown := drawn("examples", self.seeds):
            text += "\n例子（不要照抄）：\n" + "\n".join(json.dumps(dict(one), ensure_ascii=False) for one in shown)
        return Request([{"role": "user", "content": text.strip()}], topics, types)


def _numbered(names: Sequence[str]) -> str:
    return "\n".join(f"{number}. {name}" for number, name in enumerate(names, start=1))
