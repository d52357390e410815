"""Text as documents: a line of a .txt file, the `text` of a line of a .jsonl file or of a row of a .parquet file.

Text files may be compressed (.gz, .zst). Files are read in order of their names (recorded in the artifact that is made
of them), streamed, UTF-8 checked. A dataset of the Hugging Face Hub is read as `hf://datasets/OWNER/NAME`
(hub_dataset.py). Of a packed dataset the held-out documents are read, so that its reference is a text to evaluate on.
"""

import hashlib
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

from zhllama.artifacts import hub_dataset
from zhllama.artifacts.json_file import said_of
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
        rows = enumerate(hub_dataset.hub_rows(artifact), start=1)
        values = ((f"{artifact.root}: row {number}", row.get(column)) for number, row in rows)
        yield from _column(values, column, "", skipped)
    for name in text_files(artifact):
        where = f"{artifact.root}/{name}"
        if name.endswith(".parquet"):
            batches = parquet_batches(artifact, name, "text")
            texts = enumerate(chain.from_iterable(batch.column(0).to_pylist() for batch in batches), start=1)
            yield from _column(((f"{where}: row {number}", text) for number, text in texts), "text", name, skipped)
        elif plain_name(name).endswith(".txt"):
            yield from _lines(artifact, name, skipped)
        else:
            items = values_in(artifact, name, "lines or a list of objects with a text field are needed", _has_text)
            values = ((place, item.get("text") if isinstance(item, dict) else item) for place, item in items)
            yield from _column(values, "text", name, skipped)


def _lines(artifact: Artifact, name: str, skipped: Skipped | None) -> Iterator[Documents]:
    """Of a text file, a block of them at a time."""
    number = 1
    for block in line_blocks(artifact, name):
        if isinstance(block, InputError):
            leave_out(block, skipped)
            number += 1
            continue
        # at the begin of a file a byte order mark may stand, which is no text
        encoding = "utf-8-sig" if number == 1 else "utf-8"
        lines = block.removesuffix(b"\n")
        try:
            texts = lines.decode(encoding).split("\n")
        except UnicodeDecodeError:
            texts = []
            for at, line in enumerate(lines.split(b"\n"), start=number):
                try:
                    texts.append(line.decode("utf-8-sig" if at == 1 else "utf-8"))
                except UnicodeDecodeError as error:
                    said = f"line {at} {said_of(error)}; convert the file, or --skip-bad"
                    leave_out(InputError(f"{artifact.root}/{name}: {said}"), skipped)
        yield Documents([text.rstrip("\r") for text in texts] if b"\r" in lines else texts, name)
        number += block.count(b"\n") or 1


def _has_text(item: dict[str, Any]) -> bool:
    return isinstance(item.get("text"), str)


def _column(values: Iterator[tuple[str, Any]], column: str, file: str, skipped: Skipped | None) -> Iterator[Documents]:
    """Those of (place, value) that are texts, many at a time."""
    texts: list[str] = []
    characters = 0
    for place, value in values:
        if not isinstance(value, str) or len(value) > LONGEST:
            what = "nothing" if value is None else f"a {type(value).__name__}"
            fault = InputError(f"{place} has {what} where text is needed ({column!r}); mend it, or --skip-bad")
            if isinstance(value, str):
                fault = InputError(f"{place} has over {LONGEST:,} characters; cut the document, or --skip-bad")
            leave_out(value if isinstance(value, InputError) else fault, skipped)
            continue
        texts.append(value)
        characters += len(value)
        if len(texts) == ROWS or characters >= CHARACTERS:
            yield Documents(texts, file)
            texts, characters = [], 0
    yield Documents(texts, file)


def content_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def choose_texts(texts: Iterable[str], max_bytes: int) -> list[str]:
    """Distinct texts in order of their hash, `max_bytes` of UTF-8 in all; the last one is cut between characters."""
    kept: list[tuple[int, str]] = []  # a heap with the greatest hash on top: (−hash, text)
    have: set[int] = set()
    size = 0
    for text in texts:
        rank = int(content_hash(text), 16)
        if rank in have or (size >= max_bytes and rank > -kept[0][0]):
            continue
        heapq.heappush(kept, (-rank, text))
        have.add(rank)
        size += len(text.encode())
        while size - len(kept[0][1].encode()) >= max_bytes:
            greatest, dropped = heapq.heappop(kept)
            have.remove(-greatest)
            size -= len(dropped.encode())
    chosen = [text for _, text in sorted(kept, reverse=True)]
    if size > max_bytes:
        # the last one is longer than what there is room for: cut at a character
        room = len(chosen[-1].encode()) - (size - max_bytes)
        chosen[-1] = chosen[-1].encode()[:room].decode(errors="ignore")
    return [text for text in chosen if text]
