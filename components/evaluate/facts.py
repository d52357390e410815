"""Questions with known answers, asked of every model: what it knows, and what of the base's knowledge it kept.

`questions/en.jsonl` and `zh.jsonl`, our own writing, 200 of each language: capitals, colours, opposites, sums up to
ten, days, animals, planets; what a model of 135 million parameters can know. A line is a question, its answer (`also`:
other ways to write it) and three wrong answers of its kind.

One scoring: the greedy answer by the chat template, TOKENS tokens of it, in which the known answer is named as a word,
before any of the wrong ones. Guessing is right about never, so that what a base knows is not luck by a quarter, as by
the likelihood of four choices; and it is what people see (SmolLM2 135M's figures: docs/evaluation.md).
"""

import json
import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from components.evaluate.answers import distinct, mostly_in
from zhllama.data.corpus import content_hash

TOKENS = 16
"""Of an answer: `The capital of France is Paris.` has 7."""
FOLDER = Path(__file__).with_name("questions")
_NUMERALS = "〇零一二三四五六七八九十百千万"


class Fact(NamedTuple):
    language: str
    """zh or en: of question and answer."""
    question: str
    answer: str
    wrong: tuple[str, ...]
    """Of the answer's kind."""
    also: tuple[str, ...] = ()
    """Other ways to write the answer."""

    @property
    def spoken(self) -> bool:
        """Whether its answer is words of its language: no number, no formula."""
        return mostly_in(self.language, self.answer)


def read_facts(language: str, count: int) -> list[Fact]:
    """The first `count` of a language in order of the SHA-256 of their question: of every kind, the same each time."""
    lines = (FOLDER / f"{language}.jsonl").read_text("utf-8").splitlines()
    facts = [
        Fact(language, one["question"], one["answer"], tuple(one["wrong"]), tuple(one.get("also", ())))
        for one in map(json.loads, lines)
    ]
    return sorted(facts, key=lambda fact: content_hash(fact.question))[:count]


def is_right(fact: Fact, said: str) -> bool:
    """Whether an answer names the known one, before any of the wrong ones."""
    text = _plain(said)
    at = [_place(one, text) for one in (fact.answer, *fact.also)]
    wrong = [_place(one, text) for one in fact.wrong]
    return min(at) < min(wrong, default=len(text) + 1) and min(at) <= len(text)


def _plain(text: str) -> str:
    """Full-width digits, small figures below the line and capitals as one writes them plainly."""
    return unicodedata.normalize("NFKC", text).casefold()


def _place(answer: str, text: str) -> int:
    """Where a plain text has an answer as a word; behind its end where it has not."""
    found = _word(answer).search(text)
    return found.start() if found else len(text) + 1


@cache
def _word(answer: str) -> re.Pattern[str]:
    """Chinese has no spaces: there an answer is found within other words, but a numeral in no other numeral."""
    text = _plain(answer)
    if all(letter in _NUMERALS for letter in text):
        beside = _NUMERALS
    else:
        beside = "a-z0-9" if text.isascii() else ""
    return re.compile(f"(?<![{beside}]){re.escape(text)}(?![{beside}])" if beside else re.escape(text))


def figures_of(facts: Sequence[Fact], said: Sequence[str], known: Sequence[bool] | None) -> dict[str, Any] | None:
    """The figures of one language, as report.json has them; None where nothing was asked. said: a model's answers;
    known: which of the facts the first baseline answered right, None where there is none."""
    if not facts:
        return None
    right = [is_right(fact, text) for fact, text in zip(facts, said, strict=True)]
    share = sum(right) / len(facts)
    of_words = [mostly_in(fact.language, text) for fact, text in zip(facts, said) if fact.spoken]
    kept = None if known is None else sum(one and before for one, before in zip(right, known, strict=True))
    return {
        "items": len(facts),
        "right": sum(right),
        "accuracy": share,
        "margin": 1.96 * (share * (1 - share) / len(facts)) ** 0.5,
        "known": None if known is None else sum(known),
        "kept": kept,
        "kept_share": kept / sum(known) if known and sum(known) and kept is not None else None,
        "in_language": sum(of_words) / len(of_words) if of_words else None,
        "distinct": distinct(said),
    }
