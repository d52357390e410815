"""The answers so far, so that a run that was killed goes on after the last of them.

A batch is a unit: it is written whole, and what a kill left of one is dropped and answered again, so that the answers
are those of a run that was never stopped. In a store each batch is an object of its own (S3 cannot append), hidden
beside the artifact and deleted once that is published; a file of one's own grows line by line.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from zhllama import storage
from zhllama.errors import InputError
from zhllama.inference.generate import BATCH

Sample = dict[str, str]
HIDDEN = ".answers"


class Journal(Protocol):
    def read(self, asked: Sequence[str]) -> list[Sample]:
        """The answers to the first questions, whole batches of them (all, where all are there)."""

    def write(self, batch: Sequence[Sample]) -> None:
        """Keeps the answers to the next questions."""


def _answered(samples: Sequence[Any], asked: Sequence[str]) -> list[Sample]:
    """The samples up to the first that is none, or no answer to the question at its place; whole batches."""
    count = 0
    for sample, question in zip(samples, asked, strict=False):
        whole = isinstance(sample, dict) and set(sample) == {"Input", "Output"} and isinstance(sample["Output"], str)
        if not whole or sample["Input"] != question:
            break
        count += 1
    if count < len(asked):
        count -= count % BATCH
    return list(samples[:count])


class StoreJournal:
    """In the artifact's own place, which is named by all that decides the answers."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._batches = 0

    def _place(self, batch: int) -> str:
        return storage.join(self._root, f"{HIDDEN}/{batch:08d}.json")

    def read(self, asked: Sequence[str]) -> list[Sample]:
        found: list[Any] = []
        while storage.exists(self._place(self._batches)):
            found += json.loads(storage.read_bytes(self._place(self._batches)))
            self._batches += 1
        return _answered(found, asked)

    def write(self, batch: Sequence[Sample]) -> None:
        storage.write_bytes(self._place(self._batches), json.dumps(list(batch), ensure_ascii=False).encode())
        self._batches += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            for batch in range(self._batches):
                storage.delete(self._place(batch))


class FileJournal:
    """A .jsonl file that grows, or what becomes a .json file at the end; `key` is all that decides the answers.

    The key is kept beside it until all is answered: a file that other settings began is refused, not gone on with.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self._lines = path if path.suffix == ".jsonl" else path.with_name(f".{path.name}.lines")
        self._mark = path.with_name(f".{path.name}.key")
        self._key = key
        self._file: Any = None

    def read(self, asked: Sequence[str]) -> list[Sample]:
        if self._path.exists() and not self._mark.exists():
            raise InputError(f"--answers {self._path}: it is there already; give another name, or delete it")
        found: list[Sample] = []
        whole = 0
        if self._mark.exists():
            if self._mark.read_text() != self._key:
                raise InputError(
                    f"--answers {self._path}: it was begun with another model or other settings; give another name, or "
                    f"delete it and {self._mark.name}"
                )
            content = self._lines.read_bytes() if self._lines.exists() else b""
            found = _answered([_parsed(line) for line in content.split(b"\n")[:-1]], asked)
            whole = sum(len(line) + 1 for line in content.split(b"\n")[: len(found)])
        else:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            storage.write_bytes(str(self._mark.absolute()), self._key.encode())
        self._file = open(self._lines, "ab")
        # a line that a kill left half, and what follows the last whole batch
        self._file.truncate(whole)
        return found

    def write(self, batch: Sequence[Sample]) -> None:
        for sample in batch:
            self._file.write((json.dumps(sample, ensure_ascii=False) + "\n").encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._file is None:
            return
        self._file.close()
        if kind is not None and not self._lines.stat().st_size:
            # nothing was answered, so nothing is left
            self._lines.unlink()
            self._mark.unlink()
        if kind is None:
            if self._lines != self._path:
                samples = [json.loads(line) for line in self._lines.read_bytes().split(b"\n")[:-1]]
                text = json.dumps(samples, ensure_ascii=False, indent=1) + "\n"
                storage.write_bytes(str(self._path.absolute()), text.encode())
                self._lines.unlink()
            self._mark.unlink()


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
