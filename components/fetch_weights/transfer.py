"""The copying: parts of files side by side, hashed in order while they pass, going on where a killed fetch stopped.

Parts of 16 MiB are fetched and put into the store by a few threads, within one file and across files; their bytes then
pass, in order, through the hashes. Memory: `parallel + 2` parts. A file is in its place only when its sums are right.

After a kill: a file that is complete is kept, and of one under way the parts that are in the store (an unfinished
multipart upload, a hidden file); neither is fetched again. Their bytes passed through no hash of ours, so such a file
is read once from the store and hashed there; one that is not as it should be is dropped and fetched anew.

The digests of the 8 MiB blocks are the threads' work; SHA-256 of the whole is one core's: 1.8 GB/s, or 0.5 with a
checklist's MD5.
"""

import hashlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from components.fetch_weights.resumable import PartsWriter, extents, open_parts
from components.fetch_weights.sources import Found, Source
from zhllama import storage
from zhllama.artifacts.blocks import block_digests
from zhllama.artifacts.manifest import File
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError, StorageFault
from zhllama.progress import Progress, human

log = logging.getLogger("fetch")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Item:
    """A file to fetch: from where, and the sums it must have (None: not known), each with who says so."""

    source: Source
    found: Found
    sha256: str | None = None
    sha256_by: str = ""
    md5: str | None = None
    md5_by: str = ""

    @property
    def name(self) -> str:
        return self.found.name

    @property
    def verified_by(self) -> str:
        """`the published table, checklist.chk`; empty when no sum is known."""
        return ", ".join(by for by, known in ((self.sha256_by, self.sha256), (self.md5_by, self.md5)) if known)


class Sums:
    """The hashes of one file, fed in order: SHA-256, MD5 where a checklist has one. The blocks' digests come along."""

    def __init__(self, with_md5: bool) -> None:
        self._sha256 = hashlib.sha256()
        # Meta's checklists are MD5; it decides nothing that SHA-256 does not
        self._md5 = hashlib.md5(usedforsecurity=False) if with_md5 else None
        self.size = 0
        self.blocks: list[str] = []

    def add(self, content: bytes, blocks: list[str]) -> None:
        """The next bytes, and the digests of their blocks (whole ones, but for the end of the file)."""
        self._sha256.update(content)
        if self._md5 is not None:
            self._md5.update(content)
        self.blocks += blocks
        self.size += len(content)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def check(self, item: Item) -> None:
        """InputError for bytes that are not the wanted ones, StorageFault when some are missing."""
        where = f"{item.source.address}/{item.name}"
        if item.found.size is not None and self.size != item.found.size:
            raise StorageFault(
                f"{where}: {self.size} bytes came of {item.found.size}; it was cut short or changed, try again"
            )
        md5 = self._md5.hexdigest() if self._md5 is not None else None
        for kind, wanted, by, found in (
            ("sha256", item.sha256, item.sha256_by, self.sha256),
            ("md5", item.md5, item.md5_by, md5),
        ):
            if wanted is not None and found != wanted:
                raise InputError(
                    f"{where}: {kind} {wanted} expected (by {by}), {found} found; fetch it again, or pass --expect if "
                    "these are other weights"
                )


@dataclass
class _File:
    """A file on its way.

    at_rest: it lies in its place already and is only read and hashed there. anew: nothing of an earlier fetch is used.
    counted: its bytes are in the progress already. left: jobs whose results have not been taken.
    """

    item: Item
    target: str
    at_rest: bool = False
    anew: bool = False
    counted: bool = False
    writer: PartsWriter | None = None
    left: int = 0
    sums: Sums = field(default_factory=lambda: Sums(False))


def transfer(items: Iterable[Item], out: ArtifactWriter, parallel: int) -> None:
    """Brings all files into `out`. InputError for a wrong sum, StorageFault for a source or store that fails."""
    _Transfer(list(items), out, parallel).run()


class _Transfer:
    def __init__(self, items: list[Item], out: ArtifactWriter, parallel: int) -> None:
        self._out = out
        self._parallel = parallel
        self._stop = threading.Event()
        self._bar_lock = threading.Lock()
        there = {stored.name: stored.size for stored in storage.listing(out.root)} if items else {}
        self._queue = deque(
            _File(item, storage.join(out.root, item.name), at_rest=there.get(item.name, -1) == item.found.size)
            for item in items
        )
        self._open: list[PartsWriter] = []
        sizes = [item.found.size for item in items]
        self._total = None if None in sizes else sum(size or 0 for size in sizes)

    def run(self) -> None:
        kept = [file.item for file in self._queue if file.at_rest]
        if kept:
            size = human(sum(item.found.size or 0 for item in kept), "B")
            log.info("going on: %d files (%s) are there already and are only checked", len(kept), size)
        with Progress("fetching", self._total) as self._bar, ThreadPoolExecutor(self._parallel) as pool:
            try:
                # a file whose parts were kept, or turned out wrong, is queued again when it has ended
                while self._queue:
                    for file, content, blocks in _in_order(pool, self._parallel + 2, self._jobs()):
                        self._take(file, content, blocks)
            finally:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                for writer in self._open:
                    writer.suspend()

    def _jobs(self) -> Iterator[Callable[[], tuple[_File, bytes, list[str]]]]:
        while self._queue:
            file = self._queue.popleft()
            yield from self._jobs_of(file)

    def _jobs_of(self, file: _File) -> Iterator[Callable[[], tuple[_File, bytes, list[str]]]]:
        item, size = file.item, file.item.found.size
        file.sums = Sums(item.md5 is not None)
        if size is None or (size > storage.PART and not file.at_rest and not item.source.ranged(item.name)):
            file.left = 1
            yield partial(self._stream, file)
            return
        missing = dict(enumerate(extents(size)))
        if not file.at_rest:
            file.writer = open_parts(file.target, size, file.anew)
            self._open.append(file.writer)
            if file.writer.kept:
                # hashed when the file is whole, from the store
                there = sum(missing.pop(number)[1] for number in file.writer.kept)
                log.info("%s: going on, %s of %s are there", item.name, human(there, "B"), human(size, "B"))
                self._advance(file, there)
        file.left = len(missing)
        for number, (start, length) in missing.items():
            yield partial(self._part, file, number, start, length)
        if not missing:
            # all its parts were kept: only the end is missing
            file.left = 1
            yield lambda: (file, b"", [])

    def _part(self, file: _File, number: int, start: int, length: int) -> tuple[_File, bytes, list[str]]:
        item = file.item
        if file.at_rest:
            content = storage.read_bytes(file.target, start, length)
            self._advance(file, length)
            return file, content, block_digests(content)
        assert file.writer is not None
        pieces = []
        # a file of one part is asked for as it is: not every server knows ranges
        whole = length == item.found.size
        for piece in item.source.chunks(item.name) if whole else item.source.part(item.name, start, length):
            if self._stop.is_set():
                raise _Stopped
            pieces.append(piece)
            self._advance(file, len(piece))
        content = b"".join(pieces)
        file.writer.put(number, content)
        if file.writer.kept:
            # hashed later, from the store
            return file, b"", []
        return file, content, block_digests(content)

    def _stream(self, file: _File) -> tuple[_File, bytes, list[str]]:
        """A file whose size is not known, or whose source gives no parts: from its beginning to its end."""
        item = file.item
        with self._out.writer(item.name) as stream:
            for chunk in item.source.chunks(item.name):
                if self._stop.is_set():
                    raise _Stopped
                stream.write(chunk)
                file.sums.add(chunk, [])
                self._advance(file, len(chunk))
            file.sums.check(item)
        return file, b"", []

    def _take(self, file: _File, content: bytes, blocks: list[str]) -> None:
        """A job's result, in order; the last of a file ends it."""
        if content:
            file.sums.add(content, blocks)
        file.left -= 1
        if file.left:
            return
        writer, file.writer = file.writer, None
        if writer is not None:
            self._open.remove(writer)
            if writer.kept:
                writer.commit()
                file.at_rest = file.counted = True
                self._queue.append(file)
                return
            try:
                file.sums.check(file.item)
            except InputError:
                writer.abort()
                raise
            writer.commit()
        elif file.at_rest:
            try:
                file.sums.check(file.item)
            except (InputError, StorageFault) as error:
                storage.delete(file.target)
                log.warning("what an earlier fetch left is not as it should be, and is fetched anew: %s", error)
                file.at_rest, file.anew, file.counted = False, True, True
                self._queue.append(file)
                return
        else:
            return
        self._out.add_stored(File(file.item.name, file.sums.size, file.sums.sha256), file.sums.blocks)

    def _advance(self, file: _File, count: int) -> None:
        if not file.counted:
            with self._bar_lock:
                self._bar.advance(count)


def _in_order(pool: ThreadPoolExecutor, limit: int, jobs: Iterator[Callable[[], Result]]) -> Iterator[Result]:
    """The jobs' results in their order, at most `limit` of them under way or not taken yet."""
    window: deque[Future[Any]] = deque()
    for job in jobs:
        window.append(pool.submit(job))
        if len(window) == limit:
            yield window.popleft().result()
    while window:
        yield window.popleft().result()


class _Stopped(Exception):
    """Another file failed."""
