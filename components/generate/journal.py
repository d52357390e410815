"""The answers so far, so that a run that was killed goes on after the last of them.

A batch is a unit: it is written whole, and what a kill left of one is dropped and answered again, so that the answers
are those of a run that was never stopped. In a store each batch is an object of its own (S3 cannot append), hidden
beside the artifact and deleted once that is published; a file of one's own grows line by line.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zhllama import storage
from zhllama.artifacts.json_file import value_of
from zhllama.errors import InputError
from zhllama.inference.generate import BATCH

Sample = dict[str, str]
Journal = tuple[list[Sample], Callable[[Sequence[Sample]], None]]
"""The answers to the first questions, whole batches of them (all, where all are there), and what keeps the next."""


def _answered(samples: Iterable[Any], asked: Sequence[str]) -> list[Sample]:
    """The samples up to the first that is none, or no answer to the question at its place; whole batches, or all."""
    found: list[Sample] = []
    for sample, question in zip(samples, asked):
        if not isinstance(sample, dict) or not isinstance(answer := sample.get("Output"), str):
            break
        if sample != {"Input": question, "Output": answer}:
            break
        found.append(sample)
    return found if len(found) == len(asked) else found[: len(found) - len(found) % BATCH]


@contextmanager
def store_journal(root: str, asked: Sequence[str]) -> Iterator[Journal]:
    """In the artifact's own place, which is named by all that decides the answers."""
    found: list[Any] = []
    batches = 0

    def place(batch: int) -> str:
        return storage.join(root, f".answers/{batch:08d}.json")

    def keep(batch: Sequence[Sample]) -> None:
        nonlocal batches
        storage.write_bytes(place(batches), json.dumps(batch, ensure_ascii=False).encode())
        batches += 1

    while (content := storage.read_or_none(place(batches))) is not None:
        there = _parsed(content)
        found += there if isinstance(there, list) else [None]
        batches += 1
    yield _answered(found, asked), keep
    for batch in range(batches):
        storage.delete(place(batch))


@contextmanager
def file_journal(path: Path, key: str, asked: Sequence[str]) -> Iterator[Journal]:
    """A .jsonl file that grows, or what becomes a .json file at the end; `key` is all that decides the answers. The key
    is kept beside it until all is answered: a file that other settings began is refused, not gone on with."""
    growing = path if path.suffix == ".jsonl" else path.with_name(f".{path.name}.lines")
    mark = path.with_name(f".{path.name}.key")
    if not mark.exists():
        if path.exists():
            raise InputError(f"--answers {path}: it is there already; give another name, or delete it")
        path.parent.mkdir(parents=True, exist_ok=True)
        # lines without a mark are nothing that could be gone on with
        growing.unlink(missing_ok=True)
        storage.write_bytes(str(mark.absolute()), key.encode())
    elif mark.read_bytes() != key.encode():
        raise InputError(
            f"--answers {path}: it was begun with another model or other settings; give another name, or delete it "
            f"and {mark.name}"
        )
    lines = growing.read_bytes().split(b"\n")[:-1] if growing.exists() else []
    answered = _answered([_parsed(line) for line in lines], asked)
    growing.touch()

    def keep(batch: Sequence[Sample]) -> None:
        for sample in batch:
            file.write((json.dumps(sample, ensure_ascii=False) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())

    try:
        with open(growing, "ab") as file:
            # a line that a kill left half, and what follows the last whole batch
            file.truncate(sum(len(line) + 1 for line in lines[: len(answered)]))
            yield answered, keep
    except BaseException:
        if not growing.stat().st_size:
            # nothing was answered, so nothing is left
            growing.unlink()
            mark.unlink()
        raise
    if growing != path:
        samples = [json.loads(line) for line in growing.read_bytes().split(b"\n")[:-1]]
        text = json.dumps(samples, ensure_ascii=False, indent=1) + "\n"
        storage.write_bytes(str(path.absolute()), text.encode())
        growing.unlink()
    mark.unlink()


def _parsed(line: bytes) -> Any:
    try:
        return value_of(line)
    except ValueError:
        return None
