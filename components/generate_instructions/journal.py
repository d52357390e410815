"""What was sent and what came of it, kept line by line before anything else happens: the memory of the bill.

A line is a JSON object; `append` returns when it is on the disk (fsync) and, for a store in S3, in S3 too. S3 cannot
append, so what has gathered while the last upload ran goes up as the next object: the interval is one upload, some
hundredths of a second, and nothing is sent to the model before S3 knows of it. 200 objects are put together into one.
A run that goes on, here or on another machine, reads all of them and what is on this disk; a line that was cut short
by the end of a process is dropped.

The journal belongs to the requests (model, address, catalogue, seeds, seed, …), not to how many items are wanted: more
items, a higher limit or other files to compare with go on from the same answers.
"""

import asyncio
import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping
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
    """The lines of one place, and an append. `with Journal(place) as journal`: `journal.records` holds what was there.

    place: a folder or an s3:// prefix that belongs to this journal alone.
    """

    def __init__(self, place: str) -> None:
        self._s3 = place if storage.is_s3(place) else ""
        self._folder = _spool(place) if self._s3 else Path(place)
        self._objects: list[str] = []
        self._next = 0
        self._waiting: list[tuple[bytes, asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None
        self._fault: BaseException | None = None
        self.records: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = open(self._folder / NAME, "a+b")
        _sync_folder(self._folder)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise InputError(
                f"{self._folder / NAME}: another run is adding answers to it; wait for it, or give another --seed"
            ) from error
        try:
            self._load()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _load(self) -> None:
        mine = _whole_lines(self._file)
        if not self._s3:
            self.records = list(_records(mine, str(self._folder / NAME)))
            return
        theirs = self._fetched()
        known = set(theirs)
        only_here, only_there = [line for line in mine if line not in known], set(theirs) - set(mine)
        # one order for both: S3's, then what a process that was killed had not sent there yet
        lines = [*theirs, *only_here]
        if only_here:
            self._upload(only_here)
        if only_there:
            self._file.truncate(0)
            _append(self._file, lines)
        self.records = list(_records(lines, self._s3))
        self._put_together()

    def _fetched(self) -> list[bytes]:
        names = [item.name for item in storage.listing(self._s3) if item.name.endswith(".jsonl")]
        with ThreadPoolExecutor(8) as pool:
            contents = list(pool.map(lambda name: storage.read_bytes(storage.join(self._s3, name)), names))
        self._objects = names
        self._next = 1 + max((int(name.split(".")[0]) for name in names), default=-1)
        lines: dict[bytes, None] = {}
        for content in contents:
            # an object that was put together and those that it was made of may both be there
            lines.update(dict.fromkeys(content.splitlines()))
        return list(lines)

    async def append(self, record: Mapping[str, Any]) -> None:
        """Adds a line and returns when it will survive. StorageFault when S3 cannot be written."""
        if self._fault is not None:
            raise self._fault
        # as json.loads reads it back: half a character in a server's message must not cost the line
        line = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((line, done))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write())
        await asyncio.shield(done)

    async def _write(self) -> None:
        """Writes what waits, all of it at once, until nothing waits."""
        while self._waiting:
            batch, self._waiting = self._waiting, []
            try:
                await asyncio.to_thread(self._keep, [line for line, _ in batch])
            except (OSError, InputError, StorageFault) as error:
                self._fault = error
                for _, done in (*batch, *self._waiting):
                    if not done.done():
                        done.set_exception(error)
                        # whoever waited may have been cancelled
                        done.exception()
                self._waiting = []
                return
            for _, done in batch:
                if not done.done():
                    done.set_result(None)

    def _keep(self, lines: list[bytes]) -> None:
        _append(self._file, lines)
        if self._s3:
            self._upload(lines)
            self._put_together()

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


def _sync_folder(folder: Path) -> None:
    """Makes the file's name in its folder durable, as its content is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _spool(place: str) -> Path:
    """Where a journal in S3 lies on this machine meanwhile."""
    return cache_folder() / "journals" / digest_of([os.environ.get("ZHLLAMA_S3_ENDPOINT") or "", place])[:32]


def _joined(lines: list[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)


def _append(file: Any, lines: list[bytes]) -> None:
    file.write(_joined(lines))
    file.flush()
    os.fsync(file.fileno())


def _whole_lines(file: Any) -> list[bytes]:
    """The lines of a journal on disk; what follows the last line break was never finished, and is cut away."""
    file.seek(0)
    content = file.read()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        log.warning("%s: dropped %d bytes of a line that was cut short", file.name, len(content) - whole)
        file.truncate(whole)
    return content[:whole].splitlines()


def _records(lines: list[bytes], where: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and isinstance(record.get("event"), str):
            yield record
        else:
            log.warning("%s: line %d is damaged, and left out", where, number)
