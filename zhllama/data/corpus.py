"""Text as documents: a line of a .txt file, the `text` of a line of a .jsonl file or of a row of a .parquet file.

Text files may be compressed (.gz, .zst). Files are read in order of their names (recorded in the artifact that is made
of them), streamed, UTF-8 checked. A dataset of the Hugging Face Hub is read as `hf://datasets/OWNER/NAME`
(hub_dataset.py). Of a packed dataset the held-out documents are read, so that its reference is a text to evaluate on.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from zhllama.artifacts import hub_dataset
from zhllama.artifacts.json_file import said_of, value_of
from zhllama.artifacts.reader import Artifact
from zhllama.data.json_values import values_in
from zhllama.data.packed import HELD_OUT_TEXT
from zhllama.data.text_stream import LONGEST, NO_ITEMS, ROWS, data_files, line_blocks, parquet_batches, plain_name
from zhllama.errors import InputError

CHARACTERS = 2**18
"""Of a table's texts, how many are given on together."""


class Documents(NamedTuple):
    """Documents of one file that were read together, in order."""

    texts: list[str]
    file: str


@dataclass
class Skipped:
    """Lines and items that could not be read and were left out: how many, and what was wrong with the first ones."""

    count: int = 0
    first: list[str] = field(default_factory=list)


def leave_out(fault: InputError, skipped: Skipped | None) -> None:
    """Counts what is left out; raises the fault where nothing may be."""
    if skipped is None:
        raise fault
    skipped.count += 1
    if len(skipped.first) < 10:
        skipped.first.append(str(fault))


def text_files(artifact: Artifact) -> list[str]:
    """The names of the artifact's text files (see data_files)."""
    missing = "no .txt or .jsonl file in it (.gz and .zst too), and no .parquet; give a folder or prefix of text files"
    endings: tuple[str, ...] = (".txt", ".jsonl", ".parquet")
    names = [plain_name(name) for name in artifact.names if name not in NO_ITEMS]
    if not any(name.endswith(endings) for name in names) and any(name.endswith(".json") for name in names):
        # beside text it is a setting or a card; alone it is lines under another name, or a list
        endings = (".json",)
    return data_files(artifact, endings, HELD_OUT_TEXT, "text", missing)


def read_documents(artifact: Artifact, keep_blank: bool = False, skipped: Skipped | None = None) -> Iterator[str]:
    """Every document; blank lines are left out unless `keep_blank`. InputError names file and line of bytes that are
    not UTF-8 or a line without text; with `skipped` such lines are counted there and left out."""
    for texts, _ in read_batches(artifact, keep_blank, skipped):
        yield from texts


def read_batches(artifact: Artifact, keep_blank: bool = False, skipped: Skipped | None = None) -> Iterator[Documents]:
    """As read_documents, many at a time: half a megabyte of text, or a thousand rows."""
    empty = True
    for texts, file in _all_documents(artifact, skipped):
        if not keep_blank:
            texts = [text for text in texts if text and not text.isspace()]
        empty = empty and not any(map(str.strip, texts))
        if texts:
            yield Documents(texts, file)
    if empty:
        raise InputError(f"{artifact.root}: the text files are empty; give files with text in them")


def _all_documents(artifact: Artifact, skipped: Skipped | None) -> Iterator[Documents]:
    if artifact.manifest.kind == hub_dataset.KIND:
        column = hub_dataset.HubDataset.parse(artifact.root).column
        values = (row.get(column) for row in hub_dataset.hub_rows(artifact))
        yield from _column(values, f"{artifact.root}: row", column, "", skipped)
    for name in text_files(artifact):
        where = f"{artifact.root}/{name}"
        if name.endswith(".parquet"):
            values = (text for batch in parquet_batches(artifact, name, "text") for text in batch.column(0).to_pylist())
            yield from _column(values, f"{where}: row", "text", name, skipped)
            continue
        if plain_name(name).endswith(".json"):
            items = values_in(artifact, name, "lines or a list of objects with a text field are needed", _has_text)
            values = (item.get("text") if isinstance(item, dict) else item for item in items)
            yield from _column(values, f"{where}: item", "text", name, skipped)
            continue
        # at the begin of a file a byte order mark may stand, which is no text
        number, json_lines = 1, plain_name(name).endswith(".jsonl")
        for block in line_blocks(artifact, name):
            if isinstance(block, InputError):
                leave_out(block, skipped)
                number += 1
                continue
            lines = block.removesuffix(b"\n")
            try:
                texts = [] if json_lines else lines.decode("utf-8-sig" if number == 1 else "utf-8").split("\n")
                texts = [one.rstrip("\r") for one in texts] if b"\r" in lines else texts
            except UnicodeDecodeError:
                texts = []
            # a plain block has one text at least
            texts = texts or list(_line_by_line(lines.split(b"\n"), number, where, json_lines, skipped))
            yield Documents(texts, name)
            number += block.count(b"\n") or 1


def _line_by_line(
    lines: list[bytes], first: int, where: str, json_lines: bool, skipped: Skipped | None
) -> Iterator[str]:
    for number, line in enumerate(lines, start=first):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r")
            yield _text_field(text, f"{where}: line {number}") if json_lines and text.strip() else text
        except UnicodeDecodeError as error:
            reason = f"is not UTF-8 ({error.reason}); convert the file, or --skip-bad"
            leave_out(InputError(f"{where}: line {number} {reason}"), skipped)
        except InputError as fault:
            leave_out(fault, skipped)


def _text_field(line: str, where: str) -> str:
    try:
        value = value_of(line)
    except ValueError as error:
        raise InputError(f"{where} {said_of(error)}; mend or remove it, or --skip-bad") from error
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise InputError(f"{where} has no text field; each line must be an object with one, or --skip-bad")
    return str(value["text"])


def _has_text(item: dict[str, Any]) -> bool:
    return isinstance(item.get("text"), str)


def _column(values: Iterator[Any], where: str, column: str, file: str, skipped: Skipped | None) -> Iterator[Documents]:
    texts: list[str] = []
    characters = 0
    for number, value in enumerate(values, start=1):
        if not isinstance(value, str):
            what = "nothing" if value is None else f"a {type(value).__name__}"
            fault = InputError(f"{where} {number} has {what} in the column {column!r}; text is needed, or --skip-bad")
            leave_out(value if isinstance(value, InputError) else fault, skipped)
            continue
        if len(value) > LONGEST:
            fault = InputError(f"{where} {number} has over {LONGEST:,} characters; cut the document, or --skip-bad")
            leave_out(fault, skipped)
            continue
        texts.append(value)
        characters += len(value)
        if len(texts) == ROWS or characters >= CHARACTERS:
            yield Documents(texts, file)
            texts, characters = [], 0
    yield Documents(texts, file)
