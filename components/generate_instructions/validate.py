"""The rules that an item must keep, one after another; an item falls at the first that it breaks, and is counted there.

The rules' lengths, phrases and script are the catalogue's. They are cheap and certain; what they cannot see (a wrong
answer) they do not guess at.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from components.generate_instructions.catalogue import SCRIPTS, Catalogue
from components.generate_instructions.parse import CUT_OFF
from zhllama.data.instructions import FIELDS

RULES = {
    "cut off": "the answer ended inside the item",
    "unreadable": "not an object whose instruction, input and output are texts",
    "no instruction": "the instruction is missing or empty",
    "no output": "the output is missing or empty",
    "instruction length": "the instruction is shorter or longer than the catalogue allows",
    "input length": "the input is longer than the catalogue allows",
    "output length": "the output is shorter or longer than the catalogue allows",
    "refusal": "the output refuses",
    "speaks as a model": "a field speaks of its author as a model",
    "language": "too little of instruction and output is in the catalogue's script",
    "exact duplicate": "the question was there already, token for token",
    "near duplicate": "its question has a ROUGE-L over 0.7 to one that was there",
}
"""Every rule, in the order they are applied, and what it says of an item that falls at it."""
UNNAMED = "(none named)"
"""The topic and the task type of an item that names none of its request's."""
_NO_INPUT = re.compile(r"[（(<\[【]?(无|没有|无输入|none|n/?a|no ?input|null|空)[）)>\]】]?[。.]?", re.IGNORECASE)
"""What models write into a field that they were told to leave empty."""


@dataclass(frozen=True)
class Judged:
    """An item with its three fields, stripped; or the rule that it broke. topic and task_type: numbers, 0 for none."""

    item: Mapping[str, str]
    rule: str = ""
    topic: int = 0
    task_type: int = 0


def judged(value: Any, catalogue: Catalogue) -> Judged:
    """One value out of an answer or a data set, against every rule but the two of duplicates."""
    if value is CUT_OFF:
        return Judged({}, "cut off")
    if not isinstance(value, dict):
        return Judged({}, "unreadable")
    for field, rule in (("instruction", "no instruction"), ("output", "no output")):
        if value.get(field) is None:
            return Judged({}, rule)
    fields = {field: value.get(field) or "" for field in FIELDS}
    if not all(isinstance(content, str) and _is_text(content) for content in fields.values()):
        return Judged({}, "unreadable")
    item = {field: content.strip() for field, content in fields.items()}
    if _NO_INPUT.fullmatch(item["input"]):
        item["input"] = ""
    rule = next((name for name, broken in _CHECKS.items() if broken(item, catalogue)), "")
    return Judged(item, rule, _number(value.get("topic")), _number(value.get("task_type")))


def _is_text(content: str) -> bool:
    """Without half a surrogate pair, which JSON can write and no file can hold, and without the sign that stands for
    what was lost on the way."""
    return not any("\ud800" <= sign <= "\udfff" or sign == "\ufffd" for sign in content)


def _number(value: Any) -> int:
    return value if type(value) is int and value > 0 else 0


def _length(field: str) -> Callable[[Mapping[str, str], Catalogue], bool]:
    def broken(item: Mapping[str, str], catalogue: Catalogue) -> bool:
        shortest, longest = catalogue.accepted[field]
        return not shortest <= len(item[field]) <= longest

    return broken


_CHECKS: dict[str, Callable[[Mapping[str, str], Catalogue], bool]] = {
    "no instruction": lambda item, _: not item["instruction"],
    "no output": lambda item, _: not item["output"],
    "instruction length": _length("instruction"),
    "input length": _length("input"),
    "output length": _length("output"),
    "refusal": lambda item, catalogue: any(pattern.match(item["output"]) for pattern in catalogue.refusals),
    "speaks as a model": lambda item, catalogue: any(
        pattern.search(content) for pattern in catalogue.self_mentions for content in item.values()
    ),
    "language": lambda item, catalogue: (
        share_of(catalogue.script, f"{item['instruction']}\n{item['output']}") < catalogue.share
    ),
}


def share_of(script: str, text: str) -> float:
    """How much of a text is of a script, 0 to 1: characters of scripts without word spaces, words of the others.

    1 for a text without a letter (a sum, a table of numbers), and for the script "any".
    """
    if script == "any":
        return 1.0
    units = _units().findall(text)
    if not units:
        return 1.0
    mine = re.compile(f"[{SCRIPTS[script][0]}]")
    return sum(1 for unit in units if mine.match(unit)) / len(units)


@lru_cache(maxsize=1)
def _units() -> re.Pattern[str]:
    alone = "".join(characters for characters, word in SCRIPTS.values() if not word)
    words = "".join(characters for characters, word in SCRIPTS.values() if word)
    other = f"[^\\W\\d_{alone}{words}]+"
    return re.compile(f"[{alone}]|[{words}]+(?:['’-][{words}]+)*|{other}")
