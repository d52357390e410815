"""Objects out of what a model wrote, leniently: a clean list costs one pass, a broken one loses what is broken.

Models wrap lists in code fences and talk, write one object a line, single quotes, trailing commas and quotation marks
inside texts, and are cut off by their token limit. Every object that reads as JSON is taken where it begins; one that
does not, but closes, goes through json_repair; one that never closes was cut off, and is counted and left.
"""

import json
from collections.abc import Iterator
from typing import Any

PASSES, MOST_STEPS = 10, 2_000_000
"""How much of an answer is looked at sign by sign for what is broken: ten times its length, and never more than a
second's work. What is left then is left unread: an answer made of braces must not hold up the others."""
CUT_OFF = object()
"""Stands for an object that begins and never ends."""
_decoder = json.JSONDecoder(strict=False)


def objects_in(text: str) -> Iterator[Any]:
    """Every object that does not lie in another, in order; of one that holds lists in place of an item
    ({"items": […]}), the lists' members. CUT_OFF, last, where the text ends inside an object."""
    cut_off = False
    if text.lstrip().startswith("<think>"):
        # thoughts often are drafts of items
        _, closed, text = text.partition("</think>")
        cut_off = not closed
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
    if cut_off:
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
    """Past the brace that closes the one at `start` (0 where none does within so many steps), and the steps taken.

    Braces in texts do not count. A text opens with a quotation mark after { [ , or : and closes with the same one
    before } ] , : or the end, so that a quotation in it, or an apostrophe, does not end it.
    """
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
