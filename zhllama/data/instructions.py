"""Alpaca items: `{"instruction", "input", "output"}`, as a JSON list or one object a line (JSONL), .gz and .zst too.

A list is parsed as a stream, so that the memory is one item's, whatever the file's size. A dataset of the Hugging Face
Hub with these columns is read as `hf://datasets/OWNER/NAME` (hub_dataset.py). Of a packed dataset the held-out items
are read, so that its reference is a set to evaluate on.
"""

import json
from collections.abc import Iterator
from typing import Any

from zhllama.artifacts import hub_dataset
from zhllama.artifacts.reader import Artifact
from zhllama.data.corpus import Skipped
from zhllama.data.packed import HELD_OUT_INSTRUCTIONS, KIND
from zhllama.data.text_stream import lines_of, open_plain, plain_name
from zhllama.errors import InputError

FIELDS = ("instruction", "input", "output")
NO_ITEMS = ("manifest.json", "blocks.json", "report.json", "card.json")
"""What may lie beside the items in an artifact."""
_NEEDED = f"a list of objects with {', '.join(FIELDS)} is needed"


def read_instructions(
    artifact: Artifact, answered: bool = True, skipped: Skipped | None = None
) -> Iterator[dict[str, str]]:
    """Every item of the artifact's .json and .jsonl files, in order of file name and place.

    Items have exactly the three fields, as text; `input` may be missing, and `output` too, or be empty, unless
    `answered`. InputError names file, item and field; with `skipped` such items are counted there and left out.
    """
    empty = True
    for where, items in _sources(artifact):
        for number, item in enumerate(items, start=1):
            empty = False
            try:
                if isinstance(item, InputError):
                    raise item
                checked = checked_item(item, f"{where}: item {number}", answered)
            except InputError as fault:
                if skipped is None:
                    raise
                skipped.add(fault)
            else:
                yield checked
    if empty:
        raise InputError(f"{artifact.root}: no item in it; give a list of objects with {', '.join(FIELDS)}")


def instruction_files(artifact: Artifact) -> list[str]:
    """The names of the artifact's files of items, sorted; none for a dataset of the Hub. InputError without any."""
    if artifact.manifest.kind == hub_dataset.KIND:
        return []
    if artifact.manifest.kind == KIND:
        if HELD_OUT_INSTRUCTIONS not in artifact:
            raise InputError(
                f"{artifact.root}: this packed dataset holds no instructions back; prepare it from --instructions with "
                "--validation-fraction or --validation"
            )
        return [HELD_OUT_INSTRUCTIONS]
    names = [name for name in sorted(artifact.names) if plain_name(name).endswith((".json", ".jsonl"))]
    names = [name for name in names if name not in NO_ITEMS]
    if not names:
        raise InputError(f"{artifact.root}: no .json or .jsonl file in it; give Alpaca items in one")
    return names


def bytes_of_instructions(artifact: Artifact) -> int | None:
    """How much there is to read; None where that is known only when it has been read."""
    names = instruction_files(artifact)
    if not names or any(plain_name(name) != name for name in names):
        return None
    return sum(artifact.file(name).size for name in names)


def _sources(artifact: Artifact) -> Iterator[tuple[str, Iterator[Any]]]:
    """Each file's place, for messages, and its items; a line that is no JSON is an InputError in place of its item."""
    if artifact.manifest.kind == hub_dataset.KIND:
        yield artifact.root, hub_dataset.hub_rows(artifact)
    for name in instruction_files(artifact):
        where = f"{artifact.root}/{name}"
        of_lines = plain_name(name).endswith(".jsonl")
        yield where, _of_lines(artifact, name, where) if of_lines else _of_list(artifact, name, where)


def _of_lines(artifact: Artifact, name: str, where: str) -> Iterator[Any]:
    for number, line in enumerate(lines_of(artifact, name), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                yield InputError(f"{where}: line {number} is not JSON ({error}); mend or remove it")


def _of_list(artifact: Artifact, name: str, where: str) -> Iterator[Any]:
    import ijson

    with open_plain(artifact, name) as stream:
        if stream.peek(3).startswith(b"\xef\xbb\xbf"):
            stream.read(3)
        try:
            begin = stream.read(1)
            while begin.isspace():
                begin = stream.read(1)
            if begin == b"{":
                raise InputError(f"{where}: a dict where {_NEEDED}")
            if begin != b"[":
                raise InputError(f"{where}: not JSON; {_NEEDED}")
            yield from ijson.items(_Before(begin, stream), "item", use_float=True)
        except ijson.JSONError as error:
            raise InputError(f"{where}: not JSON ({error}); {_NEEDED}") from error
        except OSError as error:
            if plain_name(name) == name:
                raise
            raise InputError(f"{where}: cannot be decompressed ({error}); compress it again") from error


class _Before:
    """A stream with some bytes put before it again."""

    def __init__(self, begin: bytes, stream: Any) -> None:
        self._begin = begin
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        if size == 0:
            return b""
        begin, self._begin = self._begin, b""
        return begin or bytes(self._stream.read(size))


def checked_item(item: Any, where: str, answered: bool = True) -> dict[str, str]:
    """The item with its three fields; InputError for a missing, empty or non-text one (see read_instructions), and for
    text that has no UTF-8."""
    optional = ("input",) if answered else ("input", "output")
    if not isinstance(item, dict):
        raise InputError(f"{where}: a {type(item).__name__} where an object with {', '.join(FIELDS)} is needed")
    found = {}
    for field in FIELDS:
        value = item.get(field)
        if value is None and field in optional:
            value = ""
        if not isinstance(value, str):
            raise InputError(f"{where}: field {field!r} is {'missing' if value is None else 'not text'}; mend the item")
        if not value.strip() and field not in optional:
            raise InputError(f"{where}: field {field!r} is empty; mend or remove the item")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where}: field {field!r} has half of a surrogate pair; mend the item") from error
        found[field] = value
    return found
