"""Items out of what a model wrote: leniently found, strictly checked.

A model that is asked for a JSON list writes it bare, in a code fence, one object a line, inside an object, or cut off
by its token limit. Every JSON object that can be read is taken where it begins; what cannot be read is passed over.
"""

import json
from collections.abc import Iterator
from typing import Any

from components.shared.errors import InputError
from components.shared.instructions import checked_item


def items_in(text: str) -> tuple[list[dict[str, str]], int]:
    """The items in a model's answer, stripped, and how many objects were none. Order is kept."""
    items, bad = [], 0
    for value in _objects(text):
        try:
            item = checked_item(value, "answer")
        except InputError:
            bad += 1
            continue
        items.append({field: content.strip() for field, content in item.items()})
    return items, bad


def _objects(text: str) -> Iterator[Any]:
    """Every object that does not lie in another; of one that only holds lists ({"items": […]}), the lists' members."""
    decoder = json.JSONDecoder()
    at = text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except ValueError:
            at = text.find("{", at + 1)
            continue
        if value and all(isinstance(member, list) for member in value.values()):
            for members in value.values():
                yield from members
        else:
            yield value
        at = text.find("{", end)
