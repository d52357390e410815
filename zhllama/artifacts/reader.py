"""The artifact, as it is read: whole files, ranges and streams, verified on the way.

Memory beyond what the caller holds: ZHLLAMA_S3_CONNECTIONS (8) x 512 KiB for files, two blocks for ranges.
"""

import io
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Any

from zhllama import storage
from zhllama.artifacts.blocks import BLOCK, BlockReader, Source, run_length, runs_of, stored_files
from zhllama.artifacts.json_file import read_object
from zhllama.artifacts.manifest import File, Manifest
from zhllama.errors import InputError, Truncated
from zhllama.progress import Progress
from zhllama.storage.parallel import STEP, RoomOfThread
from zhllama.storage.prefetch import map_ordered


class Artifact:
    """An artifact that can be read. Open it with `open_artifact`."""

    def __init__(
        self,
        manifest: Manifest,
        verified: bool,
        source: Source | None = None,
        changed: Callable[[], bool] = lambda: False,
    ) -> None:
        """verified: not a plain folder, where there is nothing to verify against. source: of the files' bytes; by
        default what is stored below the manifest's root. changed: whether a plain folder's are others now."""
        self.manifest = manifest
        self.verified = verified
        self.changed = changed
        self.root, self.digest = manifest.root, manifest.digest
        # on a server (s3://, hf://) and not in a folder
        self.remote = "://" in self.root
        self.title = manifest.stage or self.root.rstrip("/").rpartition("/")[2]
        """What a person calls it: its stage, or the last part of its address."""
        self._files = {file.path: file for file in manifest.files}
        self.names = list(self._files)
        self.beside = {file.path: file for file in manifest.beside}
        """What travels with it outside its digest, by name."""
        self.reader = BlockReader(manifest, verified, source or stored_files(self.root))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def file(self, name: str) -> File:
        """The entry of a file; InputError when the artifact has no such file."""
        if name not in self._files:
            has = ", ".join(sorted(self._files)[:8]) or "nothing"
            raise InputError(f"{self.root}: no file {name} in this artifact (it has {has}); give another reference")
        return self._files[name]

    def require_kind(self, *kinds: str, option: str) -> "Artifact":
        """Refuses an artifact of another kind. A plain folder says nothing of its kind and passes."""
        if self.verified and self.manifest.kind not in kinds:
            wanted = " or ".join(kinds)
            raise InputError(f"{option} {self.root}: this is of kind {self.manifest.kind}; {wanted} is needed")
        return self

    def read(self, name: str) -> bytes:
        """A whole file, one of `beside` too."""
        if name in self.beside:
            return bytes(self.reader.read_whole(self.beside[name]))
        return self.read_range(name, 0, self.file(name).size)

    def read_object(self, name: str) -> dict[str, Any]:
        """The JSON object in a file; ValueError as json_file says."""
        return read_object(self, name)

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`, verified by the 8 MiB blocks they lie in (reads up to two blocks more). What
        lies in the last two blocks of which a part was read is not read again."""
        file = self._with_range(name, start, length)
        buffer = bytearray(length)
        self.reader.read(file, start, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """As read_range, into a writable buffer; from a server, blocks side by side. Memory beyond it: two blocks."""
        self.reader.read(self._with_range(name, start, len(buffer)), start, buffer)

    def pour(
        self, name: str, write: Callable[[memoryview], int], advance: Callable[[int], None] = lambda count: None
    ) -> None:
        """The file from its beginning, verified, into `write`, four blocks at a time (from a server, read side by side)
        while the next ones are read; `advance` is told of what it took."""
        size, span = self.file(name).size, 4 * BLOCK
        # taken in turn: one is written, one is ready, one is being read
        buffers = [memoryview(bytearray(min(span, size))) for _ in range(min(3, -(-size // span)))]

        def read(start: int) -> memoryview:
            room = buffers[start // span % 3][: min(span, size - start)]
            self.read_into(name, start, room)
            return room

        with closing(map_ordered(read, range(0, size, span), 1)) as blocks:
            for block in blocks:
                advance(write(block))

    def _with_range(self, name: str, start: int, length: int) -> File:
        file = self.file(name)
        if start < 0 or length < 0 or start + length > file.size:
            raise InputError(f"{self.root}/{name}: bytes {start}+{length} asked of {file.size}; the file is truncated")
        return file

    def read_stored(self, name: str, start: int, length: int) -> bytes:
        """As read_range, unverified: for what is verified in another way."""
        buffer = bytearray(length)
        self.reader.source(name, start, length, memoryview(buffer), None)
        return bytes(buffer)

    def open(self, name: str) -> "io.BufferedReader":
        """A seekable stream over a file; reads are ranges, verified, one block cached."""
        size = self.file(name).size

        # knows nothing of the stream: of a circle the memory would stay until Python looks for such
        @lru_cache(maxsize=2)
        def block(index: int) -> bytes:
            return self.read_range(name, index * BLOCK, min(BLOCK, size - index * BLOCK))

        def read(start: int, most: int) -> bytes:
            return block(start // BLOCK)[start % BLOCK : start % BLOCK + most]

        return io.BufferedReader(RangeStream(size, read), buffer_size=256 * 2**10)

    def fetch(self, folder: Path, names: Iterable[str] | None = None) -> Path:
        """Writes files (default: all but blocks.json) below `folder`, verified, and returns the folder. Many files and
        blocks at a time. OSError (ENOSPC), before anything is moved, when the disk has not the room."""
        chosen = [self.file(name) for name in (self.names if names is None else names) if name != self.manifest.blocks]
        total = sum(file.size for file in chosen)
        storage.check_room(folder, total)
        targets = [_Target(Path(storage.join(str(folder), file.path)), file.size) for file in chosen]
        for parent in {target.path.parent for target in targets}:
            parent.mkdir(parents=True, exist_ok=True)
        step = RoomOfThread(STEP)

        def fetch(file: File, run: range, wanted: list[str], target: _Target) -> None:
            # as it comes: what lies in the processor's cache is copied for a quarter of the time
            self.reader.read_run(file, run, wanted, step.room, target.write)
            target.count(run_length(file, run))
            bar.advance(run_length(file, run))

        try:
            with Progress(f"fetching {self.title}", total) as bar, storage.Threads(storage.connections()) as threads:
                for file, target in zip(chosen, targets):
                    wanted = self.reader.block_digests(file)
                    for run in runs_of(range(len(wanted))):
                        threads.call(fetch, file, run, wanted, target)
        finally:
            for target in targets:
                target.drop()
        return folder

    def verify(self) -> None:
        """Reads every file against its digests; InputError names the first that differs."""
        for wrong in self.find_corruption(first_alone=True):
            raise InputError(wrong)

    def damaged_beside(self) -> list[str]:
        """What is wrong with the files that travel with it."""
        found = []
        for file in self.manifest.beside:
            try:
                self.reader.read_whole(file)
            except (InputError, Truncated) as error:
                found.append(str(error))
        return found

    def find_corruption(self, first_alone: bool = False) -> list[str]:
        """Reads every file against its digests, and says of each block that is not as it should be what is wrong."""
        found = self.damaged_beside()
        step = RoomOfThread(STEP)

        def check(file: File, block: range, wanted: list[str]) -> None:
            try:
                self.reader.read_run(file, block, wanted, step.room, lambda place, piece: None)
            except (InputError, Truncated) as error:
                found.append(str(error))
            bar.advance(run_length(file, block))

        with (
            Progress(f"verifying {self.title}", self.manifest.size) as bar,
            storage.Threads(storage.connections()) as threads,
        ):
            for file in self.manifest.files:
                try:
                    wanted = self.reader.block_digests(file)
                except (InputError, Truncated) as error:
                    found.append(str(error))
                    continue
                for index in range(len(wanted)):
                    if found and first_alone:
                        return found
                    threads.call(check, file, range(index, index + 1), wanted)
        return found if first_alone else sorted(set(found))


class _Target:
    """A file that several threads fill; it gets its name when its last byte counts, and vanishes otherwise."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._left = size
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file: io.FileIO | None = None
        self._ended = False
        self._lock = threading.Lock()

    def _opened(self) -> io.FileIO:
        self._file = self._file or open(self._temporary, "wb", buffering=0)
        return self._file

    def write(self, start: int, piece: memoryview) -> None:
        """Puts a piece into its place; one that was there already, too."""
        with self._lock:
            while piece and not self._ended:
                count = os.pwrite(self._opened().fileno(), piece, start)
                start, piece = start + count, piece[count:]

    def count(self, length: int) -> None:
        """So many bytes are there and verified."""
        with self._lock:
            self._left -= length
            if not self._left and not self._ended:
                self._opened().close()
                os.replace(self._temporary, self.path)
                self._ended = True

    def drop(self) -> None:
        with self._lock:
            if not self._ended and self._file is not None:
                self._file.close()
                self._temporary.unlink(missing_ok=True)
            self._ended = True


class RangeStream(io.RawIOBase):
    """`size` bytes as a seekable stream; `read(start, most)` gives some of them, at least one."""

    def __init__(self, size: int, read: Callable[[int, int], bytes]) -> None:
        self._at, self._size, self._read = 0, size, read

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if at < 0:
            raise io.UnsupportedOperation(f"{-at} bytes before its beginning are asked for")
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        content = self._read(self._at, len(view)) if self._at < self._size else b""
        view[: len(content)] = content
        self._at += len(content)
        return len(content)
