"""The artifact: files under one prefix and, written last, the manifest that makes them visible.

A *reference* is the URI of a manifest (`…/manifest.json`), or a plain folder or prefix: with a manifest in it the two
are the same, without one the files are taken as they are, unverified. Place: `<store>/<stage>/<input key>/`, the key
being the digest of the stage, its source, the versions it uses, its configuration and its inputs' digests: the same
work lands at the same place, which is how a stage sees that it has nothing to do.

Every file carries its SHA-256, and files over 8 MiB a BLAKE3 digest per 8 MiB block (in `blocks.json`, named by the
manifest), so that a range read is verified without reading the rest: 0.25 CPU-seconds per GB where SHA-256 costs 0.6.
Readers verify what they read; a mismatch is read once more and is then an error that names file, range, wanted and
found. The manifest's own digest leaves out place, time and host: equal content, equal digest.

The manifest is written only where none is (If-None-Match), so that of two runs of the same work one publishes; the
other one ends, or takes over the result when it is the same. Blocks are read, verified and written side by side.
Memory beyond what the caller holds: ZHLLAMA_S3_CONNECTIONS (8) x 512 KiB for files, two blocks for ranges.
"""

import fcntl
import hashlib
import io
import json
import logging
import os
import platform
import re
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path
from typing import Any

from blake3 import blake3

from zhllama import storage
from zhllama.errors import InputError, StorageFault, Truncated
from zhllama.progress import Progress
from zhllama.storage.disk_space import require_space
from zhllama.storage.prefetch import ahead
from zhllama.tokenizer.vocabulary import Vocabulary

log = logging.getLogger("artifact")

MANIFEST = "manifest.json"
BLOCKS = "blocks.json"
BLOCK = 8 * 2**20
_STEP = 2**20
"""Bytes of a stream that are hashed, and then written, at once."""
HUB_NAME = r"[\w-][\w.-]*/[\w-][\w.-]*"
"""`owner/name` on the Hugging Face Hub."""
FORMAT = 1


def block_digests(content: bytes | bytearray | memoryview) -> list[str]:
    """The digest of every 8 MiB block of a file's bytes (BLAKE3, hexadecimal); the last one may be shorter."""
    view = memoryview(content)
    return [blake3(view[at : at + BLOCK]).hexdigest() for at in range(0, len(view), BLOCK)]


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class File:
    """A file of an artifact: its name below the root, bytes, SHA-256 (empty in a plain folder: unknown)."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Input:
    """What a stage read: the reference it was given and the digest found behind it."""

    reference: str
    digest: str


@dataclass(frozen=True)
class Manifest:
    """What a stage published. `facts` are the stage's own statements, `metrics` its figures."""

    kind: str
    stage: str
    root: str
    files: tuple[File, ...]
    blocks: str | None = None
    vocabulary: Vocabulary | None = None
    configuration: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Input] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    created: str = ""
    host: str = ""
    digest: str = ""

    @property
    def reference(self) -> str:
        return f"{self.root}/{MANIFEST}"

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def to_value(self) -> dict[str, Any]:
        """As a JSON object."""
        value = asdict(replace(self, files=()))
        # asdict copies what it finds, one by one: a tenth of a second for 10,000 files, several times
        value["files"] = [vars(file) for file in self.files]
        return value

    def computed_digest(self) -> str:
        value = self.to_value()
        for left_out in ("root", "created", "host", "digest"):
            del value[left_out]
        value["inputs"] = {name: given.digest for name, given in self.inputs.items()}
        return digest_of(value)

    def to_json(self) -> bytes:
        return (json.dumps({"format": FORMAT, **self.to_value()}, indent=1, ensure_ascii=False) + "\n").encode()

    @staticmethod
    def from_json(content: bytes, where: str) -> "Manifest":
        """Parses and checks a manifest; InputError when it is not one or does not match its own digest."""
        try:
            value = json.loads(content)
            version = value.pop("format")
            if version != FORMAT:
                raise InputError(f"{where}: manifest format {version}; this program reads format {FORMAT}")
            value["files"] = tuple(File(**file) for file in value["files"])
            value["inputs"] = {name: Input(**given) for name, given in value["inputs"].items()}
            if value["vocabulary"] is not None:
                value["vocabulary"] = Vocabulary(**value["vocabulary"])
            manifest = Manifest(**value)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{where}: not a zhllama manifest ({error}); give the reference a stage wrote") from error
        if manifest.digest != manifest.computed_digest():
            raise InputError(f"{where}: the manifest was changed after it was written; run its stage again")
        for file in manifest.files:
            storage.join(manifest.root, file.path)
        return manifest


class Artifact:
    """An artifact that can be read. Open it with `open_artifact`."""

    def __init__(self, manifest: Manifest, verified: bool) -> None:
        self.manifest = manifest
        self.verified = verified
        """False for a plain folder: there is nothing to verify against."""
        self._files = {file.path: file for file in manifest.files}
        self._blocks: dict[str, list[str]] | None = None
        self._edges: list[tuple[str, int, bytearray]] = []
        """The last blocks that were read and not wanted whole: who reads on from there reads nothing twice."""
        self._spare: list[bytearray] = []
        """Memory of edges that were given up: fresh memory would cost more than reading into it."""
        self._edges_lock = threading.Lock()
        self._edge_turns = [threading.Lock() for _ in range(16)]
        """Held while an edge is read, by its number."""

    @property
    def root(self) -> str:
        return self.manifest.root

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def _remote(self) -> bool:
        """Whether the files lie on a server (s3://, hf://) and not in a folder."""
        return "://" in self.root

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def file(self, name: str) -> File:
        """The entry of a file; InputError when the artifact has no such file."""
        if name not in self._files:
            has = ", ".join(sorted(self._files)[:8]) or "nothing"
            raise InputError(f"{self.root}: no file {name} in this artifact (it has {has}); give another reference")
        return self._files[name]

    def expect(self, *kinds: str, option: str) -> "Artifact":
        """Refuses an artifact of another kind. A plain folder says nothing of its kind and passes."""
        if self.verified and self.manifest.kind not in kinds:
            wanted = " or ".join(kinds)
            raise InputError(f"{option} {self.root}: this is of kind {self.manifest.kind}; {wanted} is needed")
        return self

    def read(self, name: str) -> bytes:
        """A whole file, verified."""
        return self.read_range(name, 0, self.file(name).size)

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`, verified by the 8 MiB blocks they lie in (reads up to two blocks more).

        What lies in the last two blocks of which a part was read is not read again.
        """
        file = self._with_range(name, start, length)
        buffer = bytearray(length)
        self._read(file, start, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """As read_range, into a writable buffer of bytes; from a server, blocks side by side. Memory beyond it: two
        blocks."""
        self._read(self._with_range(name, start, len(buffer)), start, buffer)

    def blocks(self, name: str) -> Iterator[memoryview]:
        """The file from its beginning, verified, four blocks at a time (from a server, read side by side).

        Each is good until the third one after it is asked for: three buffers take turns, so that `ahead` may read on
        meanwhile.
        """
        size, span = self.file(name).size, 4 * BLOCK
        buffers = [memoryview(bytearray(min(span, size))) for _ in range(min(3, -(-size // span)))]
        for start, buffer in zip(range(0, size, span), cycle(buffers)):
            room = buffer[: min(span, size - start)]
            self.read_into(name, start, room)
            yield room

    def _with_range(self, name: str, start: int, length: int) -> File:
        file = self.file(name)
        if start < 0 or length < 0 or start + length > file.size:
            raise InputError(f"{self.root}/{name}: bytes {start}+{length} asked of {file.size}; the file is truncated")
        return file

    def _read(self, file: File, start: int, buffer: memoryview) -> None:
        end = start + len(buffer)
        if not self.verified or not len(buffer):
            with self._named(file):
                storage.read_into(storage.join(self.root, file.path), start, buffer)
            return
        wanted = self._block_digests(file)

        def read(run: range) -> None:
            first, last = run.start * BLOCK, min(run.stop * BLOCK, file.size)
            if start <= first and last <= end:
                self._read_run(file, run, wanted, buffer[first - start : last - start])
                return
            low, high = max(first, start), min(last, end)
            part = slice(low - first, high - first)
            self._read_edge(file, run.start, wanted[run.start], last - first, part, buffer[low - start : high - start])

        whole = range(-(-start // BLOCK), end // BLOCK if end < file.size else len(wanted))
        edges = [range(i, i + 1) for i in sorted({start // BLOCK, (end - 1) // BLOCK}) if i not in whole]
        runs = [*edges, *_runs(whole)]
        if self._remote and len(runs) > 1:
            storage.in_parallel(read, runs)
            return
        # a folder keeps nobody waiting for an answer; new threads for every read would cost a merge a tenth of its time
        for run in runs:
            read(run)

    def _read_run(
        self, file: File, run: range, wanted: list[str], buffer: memoryview, put: storage.Take | None = None
    ) -> None:
        """Reads consecutive blocks by one request; a block that is not as it should be is read again.

        They fill `buffer`, or go to `put` as they come, by their place in the file: before they are verified, and again
        when they are read again. `buffer` then needs storage.STEP bytes.
        """
        if len(run) == 1:
            self._read_block(file, run.start, wanted[run.start], buffer, put=put)
            return
        start, length = run.start * BLOCK, _length(file, run)
        if not self.verified:
            self._read_piece(file, start, length, buffer, put)
            return
        found = self._read_hashed(file, start, length, buffer, blake3, put)
        for index, digest in zip(run, found, strict=True):
            if digest != wanted[index]:
                at = 0 if put else (index - run.start) * BLOCK
                self._read_block(file, index, wanted[index], buffer[at : at + BLOCK], tries=1, put=put)

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
            self._read_block(file, index, wanted, block)
            buffer[:] = block[part]
            with self._edges_lock:
                self._edges.insert(0, (file.path, index, room))
                self._spare += [given_up for _, _, given_up in self._edges[2:]]
                del self._edges[2:]

    def _read_block(
        self, file: File, index: int, wanted: str, buffer: memoryview, tries: int = 2, put: storage.Take | None = None
    ) -> None:
        """As _read_run, one block; it is read once more when it is not as it should be."""
        uri, at = storage.join(self.root, file.path), index * BLOCK
        length = _length(file, range(index, index + 1)) if put else len(buffer)
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
        """Reads by one request, to where _read_run does; returns the digest found of each block."""
        hashed = _Hashed(start, length, algorithm)

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

        with self._named(file):
            uri = storage.join(self.root, file.path)
            storage.read_piece(uri, start, length, buffer, placed if take else None)

    @contextmanager
    def _named(self, file: File) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(
                f"{self.root}/{file.path}: the file is gone; run its stage again or give another reference"
            ) from error

    def read_stored(self, name: str, start: int, length: int) -> bytes:
        """As read_range, unverified: for what is verified in another way."""
        return storage.read_bytes(storage.join(self.root, name), start, length)

    def _block_digests(self, file: File) -> list[str]:
        if file.size <= BLOCK:
            return [file.sha256]
        if self._blocks is None:
            if self.manifest.blocks is None:
                raise InputError(
                    f"{self.root}: the manifest names no block digests for {file.path}; run its stage again"
                )
            entry = self.file(self.manifest.blocks)
            content = bytearray(entry.size)
            self._read_block(entry, 0, entry.sha256, memoryview(content))
            written = json.loads(content)
            if written.get("digest") != "blake3" or written.get("bytes") != BLOCK:
                raise InputError(f"{self.root}/{entry.path}: written by another version; run its stage again")
            self._blocks = written["files"]
        found = self._blocks.get(file.path, [])
        if len(found) != -(-file.size // BLOCK):
            raise InputError(f"{self.root}: the block digests of {file.path} are incomplete; run its stage again")
        return found

    def open(self, name: str) -> "io.BufferedReader":
        """A seekable stream over a file; reads are ranges, verified, one block cached."""
        return io.BufferedReader(_RangeStream(self, name), buffer_size=256 * 2**10)

    def fetch(self, folder: Path, names: Iterable[str] | None = None) -> Path:
        """Writes files (default: all but blocks.json) below `folder`, verified, and returns the folder.

        Many files and blocks at a time. OSError (ENOSPC), before anything is moved, when the disk has not the room.
        """
        chosen = [self.file(name) for name in (self.names if names is None else names) if name != self.manifest.blocks]
        total = sum(file.size for file in chosen)
        storage.check_room(folder, total)
        targets = [_Target(Path(storage.join(str(folder), file.path)), file.size) for file in chosen]
        for parent in {target.path.parent for target in targets}:
            parent.mkdir(parents=True, exist_ok=True)
        step = _StepOfThread()

        def fetch(file: File, run: range, wanted: list[str], target: _Target) -> None:
            # as it comes: what lies in the processor's cache is copied for a quarter of the time
            self._read_run(file, run, wanted, step.room, target.write)
            target.count(_length(file, run))
            bar.advance(_length(file, run))

        try:
            with Progress(f"fetching {self.title}", total) as bar, storage.Threads(storage.connections()) as threads:
                for file, target in zip(chosen, targets):
                    wanted = self._digests_or_none(file)
                    for run in _runs(range(len(wanted))):
                        threads.call(fetch, file, run, wanted, target)
        finally:
            for target in targets:
                target.drop()
        return folder

    @property
    def title(self) -> str:
        """What a person calls it: its stage, or the last part of its address."""
        return self.manifest.stage or self.root.rstrip("/").rpartition("/")[2]

    def _digests_or_none(self, file: File) -> list[str]:
        """A digest per block, one block at least; empty ones where nothing is known."""
        return self._block_digests(file) if self.verified else [""] * max(1, -(-file.size // BLOCK))

    def verify(self) -> None:
        """Reads every file against its digests; InputError names the first that differs."""
        for error in self._damages(all_of_them=False):
            raise error

    def damages(self) -> list[str]:
        """Reads every file against its digests, and says of each block that is not as it should be what is wrong."""
        return sorted(str(error) for error in self._damages(all_of_them=True))

    def _damages(self, all_of_them: bool) -> list[InputError]:
        found: list[InputError] = []
        step = _StepOfThread()

        def check(file: File, index: int, wanted: str) -> None:
            try:
                self._read_block(file, index, wanted, step.room, put=lambda place, piece: None)
            except InputError as error:
                found.append(error)
            except Truncated as error:
                found.append(InputError(str(error)))
            bar.advance(_length(file, range(index, index + 1)))

        with (
            Progress(f"verifying {self.title}", self.manifest.size) as bar,
            storage.Threads(storage.connections()) as threads,
        ):
            for file in self.manifest.files:
                for index, wanted in enumerate(self._digests_or_none(file)):
                    if found and not all_of_them:
                        return found
                    threads.call(check, file, index, wanted)
        return found

    def copy_to(self, root: str) -> Manifest:
        """All files to another place, verified on the way (or server-side within S3), and last the manifest there.

        The digest stays: it leaves out the place. FileExistsError when another manifest is there already.
        """
        root = storage.normalise(root)
        before = _read_or_none(f"{root}/{MANIFEST}")
        if before is not None and Manifest.from_json(before, root).digest != self.digest:
            # said before a file of that artifact is written over
            raise FileExistsError(root)
        server_side = storage.is_s3(self.root) and storage.is_s3(root)
        with Progress(f"copying {self.title}", self.manifest.size) as bar:
            for file in self.manifest.files:
                target = storage.join(root, file.path)
                if server_side:
                    storage.copy(storage.join(self.root, file.path), target)
                    bar.advance(file.size)
                    continue
                with _closing(storage.open_writer(target)) as writer, closing(ahead(self.blocks(file.path))) as blocks:
                    for block in blocks:
                        writer.write(block)
                        bar.advance(len(block))
        copied = replace(self.manifest, root=root)
        there = {item.name: item.size for item in storage.listing(root, hidden=True)}
        for file in copied.files:
            if there.get(file.path) != file.size:
                raise StorageFault(f"{root}/{file.path}: {there.get(file.path)} bytes of {file.size} came; try again")
        if not self.verified:
            return copied
        # what the server copied by itself has passed nobody's digest yet
        for wrong in Artifact(copied, verified=True).damages() if server_side else ():
            raise StorageFault(f"the copy is not as it should be, try again: {wrong}")
        try:
            storage.write_bytes(copied.reference, copied.to_json(), if_absent=True)
        except FileExistsError:
            if Manifest.from_json(storage.read_bytes(copied.reference), copied.reference).digest != self.digest:
                raise
        return copied

    def local(self, recheck: bool = False) -> Path:
        """A folder on this machine with all files, verified: the root itself when it is one, else a cached copy.

        A folder is read once for that: the cache notes which files were as they should be (sizes, inodes and times of
        change), for the other processes of this node and the next ones. The copies of what is remote (ZHLLAMA_CACHE,
        default below the temporary folder) are keyed by the artifact's digest and shared by the processes of a node:
        the first fetches, the others wait. What an earlier process fetched is used again, file by file, after an
        interruption too; `recheck`: after its digests were compared once more. InputError, before anything is fetched,
        when the disk has not the room.
        """
        if not self._remote:
            if self.verified:
                self._verify_once(recheck)
            return Path(self.root)
        cache = cache_folder()
        folder = cache / self.digest[:24]
        folder.mkdir(parents=True, exist_ok=True)
        with open(cache / f"{self.digest[:24]}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            complete = folder / ".complete"
            whole = complete.exists()
            missing = self._missing(folder, whole, compare=recheck or not whole)
            if missing:
                complete.unlink(missing_ok=True)
                require_space(str(folder), sum(self.file(name).size for name in missing), "ZHLLAMA_CACHE")
                self.fetch(folder, missing)
            complete.touch()
        return folder

    def _verify_once(self, recheck: bool) -> None:
        cache = cache_folder()
        cache.mkdir(parents=True, exist_ok=True)
        name = f"{self.digest[:24]}-{hashlib.sha256(self.root.encode()).hexdigest()[:16]}"
        noted = cache / f"{name}.verified.json"
        with open(cache / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = self._stamps()
            known = json.loads(noted.read_bytes()) if noted.exists() and not recheck else None
            if known is None or known != before:
                self.verify()
                # what was changed while it was read has other stamps than these, and is read again the next time
                storage.write_bytes(str(noted), json.dumps(before).encode())

    def _stamps(self) -> list[list[Any]]:
        """What of each file cannot stay the same when it is written to (no program can set a time of change)."""
        found = []
        for file in self.manifest.files:
            with self._named(file):
                status = os.stat(storage.join(self.root, file.path))
            found.append([file.path, status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns])
        return found

    def bytes_to_fetch(self) -> int:
        """Bytes that `local` would fetch now: of a folder none, of a remote root what the node's cache has not got."""
        if not self._remote:
            return 0
        folder = cache_folder() / self.digest[:24]
        whole = (folder / ".complete").exists()
        return sum(self.file(name).size for name in self._missing(folder, whole, compare=False))

    def _missing(self, folder: Path, whole: bool, compare: bool) -> list[str]:
        """The files that a folder has not got, or not as they should be; `compare`: by digest, not by size alone.

        Of a plain prefix, and of the small files of the Hub, no SHA-256 is known: they count only where the whole was
        fetched.
        """
        found = []
        for file in self.manifest.files:
            path = folder / file.path
            there = path.is_file() and path.stat().st_size == file.size
            if there and compare:
                there = _digest(path, hashlib.sha256()) == file.sha256 if file.sha256 else whole
            if not there and file.path != self.manifest.blocks:
                found.append(file.path)
        return found


def cache_folder() -> Path:
    """Where this node keeps what it fetched: ZHLLAMA_CACHE, by default a folder below the temporary one."""
    return Path(os.environ.get("ZHLLAMA_CACHE") or Path(tempfile.gettempdir()) / "zhllama-cache")


def require_room(artifacts: Iterable[Artifact]) -> None:
    """InputError when the node's cache has not the room for all that `local` would fetch of these."""
    require_space(str(cache_folder()), sum(artifact.bytes_to_fetch() for artifact in artifacts), "ZHLLAMA_CACHE")


def _runs(blocks: range) -> list[range]:
    """Consecutive blocks, as many as one request asks for: each request costs either end some milliseconds."""
    step = max(1, storage.PIECE // BLOCK)
    return [blocks[at : at + step] for at in range(0, len(blocks), step)]


def _length(file: File, run: range) -> int:
    """Bytes of consecutive blocks of a file."""
    return min(run.stop * BLOCK, file.size) - run.start * BLOCK


class _Hashed:
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


class _StepOfThread(threading.local):
    """Memory for what has just come, for each thread."""

    def __init__(self) -> None:
        self.room = memoryview(bytearray(storage.STEP))


class _Target:
    """A file that several threads fill; it gets its name when its last byte counts, and vanishes otherwise."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._left = size
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file: io.FileIO | None = None
        self._ended = False
        self._lock = threading.Lock()

    def write(self, start: int, piece: memoryview) -> None:
        """Puts a piece into its place; one that was there already, too."""
        with self._lock:
            if self._ended:
                return
            at = 0
            while at < len(piece):
                at += os.pwrite(self._opened().fileno(), piece[at:], start + at)

    def _opened(self) -> io.FileIO:
        if self._file is None:
            self._file = open(self._temporary, "wb", buffering=0)
        return self._file

    def count(self, length: int) -> None:
        """So many bytes are there and verified."""
        with self._lock:
            if self._ended:
                return
            self._left -= length
            if not self._left:
                self._opened().close()
                os.replace(self._temporary, self.path)
                self._ended = True

    def drop(self) -> None:
        with self._lock:
            if not self._ended and self._file is not None:
                self._file.close()
                self._temporary.unlink(missing_ok=True)
            self._ended = True


@contextmanager
def _closing(writer: storage.Writer) -> Iterator[storage.Writer]:
    """Commits at a clean end; keeps the parts for another try after a fault of the server's; else leaves nothing."""
    try:
        yield writer
        writer.commit()
    except StorageFault:
        writer.leave()
        raise
    except BaseException:
        writer.abort()
        raise


class _RangeStream(io.RawIOBase):
    def __init__(self, artifact: Artifact, name: str) -> None:
        self._artifact = artifact
        self._name = name
        self._size = artifact.file(name).size
        self._at = 0
        self._recent: OrderedDict[int, bytes] = OrderedDict()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = min(len(view), max(0, self._size - self._at))
        if count == 0:
            return 0
        block = self._at // BLOCK
        if block not in self._recent:
            start = block * BLOCK
            self._recent[block] = self._artifact.read_range(self._name, start, min(BLOCK, self._size - start))
            if len(self._recent) > 2:
                self._recent.popitem(last=False)
        content = self._recent[block]
        offset = self._at - block * BLOCK
        count = min(count, len(content) - offset)
        view[:count] = content[offset : offset + count]
        self._at += count
        return count


def open_artifact(reference: str, option: str = "") -> Artifact:
    """Opens a reference: the URI of a manifest, a folder or prefix with or without one, or a repository of the Hub.

    InputError when nothing is there; `option` (as `--model`) says in the message which option gave it.
    """
    where = f"{option} {reference}".strip()
    if reference.startswith("hf://datasets/"):
        from zhllama.artifacts.hub_dataset import open_hub_dataset

        return open_hub_dataset(reference, where)
    if reference.startswith("hf://"):
        from zhllama.artifacts.hub_model import open_hub_model

        return open_hub_model(reference, where)
    uri = storage.normalise(reference)
    if uri.endswith(f"/{MANIFEST}"):
        content = _read_or_none(uri)
        if content is None:
            raise InputError(f"{where}: there is no such manifest; give the reference that the stage before wrote")
        return Artifact(Manifest.from_json(content, where), verified=True)
    content = _read_or_none(storage.join(uri, MANIFEST))
    if content is not None:
        return Artifact(Manifest.from_json(content, where), verified=True)
    if not storage.is_s3(uri) and Path(uri).is_file():
        path = Path(uri)
        return _plain(str(path.parent), [storage.Stored(path.name, path.stat().st_size, "")])
    stored = storage.listing(uri)
    if not stored and is_bare_name(reference):
        from zhllama.artifacts.hub_model import open_hub_model

        return open_hub_model(reference, where)
    if not stored:
        raise InputError(f"{where}: nothing is there; give a folder, an s3:// prefix or the URI of a manifest")
    return _plain(uri, stored)


def is_bare_name(reference: str) -> bool:
    """Whether this may be `owner/name` on the Hub: two names, of which the first is no folder here."""
    return re.fullmatch(HUB_NAME, reference) is not None and not Path(reference.partition("/")[0]).exists()


def _read_or_none(uri: str) -> bytes | None:
    try:
        return storage.read_bytes(uri)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _plain(root: str, stored: list[storage.Stored]) -> Artifact:
    """Files without a manifest. Their digest is of content in a folder, of the server's tags in S3."""
    files = tuple(File(item.name, item.size, "") for item in stored)
    if storage.is_s3(root):
        identity: list[Any] = [[item.name, item.size, item.tag] for item in stored]
    else:
        with Progress(f"hashing {root}", sum(file.size for file in files)) as bar:
            identity = [[file.path, _remembered_digest(Path(root) / file.path, bar)] for file in files]
    manifest = Manifest(kind="files", stage="", root=root, files=files, digest=digest_of(identity))
    return Artifact(manifest, verified=False)


_hashed: dict[tuple[int, int, int, int], str] = {}


def _remembered_digest(path: Path, bar: Progress) -> str:
    """A file's BLAKE3 digest (a third of the time of SHA-256, which nobody compares it with), computed once a process:
    a stage opens its folders for the input key, and again to read them.

    A file that was written to in the last two seconds is hashed again: its time might not show the next write.
    """
    at = path.stat()
    key = (at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns)
    if key not in _hashed or time.time() - at.st_mtime < 2:
        _hashed[key] = _digest(path, blake3())
    bar.advance(at.st_size)
    return _hashed[key]


def _digest(path: Path, algorithm: Any) -> str:
    """The hexadecimal digest of a file, by hashlib's or blake3's object."""
    room = memoryview(bytearray(_STEP))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(room):
            algorithm.update(room[:count])
    return str(algorithm.hexdigest())


class ArtifactWriter:
    """An artifact in the making. Nothing is visible until `publish`; the root is private to the input key.

    Set `vocabulary`, `facts` and `metrics` before publishing. Use `writer(name)` to stream a file, `add_file` for one
    on disk, `add_bytes` for a small one, `copy` for a file of another artifact that does not change.
    """

    def __init__(
        self,
        store: str,
        stage: str,
        key: str,
        configuration: Mapping[str, Any] | None = None,
        inputs: Mapping[str, Input] | None = None,
    ) -> None:
        self.root = place(store, stage, key)
        self.stage = stage
        self.configuration = dict(configuration or {})
        self.inputs = dict(inputs or {})
        self.vocabulary: Vocabulary | None = None
        self.facts: dict[str, Any] = {}
        self.metrics: dict[str, float] = {}
        self._files: dict[str, File] = {}
        self._blocks: dict[str, list[str]] = {}
        self._recorded: set[str] = set()
        self._looking = threading.Lock()
        self._look_at = 0.0
        self._before: bytes | None = None

    def writer(self, name: str) -> "FileStream":
        """A stream for a new file: `with out.writer("x.bin") as stream: stream.write(...)`."""
        return FileStream(self._open(name), name, self._add, self._still_alone)

    def _open(self, name: str) -> storage.Writer:
        return storage.open_writer(storage.join(self.root, name))

    def add_bytes(self, name: str, content: bytes) -> None:
        if len(content) > BLOCK:
            with self.writer(name) as stream:
                stream.write(content)
            return
        self._still_alone()
        storage.write_bytes(storage.join(self.root, name), content)
        digest = hashlib.sha256(content).hexdigest()
        self._add(File(name, len(content), digest), [digest])

    def add_json(self, name: str, value: Any) -> None:
        self.add_bytes(name, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())

    def add_file(self, name: str, path: Path) -> None:
        self._add_files([(name, path)])

    def add_folder(self, folder: Path) -> None:
        """Every file below a folder, under its name there; small ones many at a time."""
        self._add_files([(item.name, folder / item.name) for item in storage.listing(str(folder))])

    def _add_files(self, files: list[tuple[str, Path]]) -> None:
        sizes = {path: path.stat().st_size for _, path in files}

        def add_small(name: str, path: Path) -> None:
            self.add_bytes(name, path.read_bytes())
            bar.advance(sizes[path])

        with Progress("storing", sum(sizes.values())) as bar, storage.Threads(storage.connections()) as threads:
            for name, path in files:
                if sizes[path] <= BLOCK:
                    threads.call(add_small, name, path)
                    continue
                piece = memoryview(bytearray(2**20))
                with self.writer(name) as stream, open(path, "rb", buffering=0) as file:
                    while count := file.readinto(piece):
                        stream.write(piece[:count])
                        bar.advance(count)

    def _still_alone(self) -> None:
        """StorageFault when another run has published this work meanwhile: its files must not be written over.

        Looks once a second at most.
        """
        with self._looking:
            if time.monotonic() < self._look_at:
                return
            found = _read_or_none(f"{self.root}/{MANIFEST}")
            if self._look_at and found is not None and found != self._before:
                raise StorageFault(
                    f"{self.root}: another run of the same work has published it; start again to use its result"
                )
            if not self._look_at:
                # a manifest that is there already is damaged, or its files are gone: else nobody would do the work
                self._before = found
            self._look_at = time.monotonic() + 1

    def copy(self, source: Artifact, name: str) -> None:
        """A file of another artifact, unchanged: server-side within S3 when its digests are known."""
        file = source.file(name)
        if source.verified and storage.is_s3(source.root) and storage.is_s3(self.root):
            storage.copy(storage.join(source.root, name), storage.join(self.root, name))
            self._add(file, source._block_digests(file) if file.size > BLOCK else [file.sha256])
            return
        if source.verified:
            # what is read is verified, so its digests are known: nothing is hashed a second time
            digests = source._block_digests(file)
            with _closing(self._open(name)) as writer, closing(ahead(source.blocks(name))) as blocks:
                for block in blocks:
                    writer.write(block)
                self._still_alone()
            self._add(file, digests)
            return
        with self.writer(name) as stream, closing(ahead(source.blocks(name))) as blocks:
            for block in blocks:
                stream.write(block)

    def add_stored(self, file: File, blocks: list[str]) -> None:
        """Counts in a file that lies in its place below the root already: its digest, and those of its 8 MiB blocks."""
        self._add(file, blocks)

    @property
    def files(self) -> list[File]:
        """What has been written so far, by name."""
        return [self._files[name] for name in sorted(self._files)]

    def part(self) -> dict[str, Any]:
        """What this writer has written, as JSON: for the process that publishes what several have written."""
        return {"files": [asdict(file) for file in self.files], "blocks": self._blocks}

    def adopt(self, part: Mapping[str, Any]) -> None:
        """Counts in what another process has written below this root, as its `part` says."""
        for file in part["files"]:
            self._add(File(**file), part["blocks"].get(file["path"], []))

    def keep(self, name: str, note: Mapping[str, Any]) -> None:
        """Records that a file is whole, with what the stage has to know of it, for the case that this run is killed."""
        part = {"files": [asdict(self._files[name])], "blocks": {name: self._blocks.get(name, [])}}
        storage.write_bytes(self._record_of(name), json.dumps({"part": part, "note": note}).encode())
        self._recorded.add(name)

    def kept(self, name: str) -> dict[str, Any] | None:
        """The note of a file that a killed run of the same work has kept, which then counts as written; else None."""
        content = _read_or_none(self._record_of(name))
        if content is None:
            return None
        record = json.loads(content)
        (file,) = record["part"]["files"]
        uri = storage.join(self.root, name)
        if not storage.exists(uri) or storage.size_of(uri) != file["size"]:
            return None
        self.adopt(record["part"])
        self._recorded.add(name)
        return dict(record["note"])

    def _record_of(self, name: str) -> str:
        # hidden: no listing shows it
        return f"{self.root}/.kept/{name}.json"

    def _add(self, file: File, blocks: list[str]) -> None:
        self._files[file.path] = file
        if file.size > BLOCK:
            self._blocks[file.path] = blocks

    def publish(self, kind: str) -> Manifest:
        """Writes block digests, then the manifest, and returns it."""
        if not self._files:
            raise StorageFault(f"{self.root}: nothing was written, so nothing is published")
        named = None
        if self._blocks:
            written = {"digest": "blake3", "bytes": BLOCK, "files": self._blocks}
            self.add_bytes(BLOCKS, json.dumps(written, sort_keys=True).encode())
            named = BLOCKS
        manifest = Manifest(
            kind=kind,
            stage=self.stage,
            root=self.root,
            files=tuple(self.files),
            blocks=named,
            vocabulary=self.vocabulary,
            configuration=self.configuration,
            inputs=self.inputs,
            facts=self.facts,
            metrics=self.metrics,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            host=platform.node(),
        )
        # through JSON and back, so that the digest is of what a reader will see (tuples are lists, keys are strings)
        value = json.loads(json.dumps(manifest.to_value()))
        manifest = _from_value(value, manifest)
        manifest = self._write(manifest)
        for name in sorted(self._recorded):
            storage.delete(self._record_of(name))
        return manifest

    def _write(self, manifest: Manifest) -> Manifest:
        """The manifest, unless another run was first: then that one's when it is the same work, or StorageFault."""
        content = manifest.to_json()
        try:
            storage.write_bytes(manifest.reference, content, if_absent=True)
            return manifest
        except FileExistsError:
            there = _published_at(self.root)
        if there is not None and there.digest == manifest.digest:
            log.info("%s: another run has published the same", self.root)
            return there
        if there is None or Artifact(there, verified=True).damages():
            # of an earlier run, damaged; ours is whole before it takes that one's place
            Artifact(manifest, verified=True).verify()
            storage.write_bytes(manifest.reference, content)
            return manifest
        raise StorageFault(
            f"{self.root}: another run of the same work has published another result; start again to use that"
        )


def _from_value(value: dict[str, Any], manifest: Manifest) -> Manifest:
    plain = {name: value[name] for name in ("configuration", "facts", "metrics")}
    manifest = replace(manifest, **plain)
    return replace(manifest, digest=manifest.computed_digest())


class FileStream:
    """A file being written: hashes what passes, whole and per block, and joins the artifact on a clean exit."""

    def __init__(
        self,
        writer: storage.Writer,
        name: str,
        done: Callable[[File, list[str]], None],
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self._writer = writer
        self._name = name
        self._done = done
        self._before = before
        """Called before the file becomes visible: the last moment to refuse."""
        self._whole = hashlib.sha256()
        self._block = blake3()
        self._in_block = 0
        self._digests: list[str] = []
        self.size = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        view = memoryview(data).cast("B")
        at = 0
        while at < len(view):
            # a little at a time: what was hashed is still in the processor's cache when it is copied, and other
            # threads get their turn, which hashing leaves them and copying does not
            piece = view[at : at + min(_STEP, BLOCK - self._in_block)]
            self._whole.update(piece)
            self._block.update(piece)
            self._writer.write(piece)
            self._in_block += len(piece)
            at += len(piece)
            if self._in_block == BLOCK:
                self._end_block()
        self.size += len(view)
        return len(view)

    def sha256(self) -> str:
        """The digest of what has been written so far, in hexadecimal."""
        return self._whole.hexdigest()

    def _end_block(self) -> None:
        self._digests.append(self._block.hexdigest())
        self._block = blake3()
        self._in_block = 0

    def __enter__(self) -> "FileStream":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._before()
                self._writer.commit()
        except StorageFault:
            self._writer.leave()
            raise
        except BaseException:
            self._writer.abort()
            raise
        if kind is not None:
            # a fault of a server's is worth another try, which need not send again what is there
            if issubclass(kind, StorageFault):
                self._writer.leave()
            else:
                self._writer.abort()
            return
        if self._in_block:
            self._end_block()
        self._done(File(self._name, self.size, self._whole.hexdigest()), self._digests)


def place(store: str, stage: str, key: str) -> str:
    """Where the artifact of this work lies: `<store>/<stage>/<key>`."""
    return storage.join(storage.normalise(store), f"{stage}/{key}")


def find_published(store: str, stage: str, key: str) -> Manifest | None:
    """The manifest of finished work; None when it is damaged, or a file that it names is missing or of another size."""
    return _published_at(place(store, stage, key))


def _published_at(root: str) -> Manifest | None:
    where = storage.join(root, MANIFEST)
    content = _read_or_none(where)
    if content is None:
        return None
    try:
        manifest = Manifest.from_json(content, where)
    except InputError as error:
        # what is wrong with our own output is mended by doing the work again
        log.warning("%s", error)
        return None
    there = {item.name: item.size for item in storage.listing(manifest.root)}
    if any(there.get(file.path) != file.size for file in manifest.files):
        return None
    return manifest
