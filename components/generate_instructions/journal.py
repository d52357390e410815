"""What was sent and what came of it, kept line by line before anything else happens: the memory of the bill.

`append` returns when its line is on the disk (fsync) and, for a store in S3, in S3 too, which cannot append: what has
gathered while the last upload ran is the next object, and 200 objects are put together into one. A run that goes on,
here or on another machine, reads all of them and what is on this disk.
"""

import asyncio
import fcntl
import json
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from zhllama import storage
from zhllama.artifacts.cache import cache_folder
from zhllama.artifacts.manifest import digest_of
from zhllama.errors import InputError, StorageFault

log = logging.getLogger("generate_instructions")

NAME = "journal.jsonl"
MOST_OBJECTS = 200
"""In S3, before they are put together."""


class Journal:
    """The lines of one folder or s3:// prefix of its own, and an append. `with Journal(place) as journal`:
    `journal.records` holds what was there."""

    def __init__(self, place: str) -> None:
        self._s3 = place if storage.is_s3(place) else ""
        # where one in S3 lies on this machine meanwhile
        key = digest_of([os.environ.get("ZHLLAMA_S3_ENDPOINT") or "", place])[:32]
        self._folder = cache_folder() / "journals" / key if self._s3 else Path(place)
        self._objects: list[str] = []
        self._next = 0
        self._waiting: list[bytes] = []
        self._one_writes = asyncio.Lock()
        self._fault: Exception | None = None
        self.records: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = open(self._folder / NAME, "a+b")
        try:
            # the file's name in its folder is durable too
            descriptor = os.open(self._folder, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._load()
        except BaseException as error:
            self._file.close()
            if isinstance(error, BlockingIOError):
                raise InputError(
                    f"{self._folder / NAME}: another run is adding answers to it; wait for it, or give another --seed"
                ) from error
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _load(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            log.warning("%s: dropped %d bytes of a line that was cut short", self._file.name, len(content) - whole)
            self._file.truncate(whole)
        lines = content[:whole].splitlines()
        if self._s3:
            self._objects = [item.name for item in storage.listing(self._s3) if item.name.endswith(".jsonl")]
            self._next = 1 + max((int(name.split(".")[0]) for name in self._objects), default=-1)
            with ThreadPoolExecutor(8) as pool:
                contents = pool.map(lambda name: storage.read_bytes(storage.join(self._s3, name)), self._objects)
                # once each: an object and those that it was put together of may both be there
                theirs = dict.fromkeys(line for some in contents for line in some.splitlines())
            # one order everywhere: S3's, then what a process that was killed had not sent there yet
            only_here = [line for line in lines if line not in theirs]
            only_there = theirs.keys() - set(lines)
            lines = [*theirs, *only_here]
            if only_here:
                self._upload(only_here)
            if only_there:
                self._file.truncate(0)
                self._write(lines)
            self._put_together()
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict) and isinstance(record.get("event"), str):
                self.records.append(record)
            else:
                log.warning("%s: line %d is damaged, and left out", self._s3 or self._file.name, number)

    async def append(self, record: Mapping[str, Any]) -> None:
        """Adds a line and returns when it will survive. StorageFault when S3 cannot be written."""
        # as json.loads reads it back: half a character in a server's message must not cost the line
        line = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
        self._waiting.append(line)
        # whoever waits may be cancelled; what is being written is not
        await asyncio.shield(asyncio.create_task(self._keep_what_waits()))

    async def _keep_what_waits(self) -> None:
        """All that waits at once; nothing where an earlier call has taken it along."""
        async with self._one_writes:
            if self._fault is not None:
                raise self._fault
            lines, self._waiting = self._waiting, []
            if lines:
                try:
                    await asyncio.to_thread(self._keep, lines)
                except Exception as error:
                    # those whose lines went along must not believe them safe
                    self._fault = error
                    raise

    def _keep(self, lines: list[bytes]) -> None:
        self._write(lines)
        if self._s3:
            self._upload(lines)
            self._put_together()

    def _write(self, lines: list[bytes]) -> None:
        self._file.write(_joined(lines))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _upload(self, lines: list[bytes]) -> None:
        name = f"{self._next:08d}.jsonl"
        try:
            storage.write_bytes(storage.join(self._s3, name), _joined(lines), if_absent=True)
        except FileExistsError as error:
            raise StorageFault(
                f"{self._s3}/{name}: another run adds answers to this journal; wait for it, or end one of the two"
            ) from error
        self._objects.append(name)
        self._next += 1

    def _put_together(self) -> None:
        """Many small objects into one. Whatever is killed on the way leaves lines twice, which reading mends."""
        if len(self._objects) <= MOST_OBJECTS:
            return
        old, self._objects = self._objects, []
        self._file.seek(0)
        self._upload(self._file.read().splitlines())
        for name in old:
            storage.delete(storage.join(self._s3, name))


def _joined(lines: list[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)
