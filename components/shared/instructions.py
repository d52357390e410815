"""Alpaca items: `{"instruction", "input", "output"}`, as a JSON list or one object a line (JSONL).

Of a packed dataset the held-out items are read, so that its reference is a set to evaluate on.
"""

import json
from collections.abc import Iterator
from typing import Any

from components.shared.artifact import Artifact
from components.shared.errors import InputError
from components.shared.packed import HELD_OUT_INSTRUCTIONS, KIND

FIELDS = ("instruction", "input", "output")


def read_instructions(artifact: Artifact, answered: bool = True) -> Iterator[dict[str, str]]:
    """Every item of the artifact's .json and .jsonl files, in order of file name and place.

    Items have exactly the three fields, as text; `input` may be missing, and `output` too, or be empty, unless
    `answered`. InputError names file, item and field.
    """
    empty = True
    for name in instruction_files(artifact):
        where = f"{artifact.root}/{name}"
        for number, item in enumerate(_items(artifact, name, where), start=1):
            empty = False
            yield checked_item(item, f"{where}: item {number}", answered)
    if empty:
        raise InputError(f"{artifact.root}: no item in it; give a list of objects with {', '.join(FIELDS)}")


def instruction_files(artifact: Artifact) -> list[str]:
    """The names of the artifact's files of items, sorted; InputError when it has none."""
    if artifact.manifest.kind == KIND:
        if HELD_OUT_INSTRUCTIONS not in artifact:
            raise InputError(
                f"{artifact.root}: this packed dataset holds no instructions back; prepare it from --instructions with "
                "--validation-fraction or --validation"
            )
        return [HELD_OUT_INSTRUCTIONS]
    beside = ("manifest.json", "blocks.json", "report.json", "card.json")
    names = [name for name in sorted(artifact.names) if name.endswith((".json", ".jsonl")) and name not in beside]
    if not names:
        raise InputError(f"{artifact.root}: no .json or .jsonl file in it; give Alpaca items in one")
    return names


def _items(artifact: Artifact, name: str, where: str) -> Iterator[Any]:
    if name.endswith(".jsonl"):
        with artifact.open(name) as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except ValueError as error:
                        raise InputError(f"{where}: line {number} is not JSON ({error}); mend or remove it") from error
        return
    try:
        items = json.loads(artifact.read(name))
    except ValueError as error:
        raise InputError(
            f"{where}: not JSON ({error}); a list of objects with {', '.join(FIELDS)} is needed"
        ) from error
    if not isinstance(items, list):
        raise InputError(
            f"{where}: a {type(items).__name__} where a list of objects with {', '.join(FIELDS)} is needed"
        )
    yield from items


def checked_item(item: Any, where: str, answered: bool = True) -> dict[str, str]:
    """The item with its three fields; InputError for a missing, empty or non-text one (see read_instructions)."""
    optional = ("input",) if answered else ("input", "output")
    if not isinstance(item, dict):
        raise InputError(f"{where}: a {type(item).__name__} where an object with {', '.join(FIELDS)} is needed")
    for field in FIELDS:
        value = item.get(field, "" if field in optional else None)
        if not isinstance(value, str):
            raise InputError(f"{where}: field {field!r} is {'missing' if value is None else 'not text'}; mend the item")
        if not value.strip() and field not in optional:
            raise InputError(f"{where}: field {field!r} is empty; mend or remove the item")
    return {field: item.get(field, "") for field in FIELDS}
