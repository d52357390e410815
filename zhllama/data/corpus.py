"""Text as documents: a line of a .txt file, the `text` of a line of a .jsonl file or of a row of a .parquet file.

Text files may be compressed (.gz, .zst). Files are read in order of their names (recorded in the artifact that is made
of them), streamed, UTF-8 checked. A dataset of the Hugging Face Hub is read as `hf://datasets/OWNER/NAME`
(hub_dataset.py). Of a packed dataset the held-out documents are read, so that its reference is a text to evaluate on.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from zhllama.artifacts import hub_dataset
from zhllama.artifacts.reader import Artifact
from zhllama.data.packed import HELD_OUT_TEXT
from zhllama.data.text_stream import ROWS, data_files, line_blocks, parquet_batches, plain_name
from zhllama.errors import InputError

CHARACTERS = 2**18
"""Of a table's texts, how many are given on together."""


class Document(NamedTuple):
    """One document, and where it stands: file and line (of a table, row), counted from 1."""

    text: str
    file: str
    line: int


class Documents(NamedTuple):
    """Documents of one file that were read together, in order."""

    texts: list[str]
    file: str
    lines: Sequence[int]
    """Of each, its line."""


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
    return data_files(artifact, (".txt", ".jsonl", ".parquet"), HELD_OUT_TEXT, "text", missing)


def read_documents(artifact: Artifact, keep_blank: bool = False, skipped: Skipped | None = None) -> Iterator[Document]:
    """Every document; blank lines are left out unless `keep_blank`.

    InputError names file and line of bytes that are not UTF-8 or a line without text; with `skipped` such lines are
    counted there and left out.
    """
    for texts, file, lines in read_batches(artifact, keep_blank, skipped):
        for text, line in zip(texts, lines, strict=True):
            yield Document(text, file, line)


def read_batches(artifact: Artifact, keep_blank: bool = False, skipped: Skipped | None = None) -> Iterator[Documents]:
    """As read_documents, many at a time: half a megabyte of text, or a thousand rows."""
    empty = True
    for documents in _all_documents(artifact, skipped):
        blank = any(not text or text.isspace() for text in documents.texts)
        if blank and not keep_blank:
            full = [(text, line) for text, line in zip(documents.texts, documents.lines, strict=True) if text.strip()]
            documents = Documents([text for text, _ in full], documents.file, [line for _, line in full])
        if empty:
            empty = not any(map(str.strip, documents.texts))
        if documents.texts:
            yield documents
    if empty:
        raise InputError(f"{artifact.root}: the text files are empty; give files with text in them")


def _all_documents(artifact: Artifact, skipped: Skipped | None) -> Iterator[Documents]:
    if artifact.manifest.kind == hub_dataset.KIND:
        column = hub_dataset.column_of(artifact)
        values = (row.get(column) for row in hub_dataset.hub_rows(artifact))
        yield from _column(values, "", f"{artifact.root}: row", column, skipped)
    for name in text_files(artifact):
        where = f"{artifact.root}/{name}"
        if name.endswith(".parquet"):
            values = (text for batch in parquet_batches(artifact, name, "text") for text in batch.column(0).to_pylist())
            yield from _column(values, name, f"{where}: row", "text", skipped)
            continue
        number, json_lines = 1, plain_name(name).endswith(".jsonl")
        for block in line_blocks(artifact, name):
            lines = block.removesuffix(b"\n")
            texts = None if json_lines else _decoded(lines, begin=number == 1)
            if texts is None:
                yield _line_by_line(lines.split(b"\n"), number, name, where, json_lines, skipped)
            else:
                yield Documents(texts, name, range(number, number + len(texts)))
            number += lines.count(b"\n") + 1


def _decoded(block: bytes, begin: bool) -> list[str] | None:
    """The texts of lines, without their ends; None when they are not UTF-8, one of them at least. At the `begin` of a
    file a byte order mark may stand, which is no text."""
    try:
        text = block.decode("utf-8-sig" if begin else "utf-8")
    except UnicodeDecodeError:
        return None
    texts = text.split("\n")
    return [one.rstrip("\r") for one in texts] if "\r" in text else texts


def _line_by_line(
    raw_lines: list[bytes], first: int, name: str, where: str, json_lines: bool, skipped: Skipped | None
) -> Documents:
    texts, lines = [], []
    for number, raw in enumerate(raw_lines, start=first):
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r")
            if json_lines and text.strip():
                text = _text_field(text, f"{where}: line {number}")
        except UnicodeDecodeError as error:
            reason = f"is not UTF-8 ({error.reason}); convert the file, or --skip-bad"
            leave_out(InputError(f"{where}: line {number} {reason}"), skipped)
        except InputError as fault:
            leave_out(fault, skipped)
        else:
            texts.append(text)
            lines.append(number)
    return Documents(texts, name, lines)


def _text_field(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({error}); mend or remove it, or --skip-bad") from error
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise InputError(f"{where} has no text field; each line must be an object with one, or --skip-bad")
    text = str(value["text"])
    if "\\u" in line:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where} has half of a surrogate pair; mend or remove it, or --skip-bad") from error
    return text


def _column(values: Iterator[Any], file: str, where: str, column: str, skipped: Skipped | None) -> Iterator[Documents]:
    texts: list[str] = []
    lines: list[int] = []
    characters = 0
    for number, value in enumerate(values, start=1):
        if not isinstance(value, str):
            what = "nothing" if value is None else f"a {type(value).__name__}"
            fault = InputError(f"{where} {number} has {what} in the column {column!r}; text is needed, or --skip-bad")
            leave_out(fault, skipped)
            continue
        texts.append(value)
        lines.append(number)
        characters += len(value)
        if len(texts) == ROWS or characters >= CHARACTERS:
            yield Documents(texts, file, lines)
            texts, lines, characters = [], [], 0
    yield Documents(texts, file, lines)
