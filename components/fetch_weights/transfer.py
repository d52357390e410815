"""The copying: parts of 16 MiB side by side, hashed in order, going on where a killed fetch stopped.

Memory: `parallel + 2` parts. A file is in its place only when its sums are right. What was kept after a kill
(resumable.py) no hash of ours has seen: such a file is read once from the store, and fetched anew if it is not as it
should be. SHA-256 of the whole is one core's: 1.8 GB/s, or 0.5 with a checklist's MD5.
"""

import hashlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from components.fetch_weights.resumable import Parts, extents, open_parts
from components.fetch_weights.sources import Found, Source
from zhllama import storage
from zhllama.artifacts.blocks import block_digests
from zhllama.artifacts.manifest import File
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError, StorageFault
from zhllama.progress import Progress, human

log = logging.getLogger("fetch")


@dataclass(frozen=True)
class Item:
    """A file to fetch: from where, and the sums it must have: `sha256` or `md5` → hex, and who says so."""

    source: Source
    found: Found
    sums: Mapping[str, tuple[str, str]]

    @property
    def name(self) -> str:
        return self.found.name

    @property
    def verified_by(self) -> str:
        """`the published table, checklist.chk`; empty when no sum is known."""
        return ", ".join(by for _, by in self.sums.values())


class Sums:
    """The hashes of one file, fed in order, and the digests of its blocks, which come along."""

    def __init__(self, item: Item) -> None:
        self.item = item
        # Meta's checklists are MD5; it decides nothing that SHA-256 does not
        self._hashes = {kind: hashlib.new(kind, usedforsecurity=False) for kind in ("sha256", *item.sums)}
        self.size = 0
        self.blocks: list[str] = []

    def add(self, content: bytes, blocks: Iterable[str] = ()) -> None:
        """The next bytes, and the digests of their blocks (whole ones, but for the end of the file)."""
        for each in self._hashes.values():
            each.update(content)
        self.blocks += blocks
        self.size += len(content)

    def check(self) -> str:
        """The SHA-256. InputError for bytes that are not the wanted ones, StorageFault when some are missing."""
        where, size = f"{self.item.source.address}/{self.item.name}", self.item.found.size
        if size is not None and self.size != size:
            raise StorageFault(f"{where}: {self.size} bytes came of {size}; it was cut short or changed, try again")
        for kind, (wanted, by) in self.item.sums.items():
            if (found := self._hashes[kind].hexdigest()) != wanted:
                raise InputError(
                    f"{where}: {kind} {wanted} expected (by {by}), {found} found; fetch it again, or pass --expect if "
                    "these are other weights"
                )
        return self._hashes["sha256"].hexdigest()


class _File(Sums):
    """A file on its way. at_rest: it lies in its place already and is only read and hashed there. again: its bytes are
    in the progress already, and what an earlier fetch left of it is not used. left: jobs whose results have not been
    taken."""

    def __init__(self, item: Item, target: str, at_rest: bool, again: bool = False) -> None:
        super().__init__(item)
        self.target, self.at_rest, self.again = target, at_rest, again
        self.writer: Parts | None = None
        self.left = 1


Result = tuple[_File, bytes, list[str]]


class _Stopped(Exception):
    """Another file failed."""


def transfer(items: Sequence[Item], out: ArtifactWriter, parallel: int) -> None:
    """Brings all files into `out`. InputError for a wrong sum, StorageFault for a source or store that fails."""
    there = {stored.name: stored.size for stored in storage.listing(out.root)}
    files = [
        _File(item, storage.join(out.root, item.name), there.get(item.name, -1) == item.found.size) for item in items
    ]
    if kept := [file.item.found.size or 0 for file in files if file.at_rest]:
        log.info("going on: %d files (%s) are there already and are only checked", len(kept), human(sum(kept), "B"))
    sizes = [item.found.size for item in items]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    storage.require_room(out.root, sum(size or 0 for size in sizes))
    for file, size in zip(files, sizes):
        storage.check_size(file.target, size or 0)
    with Progress("fetching", total) as bar, ThreadPoolExecutor(parallel) as pool:
        _Transfer(files, out, bar).run(pool, parallel + 2)


class _Transfer:
    def __init__(self, files: Iterable[_File], out: ArtifactWriter, bar: Progress) -> None:
        self._queue, self._out, self._bar = deque(files), out, bar
        self._stop = threading.Event()
        self._open: list[Parts] = []

    def run(self, pool: ThreadPoolExecutor, limit: int) -> None:
        """At most `limit` parts are under way or not taken yet."""
        window: deque[Future[Result]] = deque()
        try:
            # a file whose parts were kept, or turned out wrong, is queued again when it has ended
            while self._queue:
                for job in self._jobs():
                    window.append(pool.submit(job))
                    if len(window) == limit:
                        self._take(*window.popleft().result())
                while window:
                    self._take(*window.popleft().result())
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)
            for writer in self._open:
                writer.suspend()

    def _jobs(self) -> Iterator[Callable[[], Result]]:
        while self._queue:
            file = self._queue.popleft()
            item, size = file.item, file.item.found.size
            # a small file is asked for as it is: not every server knows ranges
            if size is None or (not file.at_rest and (size <= storage.PART or not item.source.ranged(item.name))):
                yield partial(self._stream, file)
                continue
            missing = dict(enumerate(extents(size)))
            if not file.at_rest:
                file.writer = open_parts(file.target, size, anew=file.again)
                self._open.append(file.writer)
                if file.writer.kept:
                    there = sum(missing.pop(number)[1] for number in file.writer.kept)
                    log.info("%s: going on, %s of %s are there", item.name, human(there, "B"), human(size, "B"))
                    self._advance(file, there)
            file.left = len(missing) or 1
            for number, (start, length) in missing.items():
                yield partial(self._part, file, number, start, length)
            if not missing:
                # all its parts were kept: only the end is missing
                yield partial(lambda file: (file, b"", []), file)

    def _part(self, file: _File, number: int, start: int, length: int) -> Result:
        if file.writer is None:
            content = storage.read_bytes(file.target, start, length)
            self._advance(file, length)
            return file, content, block_digests(content)
        content = b"".join(self._received(file, file.item.source.chunks(file.item.name, start, length)))
        file.writer.put(number, content)
        # beside kept parts, it is hashed when the file is whole, from the store
        return (file, b"", []) if file.writer.kept else (file, content, block_digests(content))

    def _stream(self, file: _File) -> Result:
        """A file that is small, whose size is not known or whose source gives no parts: from beginning to end."""
        with self._out.writer(file.item.name) as stream:
            for chunk in self._received(file, file.item.source.chunks(file.item.name)):
                stream.write(chunk)
                file.add(chunk)
            file.check()
        return file, b"", []

    def _received(self, file: _File, chunks: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            if self._stop.is_set():
                raise _Stopped
            self._advance(file, len(chunk))
            yield chunk

    def _take(self, file: _File, content: bytes, blocks: list[str]) -> None:
        """A job's result, in order; the last of a file ends it."""
        file.add(content, blocks)
        file.left -= 1
        writer = file.writer
        if file.left or (writer is None and not file.at_rest):
            return
        if writer is not None:
            self._open.remove(writer)
            if writer.kept:
                writer.commit()
                self._queue.append(_File(file.item, file.target, at_rest=True, again=True))
                return
        try:
            sha256 = file.check()
        except (InputError, StorageFault) as error:
            if writer is not None:
                writer.abort()
                raise
            storage.delete(file.target)
            log.warning("what an earlier fetch left is not as it should be, and is fetched anew: %s", error)
            self._queue.append(_File(file.item, file.target, at_rest=False, again=True))
            return
        if writer is not None:
            writer.commit()
        self._out.add_stored(File(file.item.name, file.size, sha256), file.blocks)

    def _advance(self, file: _File, count: int) -> None:
        if not file.again:
            self._bar.advance(count)
