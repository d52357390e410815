"""Instruction items: `{"instruction", "input", "output"}` (Alpaca's), or conversations (conversations.py), as a JSON
list or one object a line (JSONL), .gz and .zst too.

A list is parsed as a stream: the memory is one item's. A dataset of the Hugging Face Hub with these columns is read as
`hf://datasets/OWNER/NAME` (hub_dataset.py); of a packed dataset the held-out items, as a set to evaluate on.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any

from zhllama.artifacts import hub_dataset
from zhllama.artifacts.reader import Artifact
from zhllama.data.conversations import FIELDS, Item, item_of, turns_of
from zhllama.data.corpus import Skipped, leave_out
from zhllama.data.json_values import values_in
from zhllama.data.packed import HELD_OUT_INSTRUCTIONS
from zhllama.data.text_stream import data_files
from zhllama.errors import InputError

_NEEDED = f"a list of objects with {', '.join(FIELDS)}, or with messages, is needed"


def read_instructions(artifact: Artifact, answered: bool = True, skipped: Skipped | None = None) -> Iterator[Item]:
    """Every item of the artifact's .json and .jsonl files, in order of file name and place, with the three fields, as
    text, and of a conversation what was said before; `input` may be missing, and `output` too, or be empty, unless
    `answered`. InputError names file, item and fault; with `skipped` such items are counted there and left out."""
    empty, hub = True, artifact.manifest.kind == hub_dataset.KIND
    rows = enumerate(hub_dataset.hub_rows(artifact), start=1) if hub else ()
    of_hub = ((f"{artifact.root}: item {number}", row) for number, row in rows)
    of_files = (values_in(artifact, name, _NEEDED, is_item) for name in instruction_files(artifact))
    for place, item in chain(of_hub, *of_files):
        empty = False
        try:
            checked = _checked(item, place, answered)
        except InputError as fault:
            leave_out(fault, skipped)
        else:
            yield checked
    if empty:
        raise InputError(f"{artifact.root}: no item in it; give {_NEEDED.removesuffix(' is needed')}")


def is_item(value: dict[str, Any]) -> bool:
    """Whether an object seems to be one."""
    return "instruction" in value or turns_of(value) is not None


def instruction_files(artifact: Artifact) -> list[str]:
    """The names of the artifact's files of items (see data_files)."""
    missing = "no .json or .jsonl file in it; give Alpaca items or conversations in one"
    return data_files(artifact, (".json", ".jsonl"), HELD_OUT_INSTRUCTIONS, "instructions", missing)


def _checked(item: Any, where: str, answered: bool) -> Item:
    """With its three fields, as text that has UTF-8."""
    if isinstance(item, InputError):
        raise item
    if not isinstance(item, dict):
        raise InputError(f"{where}: a {type(item).__name__} where an object with {', '.join(FIELDS)} is needed")
    try:
        found = item_of(item, answered)
    except InputError as fault:
        raise InputError(f"{where}: {fault}") from fault
    found.place = where
    return found
