"""Blocks of 8 MiB, each with a digest, so that a range is verified without reading the rest.

Every file of an artifact carries its SHA-256; files over 8 MiB a BLAKE3 digest per block besides (in `blocks.json`,
named by the manifest): 0.25 CPU-seconds per GB where SHA-256 costs 0.6. What is read is verified; a mismatch is read
once more and is then an error that names file, range, wanted and found. Blocks are read and verified side by side.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from blake3 import blake3

from zhllama import storage
from zhllama.artifacts.json_file import object_of
from zhllama.artifacts.manifest import File, Manifest, placeless_digest
from zhllama.errors import InputError

BLOCKS = "blocks.json"
BLOCK = 8 * 2**20
LARGEST = 256 * 2**20
"""Bytes of a blocks.json that is read: of an artifact of some 30 TB."""

Source = Callable[[str, int, int, memoryview, storage.Take | None], None]
"""Where the bytes of an artifact's files come from, a store or a repository of the Hub: `source(name, start, length,
buffer, take)` reads as storage.read_piece does. FileNotFoundError for a file that is gone."""


def stored_files(root: str) -> Source:
    """The files below an address of the store."""

    def read(name: str, start: int, length: int, buffer: memoryview, take: storage.Take | None) -> None:
        if take:
            storage.read_piece(storage.join(root, name), start, length, buffer, take)
        else:
            storage.read_into(storage.join(root, name), start, buffer[:length])

    return read


class BlockHasher:
    """The digests of a file's consecutive blocks, computed while they come: what has just come is in the processor's
    cache. Hashing afterwards costs half as much again, since each byte comes from memory once more."""

    def __init__(self, algorithm: Callable[[], Any] = blake3) -> None:
        self._algorithm = algorithm
        self.begin()

    def begin(self) -> None:
        """What came before does not count."""
        self._left = BLOCK
        self._ended: list[str] = []
        self._block = self._algorithm()

    def update(self, piece: memoryview) -> None:
        while piece:
            part = piece[: self._left]
            self._block.update(part)
            self._left -= len(part)
            piece = piece[len(part) :]
            if not self._left:
                self._ended.append(self._block.hexdigest())
                self._left, self._block = BLOCK, self._algorithm()

    def digests(self) -> list[str]:
        """Of every block so far; where nothing came there is one block, too."""
        whole = self._left == BLOCK and self._ended
        return self._ended if whole else [*self._ended, self._block.hexdigest()]


def block_digests(content: bytes | bytearray | memoryview) -> list[str]:
    """The digest of every 8 MiB block of a file's bytes (BLAKE3, hexadecimal); the last one may be shorter."""
    view = memoryview(content)
    return [blake3(view[at : at + BLOCK]).hexdigest() for at in range(0, len(view), BLOCK)]


def runs_of(blocks: range) -> list[range]:
    """Consecutive blocks, as many as one request asks for: each request costs either end some milliseconds."""
    step = max(1, storage.PIECE // BLOCK)
    return [blocks[at : at + step] for at in range(0, len(blocks), step)]


def run_length(file: File, run: range) -> int:
    """Bytes of consecutive blocks of a file."""
    return min(run.stop * BLOCK, file.size) - run.start * BLOCK


class BlockReader:
    """Reads an artifact's files, verified by their blocks; those of a plain folder as they are."""

    def __init__(self, manifest: Manifest, verified: bool, source: Source) -> None:
        self._manifest, self._verified, self.source = manifest, verified, source
        self._digests: dict[str, list[str]] | None = None
        self._edges: dict[tuple[str, int], bytearray] = {}
        """The last blocks that were read and not wanted whole: who reads on from there reads nothing twice."""
        self._spare: list[bytearray] = []
        """Memory of edges that were given up: fresh memory would cost more than reading into it."""
        self._edges_lock = threading.Lock()
        self._edge_turns = [threading.Lock() for _ in range(16)]
        """Held while an edge is read, by its number."""

    def read(self, file: File, start: int, buffer: memoryview) -> None:
        end = start + len(buffer)
        if not self._verified or not len(buffer):
            with self.naming(file):
                self.source(file.path, start, len(buffer), buffer, None)
            return
        wanted = self.block_digests(file)

        def read(run: range) -> None:
            first, last = run.start * BLOCK, min(run.stop * BLOCK, file.size)
            low, high = max(first, start), min(last, end)
            room = buffer[low - start : high - start]
            if (low, high) == (first, last):
                self.read_run(file, run, wanted, room)
            else:
                self._read_edge(file, run, wanted, slice(low - first, high - first), room)

        whole = range(-(-start // BLOCK), end // BLOCK if end < file.size else len(wanted))
        edges = [range(i, i + 1) for i in sorted({start // BLOCK, (end - 1) // BLOCK}) if i not in whole]
        runs = [*edges, *runs_of(whole)]
        if "://" in self._manifest.root and len(runs) > 1:
            storage.in_parallel(read, runs)
            return
        # a folder keeps nobody waiting for an answer; new threads for every read would cost a merge a tenth of its time
        for run in runs:
            read(run)

    def read_run(
        self, file: File, run: range, wanted: list[str], buffer: memoryview, put: storage.Take | None = None
    ) -> None:
        """Reads consecutive blocks by one request, one that is not as it should be once more. They fill `buffer`, or go
        to `put` as they come, unverified, by their place in the file; `buffer` then needs storage.STEP bytes."""
        found = self._read_hashed(file, run, buffer, put)
        for index in run if self._verified else ():
            digest, at = wanted[index], (index - run.start) * BLOCK
            if found[index - run.start] == digest:
                continue
            again = range(index, index + 1)
            (last,) = self._read_hashed(file, again, buffer if put else buffer[at : at + BLOCK], put)
            if last != digest:
                raise self._corrupt(file, index * BLOCK, run_length(file, again), digest, last)

    def _corrupt(self, file: File, start: int, length: int, digest: str, found: str) -> InputError:
        kind = "sha256" if digest == file.sha256 else "blake3"
        wrong = f"bytes {start} to {start + length}: {kind} {digest} expected, {found} found"
        where = f"{self._manifest.root}/{file.path}"
        return InputError(f"{where}: {wrong}; the stored file is corrupt, run its stage again")

    def _read_hashed(self, file: File, run: range, buffer: memoryview, put: storage.Take | None) -> list[str]:
        """Reads by one request, to where read_run does; returns the digest found of each block, if they are known."""
        start = run.start * BLOCK
        hashed = BlockHasher(hashlib.sha256 if file.size <= BLOCK else blake3)

        def take(at: int, piece: memoryview) -> None:
            if self._verified:
                if at == 0:
                    hashed.begin()
                hashed.update(piece)
            if put:
                put(start + at, piece)

        with self.naming(file):
            self.source(file.path, start, run_length(file, run), buffer, take)
        return hashed.digests()

    def _read_edge(self, file: File, run: range, wanted: list[str], part: slice, buffer: memoryview) -> None:
        """Fills `buffer` with a part of a block, which is verified whole. Two such blocks are kept: the ends of a
        range, or the places of two readers. They are looked at with the lock held, since their memory is used again. Of
        two that want the same block, one reads it and the other one waits."""
        index, length = run.start, run_length(file, run)
        with self._edge_turns[index % len(self._edge_turns)]:
            with self._edges_lock:
                if kept := self._edges.get((file.path, index)):
                    buffer[:] = memoryview(kept)[part]
                    return
                room = self._spare.pop() if self._spare else bytearray()
            if len(room) < length:
                room = bytearray(length)
            block = memoryview(room)[:length]
            self.read_run(file, run, wanted, block)
            buffer[:] = block[part]
            with self._edges_lock:
                self._edges[file.path, index] = room
                while len(self._edges) > 2:
                    self._spare.append(self._edges.pop(next(iter(self._edges))))

    @contextmanager
    def naming(self, file: File) -> Iterator[None]:
        """InputError that names a file which is gone."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError) as error:
            mend = "run its stage again or give another reference"
            raise InputError(f"{self._manifest.root}/{file.path}: the file is gone; {mend}") from error

    def read_whole(self, file: File) -> bytearray:
        """A file by its SHA-256 alone, however many blocks it has; read once more where it is not as it should be."""
        if file.size > LARGEST:
            wrong = f"it has {file.size:,} bytes, and {LARGEST:,} are read at most"
            raise InputError(f"{self._manifest.root}/{file.path}: {wrong}; run its stage again")
        content, found = bytearray(file.size), ""
        for _ in range(2):
            with self.naming(file):
                self.source(file.path, 0, file.size, memoryview(content), None)
            found = hashlib.sha256(content).hexdigest()
            if found == file.sha256:
                return content
        raise self._corrupt(file, 0, file.size, file.sha256, found)

    def _require_content(self, file: File) -> None:
        """InputError where a file says something else than the artifact's digest is of, whatever its own SHA-256."""
        content = bytes(self.read_whole(file))
        try:
            right = placeless_digest(content) == file.content
        except ValueError:
            right = False
        if not right:
            where = f"{self._manifest.root}/{file.path}"
            raise InputError(f"{where}: it was changed after it was published; run its stage again")

    def block_digests(self, file: File) -> list[str]:
        """A digest per block, one block at least: the SHA-256 of a file that is one block, "" where none are known."""
        root, named = self._manifest.root, self._manifest.blocks
        if not self._verified:
            return [""] * max(1, -(-file.size // BLOCK))
        if file.content:
            self._require_content(file)
        if file.size <= BLOCK:
            return [file.sha256]
        if self._digests is None:
            if named is None:
                raise InputError(f"{root}: the manifest names no block digests for {file.path}; run its stage again")
            entry = next(file for file in self._manifest.files if file.path == named)
            content = self.read_whole(entry)
            try:
                written = object_of(bytes(content))
                if written.get("digest") != "blake3" or written.get("bytes") != BLOCK:
                    raise ValueError("written by another version")
                self._digests = {**written["files"], named: block_digests(content)}
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{root}/{entry.path}: no block digests ({error}); run its stage again") from error
        found = self._digests.get(file.path, [])
        if not isinstance(found, list) or len(found) != -(-file.size // BLOCK):
            raise InputError(f"{root}: the block digests of {file.path} are incomplete; run its stage again")
        return found
