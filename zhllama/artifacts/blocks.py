"""Blocks of 8 MiB, each with a digest, so that a range is verified without reading the rest.

Every file of an artifact carries its SHA-256; files over 8 MiB a BLAKE3 digest per block besides (in `blocks.json`,
named by the manifest): 0.25 CPU-seconds per GB where SHA-256 costs 0.6. What is read is verified; a mismatch is read
once more and is then an error that names file, range, wanted and found. Blocks are read and verified side by side.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from blake3 import blake3

from zhllama import storage
from zhllama.artifacts.manifest import File, Manifest
from zhllama.errors import InputError

BLOCKS = "blocks.json"
BLOCK = 8 * 2**20


def block_digests(content: bytes | bytearray | memoryview) -> list[str]:
    """The digest of every 8 MiB block of a file's bytes (BLAKE3, hexadecimal); the last one may be shorter."""
    view = memoryview(content)
    return [blake3(view[at : at + BLOCK]).hexdigest() for at in range(0, len(view), BLOCK)]


class Source(Protocol):
    """Where the bytes of an artifact's files come from: a store, or a repository of the Hub."""

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fills `buffer` with a file's bytes from `start`. FileNotFoundError when it is gone."""

    def read_piece(
        self, name: str, start: int, length: int, buffer: memoryview, take: storage.Take | None = None
    ) -> None:
        """By one request, into `buffer`; `take` gets what comes, by its place from `start`, and `buffer` is then room
        for storage.STEP bytes."""

    def read_bytes(self, name: str, start: int, length: int) -> bytes:
        """A range."""


class StoredFiles:
    """The files below an address of the store, as a Source."""

    def __init__(self, root: str) -> None:
        self._root = root

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        storage.read_into(storage.join(self._root, name), start, buffer)

    def read_piece(
        self, name: str, start: int, length: int, buffer: memoryview, take: storage.Take | None = None
    ) -> None:
        storage.read_piece(storage.join(self._root, name), start, length, buffer, take)

    def read_bytes(self, name: str, start: int, length: int) -> bytes:
        return storage.read_bytes(storage.join(self._root, name), start, length)


class BlockReader:
    """Reads an artifact's files, verified by their blocks; those of a plain folder as they are."""

    def __init__(self, manifest: Manifest, verified: bool, source: Source) -> None:
        self.manifest = manifest
        self.verified = verified
        self.source = source
        self.root = manifest.root
        self._digests: dict[str, list[str]] | None = None
        self._edges: list[tuple[str, int, bytearray]] = []
        """The last blocks that were read and not wanted whole: who reads on from there reads nothing twice."""
        self._spare: list[bytearray] = []
        """Memory of edges that were given up: fresh memory would cost more than reading into it."""
        self._edges_lock = threading.Lock()
        self._edge_turns = [threading.Lock() for _ in range(16)]
        """Held while an edge is read, by its number."""

    def read(self, file: File, start: int, buffer: memoryview) -> None:
        end = start + len(buffer)
        if not self.verified or not len(buffer):
            with self.naming(file):
                self.source.read_into(file.path, start, buffer)
            return
        wanted = self.block_digests(file)

        def read(run: range) -> None:
            first, last = run.start * BLOCK, min(run.stop * BLOCK, file.size)
            if start <= first and last <= end:
                self.read_run(file, run, wanted, buffer[first - start : last - start])
                return
            low, high = max(first, start), min(last, end)
            part = slice(low - first, high - first)
            self._read_edge(file, run.start, wanted[run.start], last - first, part, buffer[low - start : high - start])

        whole = range(-(-start // BLOCK), end // BLOCK if end < file.size else len(wanted))
        edges = [range(i, i + 1) for i in sorted({start // BLOCK, (end - 1) // BLOCK}) if i not in whole]
        runs = [*edges, *runs_of(whole)]
        if "://" in self.root and len(runs) > 1:
            storage.in_parallel(read, runs)
            return
        # a folder keeps nobody waiting for an answer; new threads for every read would cost a merge a tenth of its time
        for run in runs:
            read(run)

    def read_run(
        self, file: File, run: range, wanted: list[str], buffer: memoryview, put: storage.Take | None = None
    ) -> None:
        """Reads consecutive blocks by one request; a block that is not as it should be is read again.

        They fill `buffer`, or go to `put` as they come, by their place in the file: before they are verified, and again
        when they are read again. `buffer` then needs storage.STEP bytes.
        """
        if len(run) == 1:
            self.read_block(file, run.start, wanted[run.start], buffer, put=put)
            return
        start, length = run.start * BLOCK, run_length(file, run)
        if not self.verified:
            self._read_piece(file, start, length, buffer, put)
            return
        found = self._read_hashed(file, start, length, buffer, blake3, put)
        for index, digest in zip(run, found, strict=True):
            if digest != wanted[index]:
                at = 0 if put else (index - run.start) * BLOCK
                self.read_block(file, index, wanted[index], buffer[at : at + BLOCK], tries=1, put=put)

    def _read_edge(self, file: File, index: int, wanted: str, length: int, part: slice, buffer: memoryview) -> None:
        """Fills `buffer` with a part of a block, which is verified whole.

        Two such blocks are kept: the ends of a range, or the places of two readers. They are looked at with the lock
        held, since their memory is used again. Of two that want the same block, one reads it and the other one waits.
        """
        with self._edge_turns[index % len(self._edge_turns)]:
            with self._edges_lock:
                for path, number, kept in self._edges:
                    if (path, number) == (file.path, index):
                        buffer[:] = memoryview(kept)[part]
                        return
                room = self._spare.pop() if self._spare else bytearray()
            if len(room) < length:
                room = bytearray(length)
            block = memoryview(room)[:length]
            self.read_block(file, index, wanted, block)
            buffer[:] = block[part]
            with self._edges_lock:
                self._edges.insert(0, (file.path, index, room))
                self._spare += [given_up for _, _, given_up in self._edges[2:]]
                del self._edges[2:]

    def read_block(
        self, file: File, index: int, wanted: str, buffer: memoryview, tries: int = 2, put: storage.Take | None = None
    ) -> None:
        """As read_run, one block; it is read once more when it is not as it should be."""
        uri, at = storage.join(self.root, file.path), index * BLOCK
        length = run_length(file, range(index, index + 1)) if put else len(buffer)
        if not self.verified:
            self._read_piece(file, at, length, buffer, put)
            return
        kind = "sha256" if wanted == file.sha256 else "blake3"
        for _ in range(tries):
            algorithm = hashlib.sha256 if kind == "sha256" else blake3
            (found,) = self._read_hashed(file, at, length, buffer, algorithm, put)
            if found == wanted:
                return
        raise InputError(
            f"{uri}: bytes {at} to {at + length}: {kind} {wanted} expected, {found} found; "
            "the stored file is corrupt, run its stage again"
        )

    def _read_hashed(
        self,
        file: File,
        start: int,
        length: int,
        buffer: memoryview,
        algorithm: Callable[[], Any],
        put: storage.Take | None,
    ) -> list[str]:
        """Reads by one request, to where read_run does; returns the digest found of each block."""
        hashed = BlockHasher(start, length, algorithm)

        def take(place: int, piece: memoryview) -> None:
            hashed.take(place, piece)
            if put:
                put(place, piece)

        self._read_piece(file, start, length, buffer, take)
        return hashed.digests()

    def _read_piece(self, file: File, start: int, length: int, buffer: memoryview, take: storage.Take | None) -> None:
        """Reads by one request, unverified; `take` gets what comes by its place in the file."""

        def placed(at: int, piece: memoryview) -> None:
            assert take is not None
            take(start + at, piece)

        with self.naming(file):
            self.source.read_piece(file.path, start, length, buffer, placed if take else None)

    @contextmanager
    def naming(self, file: File) -> Iterator[None]:
        """InputError that names a file which is gone."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(
                f"{self.root}/{file.path}: the file is gone; run its stage again or give another reference"
            ) from error

    def block_digests(self, file: File) -> list[str]:
        """A digest per block of a verified file: its SHA-256 where it is one block."""
        if file.size <= BLOCK:
            return [file.sha256]
        if self._digests is None:
            if self.manifest.blocks is None:
                raise InputError(
                    f"{self.root}: the manifest names no block digests for {file.path}; run its stage again"
                )
            entry = next(file for file in self.manifest.files if file.path == self.manifest.blocks)
            content = bytearray(entry.size)
            self.read_block(entry, 0, entry.sha256, memoryview(content))
            written = json.loads(content)
            if written.get("digest") != "blake3" or written.get("bytes") != BLOCK:
                raise InputError(f"{self.root}/{entry.path}: written by another version; run its stage again")
            self._digests = written["files"]
        found = self._digests.get(file.path, [])
        if len(found) != -(-file.size // BLOCK):
            raise InputError(f"{self.root}: the block digests of {file.path} are incomplete; run its stage again")
        return found

    def digests_or_none(self, file: File) -> list[str]:
        """A digest per block, one block at least; empty ones where nothing is known."""
        return self.block_digests(file) if self.verified else [""] * max(1, -(-file.size // BLOCK))


def runs_of(blocks: range) -> list[range]:
    """Consecutive blocks, as many as one request asks for: each request costs either end some milliseconds."""
    step = max(1, storage.PIECE // BLOCK)
    return [blocks[at : at + step] for at in range(0, len(blocks), step)]


def run_length(file: File, run: range) -> int:
    """Bytes of consecutive blocks of a file."""
    return min(run.stop * BLOCK, file.size) - run.start * BLOCK


class BlockHasher:
    """The digests of a file's consecutive blocks, computed while they come: what has just come is in the processor's
    cache. Hashing afterwards costs half as much again, since each byte comes from memory once more.
    """

    def __init__(self, start: int, length: int, algorithm: Callable[[], Any]) -> None:
        """start: the first block's first byte in the file."""
        self._start, self._length = start, length
        self._algorithm = algorithm
        self._begin()

    def _begin(self) -> None:
        self._came = 0
        self._digests: list[str] = []
        self._block = self._algorithm()

    def take(self, place: int, piece: memoryview) -> None:
        """As storage.Take, by the place in the file."""
        if place == self._start:
            self._begin()
        while piece:
            part = piece[: BLOCK - self._came % BLOCK]
            self._block.update(part)
            self._came += len(part)
            piece = piece[len(part) :]
            if self._came % BLOCK == 0 or self._came == self._length:
                self._end_block()

    def _end_block(self) -> None:
        self._digests.append(self._block.hexdigest())
        self._block = self._algorithm()

    def digests(self) -> list[str]:
        """Of every block, when all came; where there is nothing to come there is one block, too."""
        if not self._digests:
            self._end_block()
        return self._digests


class StepOfThread(threading.local):
    """Memory for what has just come, for each thread."""

    def __init__(self) -> None:
        self.room = memoryview(bytearray(storage.STEP))
