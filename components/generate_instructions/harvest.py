"""Items out of answers: found leniently, each held to the rules, in the order of the requests' numbers.

Every object that reads as JSON is taken where it begins; one that does not, but closes, goes through json_repair; one
that never closes was cut off, and is counted and left. An item falls at the first rule that it breaks; the rules guess
at nothing. The order that near duplicates are looked at in is fixed, whatever order the answers came in.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from components.generate_instructions.catalogue import SCRIPTS, Catalogue
from components.generate_instructions.dedup import Seen, question
from components.generate_instructions.thoughts import without_thoughts
from zhllama.data.conversations import FIELDS, Item, texts_of
from zhllama.errors import InputError

RULES = {
    "cut off": "the answer ended inside the item",
    "unreadable": "not an object whose instruction, input and output are texts",
    "conversation": "its turns are not a user's and an assistant's by turns, or hold more than text",
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
SAMPLES = 3
"""Of what fell at a rule, for the card."""
_NO_INPUT = re.compile(r"[（(<\[【]?(无|没有|无输入|none|n/?a|no ?input|null|空)[）)>\]】]?[。.]?", re.IGNORECASE)
"""What models write into a field that they were told to leave empty."""
_LOST = re.compile("[\ud800-\udfff\ufffd]")
_ALONE, _WORDS = ("".join(characters for characters, word in SCRIPTS.values() if word is one) for one in (False, True))
_UNIT = re.compile(f"[{_ALONE}]|[{_WORDS}]+(?:['’-][{_WORDS}]+)*|[^\\W\\d_{_ALONE}{_WORDS}]+")

PASSES, MOST_STEPS = 10, 2_000_000
"""How much of an answer is looked at sign by sign for what is broken: ten times its length, and never more than a
second's work. What is left then is left unread: an answer made of braces must not hold up the others."""
CUT_OFF = object()
"""Stands for an object that begins and never ends."""
_decoder = json.JSONDecoder(strict=False)


@dataclass
class Harvest:
    """The items that were kept, and what became of the others. wanted: 0 for as many as come."""

    catalogue: Catalogue
    seen: Seen
    wanted: int = 0
    items: list[Item] = field(default_factory=list)
    topics: Counter[str] = field(default_factory=Counter)
    task_types: Counter[str] = field(default_factory=Counter)
    fallen: dict[str, int] = field(default_factory=lambda: dict.fromkeys(RULES, 0))
    """Rule → how many fell at it."""
    samples: dict[str, list[str]] = field(default_factory=dict)
    """Rule → the first texts that fell at it, shortened."""

    @property
    def full(self) -> bool:
        return bool(self.wanted) and len(self.items) >= self.wanted

    def take_text(self, content: str, topics: Sequence[str], task_types: Sequence[str]) -> int:
        """The items of one answer; topics and task types as the request numbered them. Returns how many were kept."""
        before = len(self.items)
        for value in objects_in(content):
            if self.full:
                break
            if self.take(value):
                self.topics[_named(value.get("topic"), topics)] += 1
                self.task_types[_named(value.get("task_type"), task_types)] += 1
        return len(self.items) - before

    def take(self, value: Any) -> bool:
        """One item, kept or counted where it fell."""
        item, rule = judged(value, self.catalogue)
        if not rule and (known := self.seen.duplicate_of(question(item))):
            rule = f"{known} duplicate"
        if rule:
            self.fallen[rule] += 1
            samples = self.samples.setdefault(rule, [])
            if len(samples) < SAMPLES and isinstance(value, InputError):
                samples.append(str(value))
            elif len(samples) < SAMPLES and isinstance(value, dict):
                parts = [str(value.get(field) or "")[:120] for field in FIELDS]
                text = " ⟶ ".join(part for part in parts if part.strip())
                samples.append(text.encode("utf-8", "replace").decode() or str(value)[:120])
            return False
        self.seen.add(question(item))
        self.items.append(item)
        return True


def _named(number: Any, names: Sequence[str]) -> str:
    return names[number - 1] if type(number) is int and 1 <= number <= len(names) else UNNAMED


def judged(value: Any, catalogue: Catalogue) -> tuple[Item, str]:
    """The item with its fields stripped, and the first rule that it breaks, but for those of duplicates."""
    if value is CUT_OFF:
        return Item(), "cut off"
    if isinstance(value, InputError):
        return Item(), "conversation"
    if not isinstance(value, dict):
        return Item(), "unreadable"
    for name in ("instruction", "output"):
        if value.get(name) is None:
            return Item(), f"no {name}"
    fields = {name: value.get(name) or "" for name in FIELDS}
    # half a surrogate pair, which no file can hold, and the sign for what was lost on the way
    if not all(isinstance(content, str) and not _LOST.search(content) for content in fields.values()):
        return Item(), "unreadable"
    item = Item({name: content.strip() for name, content in fields.items()})
    if isinstance(value, Item):  # of an import: a model is asked for single items
        if any(map(_LOST.search, texts_of(value))):
            return Item(), "unreadable"
        if value.get("system"):
            item["system"] = value["system"].strip()
        if value.get("history"):
            item["history"] = [[text.strip() for text in pair] for pair in value["history"]]
    if _NO_INPUT.fullmatch(item["input"]):
        item["input"] = ""
    for name in ("instruction", "output"):
        if not item[name]:
            return item, f"no {name}"
    history = item.get("history", ())
    questions, answers = [*(asked for asked, _ in history), item["instruction"]], [*(said for _, said in history)]
    answers.append(item["output"])
    for name, texts in zip(FIELDS, (questions, [item["input"]], answers), strict=True):
        shortest, longest = catalogue.accepted[name]
        if not all(shortest <= len(text) <= longest for text in texts):
            return item, f"{name} length"
    if any(pattern.match(answer) for pattern in catalogue.refusals for answer in answers):
        return item, "refusal"
    if any(pattern.search(content) for pattern in catalogue.self_mentions for content in texts_of(item)):
        return item, "speaks as a model"
    share = share_of(catalogue.language["script"], "\n".join([*questions, *answers]))
    return item, "language" if share < catalogue.language["share"] else ""


def share_of(script: str, text: str) -> float:
    """How much of a text is of a script, 0 to 1, in characters of scripts without word spaces and words of the others;
    1 for a text without a letter (a sum, a table of numbers), and for the script "any"."""
    units = [] if script == "any" else _UNIT.findall(text)
    mine = re.compile(f"[{SCRIPTS[script][0]}]") if units else None
    return sum(1 for unit in units if mine.match(unit)) / len(units) if mine else 1.0


def objects_in(text: str) -> Iterator[Any]:
    """Every object that does not lie in another, in order; of one that holds lists in place of an item
    ({"items": […]}), the lists' members. CUT_OFF, last, where the text ends inside an object."""
    (text, thinking), cut_off = without_thoughts(text), False
    at, steps = 0, min(PASSES * len(text), MOST_STEPS)
    while (at := text.find("{", at)) >= 0 and steps > 0:
        try:
            value, end = _decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end, taken = _closing(text, at, steps)
            steps -= taken
            if not end:
                # its inner objects may be whole: a list in an object, cut off
                at, cut_off = at + 1, True
                continue
            value = _mended(text[at:end])
        at, cut_off = end, False
        lists = [member for member in value.values() if isinstance(member, list)] if isinstance(value, dict) else []
        if lists and "instruction" not in value:
            for members in lists:
                yield from members
        elif value:
            yield value
    if cut_off or thinking:
        yield CUT_OFF


def _mended(candidate: str) -> Any:
    """The object that nearly is one; None for braces in talk, the text itself for an item that cannot be mended."""
    from json_repair import repair_json

    try:
        value = repair_json(candidate, return_objects=True)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else candidate if "instruction" in candidate else None


def _closing(text: str, start: int, steps: int) -> tuple[int, int]:
    """Past the brace that closes the one at `start` (0 where none does within so many steps), and the steps taken."""
    # braces in texts do not count: one opens with a quotation mark after { [ , or : and closes with the same one before
    # } ] , : or the end, so that a quotation in it, or an apostrophe, does not end it
    depth, quote, before, at = 0, "", "", start
    while at < min(len(text), start + steps):
        sign = text[at]
        if quote:
            if sign == "\\":
                at += 1
            elif sign == quote and text[at + 1 : at + 40].lstrip()[:1] in ("", "}", "]", ",", ":"):
                quote = ""
        elif sign in "\"'" and before in "{[,:":
            quote = sign
        elif sign in "{}":
            depth += 1 if sign == "{" else -1
            if depth == 0:
                return at + 1, at + 1 - start
        if not sign.isspace():
            before = sign
        at += 1
    return 0, at - start
