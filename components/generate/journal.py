"""The answers so far, so that a run that was killed goes on after the last of them.

A batch is a unit: it is written whole, and what a kill left of one is dropped and answered again, so that the answers
are those of a run that was never stopped. In a store each batch is an object of its own (S3 cannot append), hidden
beside the artifact and deleted once that is published; a file of one's own grows line by line.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from zhllama import storage
from zhllama.errors import InputError
from zhllama.inference.generate import BATCH

Sample = dict[str, str]


def _answered(samples: Sequence[Any], asked: Sequence[str]) -> list[Sample]:
    """The samples up to the first that is none, or no answer to the question at its place; whole batches, or all."""
    count = 0
    for sample, question in zip(samples, asked):
        if not isinstance(sample, dict) or not isinstance(sample.get("Output"), str):
            break
        if sample != {"Input": question, "Output": sample["Output"]}:
            break
        count += 1
    return list(samples[: count if count == len(asked) else count - count % BATCH])


class StoreJournal:
    """In the artifact's own place, which is named by all that decides the answers."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._batches = 0

    def _place(self, batch: int) -> str:
        return storage.join(self._root, f".answers/{batch:08d}.json")

    def read(self, asked: Sequence[str]) -> list[Sample]:
        """The answers to the first questions, whole batches of them (all, where all are there)."""
        found: list[Any] = []
        while (content := storage.read_or_none(self._place(self._batches))) is not None:
            found += json.loads(content)
            self._batches += 1
        return _answered(found, asked)

    def write(self, batch: Sequence[Sample]) -> None:
        """Keeps the answers to the next questions."""
        storage.write_bytes(self._place(self._batches), json.dumps(batch, ensure_ascii=False).encode())
        self._batches += 1

    def delete(self) -> None:
        for batch in range(self._batches):
            storage.delete(self._place(batch))


class FileJournal:
    """A .jsonl file that grows, or what becomes a .json file at the end; `key` is all that decides the answers. The key
    is kept beside it until all is answered: a file that other settings began is refused, not gone on with."""

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self._lines = path if path.suffix == ".jsonl" else path.with_name(f".{path.name}.lines")
        self._mark = path.with_name(f".{path.name}.key")
        self._key = key
        self._file: Any = None

    def read(self, asked: Sequence[str]) -> list[Sample]:
        """As StoreJournal.read."""
        if not self._mark.exists():
            if self._path.exists():
                raise InputError(f"--answers {self._path}: it is there already; give another name, or delete it")
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # lines without a mark are nothing that could be gone on with
            self._lines.unlink(missing_ok=True)
            storage.write_bytes(str(self._mark.absolute()), self._key.encode())
        elif self._mark.read_text() != self._key:
            raise InputError(
                f"--answers {self._path}: it was begun with another model or other settings; give another name, or "
                f"delete it and {self._mark.name}"
            )
        lines = self._lines.read_bytes().split(b"\n")[:-1] if self._lines.exists() else []
        found = _answered([_parsed(line) for line in lines], asked)
        self._file = open(self._lines, "ab")
        # a line that a kill left half, and what follows the last whole batch
        self._file.truncate(sum(len(line) + 1 for line in lines[: len(found)]))
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
        if kind is None:
            if self._lines != self._path:
                samples = [json.loads(line) for line in self._lines.read_bytes().split(b"\n")[:-1]]
                text = json.dumps(samples, ensure_ascii=False, indent=1) + "\n"
                storage.write_bytes(str(self._path.absolute()), text.encode())
                self._lines.unlink()
            self._mark.unlink()
        elif not self._lines.stat().st_size:
            # nothing was answered, so nothing is left
            self._lines.unlink()
            self._mark.unlink()


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
