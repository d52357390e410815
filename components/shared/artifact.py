"""The artifact: files under one prefix and, written last, the manifest that makes them visible.

A *reference* is the URI of a manifest (`…/manifest.json`), or a plain folder or prefix: with a manifest in it the two
are the same, without one the files are taken as they are, unverified. Place: `<store>/<stage>/<input key>/`, the key
being the digest of the stage, its source, the versions it uses, its configuration and its inputs' digests: the same
work lands at the same place, which is how a stage sees that it has nothing to do.

Every file carries its SHA-256, and files over 8 MiB one more per 8 MiB block (in `blocks.json`, named by the
manifest), so that a range read is verified without reading the rest. Readers verify what they read; a mismatch is read
once more and is then an error that names file, range, wanted and found. The manifest's own digest leaves out place,
time and host: equal content, equal digest.
"""

import fcntl
import hashlib
import io
import json
import logging
import os
import platform
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from components.shared import storage
from components.shared.errors import InputError, StorageFault
from components.shared.space import require_space
from components.shared.vocabulary import Vocabulary

log = logging.getLogger("artifact")

MANIFEST = "manifest.json"
BLOCKS = "blocks.json"
BLOCK = 8 * 2**20
FORMAT = 1


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

    def computed_digest(self) -> str:
        value = asdict(self)
        for left_out in ("root", "created", "host", "digest"):
            del value[left_out]
        value["inputs"] = {name: given.digest for name, given in self.inputs.items()}
        return digest_of(value)

    def to_json(self) -> bytes:
        return (json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False) + "\n").encode()

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

    @property
    def root(self) -> str:
        return self.manifest.root

    @property
    def digest(self) -> str:
        return self.manifest.digest

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
            raise InputError(f"{option} {self.root}: this is a {self.manifest.kind}; a {wanted} is needed")
        return self

    def read(self, name: str) -> bytes:
        """A whole file, verified."""
        return self.read_range(name, 0, self.file(name).size)

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`, verified by the 8 MiB blocks they lie in (reads up to two blocks more)."""
        file = self.file(name)
        if start < 0 or length < 0 or start + length > file.size:
            raise InputError(f"{self.root}/{name}: bytes {start}+{length} asked of {file.size}; the file is truncated")
        uri = storage.join(self.root, name)
        try:
            return self._verified_range(file, uri, start, length)
        except FileNotFoundError as error:
            raise InputError(f"{uri}: the file is gone; run its stage again or give another reference") from error

    def _verified_range(self, file: File, uri: str, start: int, length: int) -> bytes:
        if not self.verified or length == 0:
            return self.read_stored(file.path, start, length)
        first = start // BLOCK * BLOCK
        end = min(file.size, -(-(start + length) // BLOCK) * BLOCK)
        wanted = self._block_digests(file)
        for _ in range(2):
            content = self.read_stored(file.path, first, end - first)
            bad = _first_bad_block(content, wanted[first // BLOCK :])
            if bad is None:
                return content if first == start and end == start + length else content[start - first :][:length]
        assert bad is not None
        index, found = bad
        at = first + index * BLOCK
        raise InputError(
            f"{uri}: bytes {at} to {min(at + BLOCK, file.size)}: sha256 {wanted[at // BLOCK]} expected, {found} found; "
            "the stored file is corrupt, run its stage again"
        )

    def read_stored(self, name: str, start: int, length: int) -> bytes:
        """As read_range, unverified: for what is verified in another way."""
        return storage.read_bytes(storage.join(self.root, name), start, length)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """As read_range, into a writable buffer of bytes, a few blocks at a time: memory beyond it stays at 32 MiB."""
        at = 0
        while at < len(buffer):
            # up to the next border, so that no block is read (and hashed) twice
            end = min(len(buffer), ((start + at) // BLOCK + 2) * BLOCK - start)
            buffer[at:end] = self.read_range(name, start + at, end - at)
            at = end

    def _block_digests(self, file: File) -> list[str]:
        if file.size <= BLOCK:
            return [file.sha256]
        if self._blocks is None:
            if self.manifest.blocks is None:
                raise InputError(
                    f"{self.root}: the manifest names no block digests for {file.path}; run its stage again"
                )
            entry = self.file(self.manifest.blocks)
            content = storage.read_bytes(storage.join(self.root, entry.path))
            if hashlib.sha256(content).hexdigest() != entry.sha256:
                raise InputError(f"{self.root}/{entry.path}: sha256 differs from the manifest's; run its stage again")
            self._blocks = json.loads(content)
        return self._blocks[file.path]

    def open(self, name: str) -> "io.BufferedReader":
        """A seekable stream over a file; reads are ranges, verified, one block cached."""
        return io.BufferedReader(_RangeStream(self, name), buffer_size=256 * 2**10)

    def fetch(self, folder: Path, names: Iterable[str] | None = None) -> Path:
        """Writes files (default: all but blocks.json) below `folder`, verified, and returns the folder."""
        for name in self.names if names is None else names:
            if name == self.manifest.blocks:
                continue
            target = Path(storage.join(str(folder), name))
            file = self.file(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
            try:
                with open(temporary, "wb") as out:
                    for start in range(0, file.size, BLOCK):
                        out.write(self.read_range(name, start, min(BLOCK, file.size - start)))
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
        return folder

    def verify(self) -> None:
        """Reads every file against its digests; InputError names the first that differs. Memory: one block."""
        for file in self.manifest.files:
            for start in range(0, file.size, BLOCK):
                self.read_range(file.path, start, min(BLOCK, file.size - start))

    def local(self, recheck: bool = False) -> Path:
        """A folder on this machine with all files, verified: the root itself when it is one, else a cached copy.

        A root is read once for that, as fast as SHA-256 goes. The cache (ZHLLAMA_CACHE, default below the temporary
        folder) is keyed by the artifact's digest and shared by the processes of a node: the first fetches, the others
        wait. What an earlier process fetched is used again, file by file, after an interruption too; `recheck`: after
        its digests were compared once more. InputError, before anything is fetched, when the disk has not the room.
        """
        if not storage.is_s3(self.root):
            if self.verified:
                self.verify()
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

    def bytes_to_fetch(self) -> int:
        """Bytes that `local` would fetch now: of a folder none, of S3 what the node's cache has not got."""
        if not storage.is_s3(self.root):
            return 0
        folder = cache_folder() / self.digest[:24]
        whole = (folder / ".complete").exists()
        return sum(self.file(name).size for name in self._missing(folder, whole, compare=False))

    def _missing(self, folder: Path, whole: bool, compare: bool) -> list[str]:
        """The files that a folder has not got, or not as they should be; `compare`: by digest, not by size alone.

        Of a plain prefix no digest is known: its files count only where the whole was fetched.
        """
        found = []
        for file in self.manifest.files:
            path = folder / file.path
            there = path.is_file() and path.stat().st_size == file.size
            if there and compare:
                there = _sha256(path) == file.sha256 if file.sha256 else whole
            if not there and file.path != self.manifest.blocks:
                found.append(file.path)
        return found


def cache_folder() -> Path:
    """Where this node keeps what it fetched: ZHLLAMA_CACHE, by default a folder below the temporary one."""
    return Path(os.environ.get("ZHLLAMA_CACHE") or Path(tempfile.gettempdir()) / "zhllama-cache")


def require_room(artifacts: Iterable[Artifact]) -> None:
    """InputError when the node's cache has not the room for all that `local` would fetch of these."""
    require_space(str(cache_folder()), sum(artifact.bytes_to_fetch() for artifact in artifacts), "ZHLLAMA_CACHE")


def _first_bad_block(content: bytes, wanted: list[str]) -> tuple[int, str] | None:
    view = memoryview(content)
    for index in range(-(-len(content) // BLOCK)):
        found = hashlib.sha256(view[index * BLOCK : (index + 1) * BLOCK]).hexdigest()
        if found != wanted[index]:
            return index, found
    return None


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
    """Opens a reference: the URI of a manifest, a folder or prefix with or without one, or a dataset of the Hub.

    InputError when nothing is there; `option` (as `--model`) says in the message which option gave it.
    """
    where = f"{option} {reference}".strip()
    if reference.startswith("hf://datasets/"):
        from components.shared.hub_dataset import open_hub_dataset

        return open_hub_dataset(reference, where)
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
    if not stored:
        raise InputError(f"{where}: nothing is there; give a folder, an s3:// prefix or the URI of a manifest")
    return _plain(uri, stored)


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
        identity = [[file.path, _sha256(Path(root) / file.path)] for file in files]
    manifest = Manifest(kind="files", stage="", root=root, files=files, digest=digest_of(identity))
    return Artifact(manifest, verified=False)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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

    def writer(self, name: str) -> "FileStream":
        """A stream for a new file: `with out.writer("x.bin") as stream: stream.write(...)`."""
        return FileStream(storage.open_writer(storage.join(self.root, name)), name, self._add)

    def add_bytes(self, name: str, content: bytes) -> None:
        with self.writer(name) as stream:
            stream.write(content)

    def add_json(self, name: str, value: Any) -> None:
        self.add_bytes(name, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())

    def add_file(self, name: str, path: Path) -> None:
        with self.writer(name) as stream, open(path, "rb") as file:
            while chunk := file.read(4 * 2**20):
                stream.write(chunk)

    def add_folder(self, folder: Path) -> None:
        """Every file below a folder, under its name there."""
        for item in storage.listing(str(folder)):
            self.add_file(item.name, folder / item.name)

    def copy(self, source: Artifact, name: str) -> None:
        """A file of another artifact, unchanged: server-side within S3 when its digests are known."""
        file = source.file(name)
        if source.verified and storage.is_s3(source.root) and storage.is_s3(self.root):
            storage.copy(storage.join(source.root, name), storage.join(self.root, name))
            self._add(file, source._block_digests(file) if file.size > BLOCK else [file.sha256])
            return
        with self.writer(name) as stream:
            for start in range(0, file.size, BLOCK):
                stream.write(source.read_range(name, start, min(BLOCK, file.size - start)))

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
            self.add_bytes(BLOCKS, json.dumps(self._blocks, sort_keys=True).encode())
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
        value = json.loads(manifest.to_json())
        manifest = _from_value(value, manifest)
        storage.write_bytes(manifest.reference, manifest.to_json())
        for name in sorted(self._recorded):
            storage.delete(self._record_of(name))
        return manifest


def _from_value(value: dict[str, Any], manifest: Manifest) -> Manifest:
    from dataclasses import replace

    plain = {name: value[name] for name in ("configuration", "facts", "metrics")}
    manifest = replace(manifest, **plain)
    return replace(manifest, digest=manifest.computed_digest())


class FileStream:
    """A file being written: hashes what passes, whole and per block, and joins the artifact on a clean exit."""

    def __init__(self, writer: storage.Writer, name: str, done: Callable[[File, list[str]], None]) -> None:
        self._writer = writer
        self._name = name
        self._done = done
        self._whole = hashlib.sha256()
        self._block = hashlib.sha256()
        self._in_block = 0
        self._digests: list[str] = []
        self.size = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        view = memoryview(data).cast("B")
        self._writer.write(view)
        self._whole.update(view)
        at = 0
        while at < len(view):
            piece = view[at : at + BLOCK - self._in_block]
            self._block.update(piece)
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
        self._block = hashlib.sha256()
        self._in_block = 0

    def __enter__(self) -> "FileStream":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._writer.abort()
            return
        try:
            self._writer.commit()
        except BaseException:
            self._writer.abort()
            raise
        if self._in_block:
            self._end_block()
        self._done(File(self._name, self.size, self._whole.hexdigest()), self._digests)


def place(store: str, stage: str, key: str) -> str:
    """Where the artifact of this work lies: `<store>/<stage>/<key>`."""
    return storage.join(storage.normalise(store), f"{stage}/{key}")


def find_published(store: str, stage: str, key: str) -> Manifest | None:
    """The manifest of finished work; None when it is damaged, or a file that it names is missing or of another size."""
    where = storage.join(place(store, stage, key), MANIFEST)
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
