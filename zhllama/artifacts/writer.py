"""The artifact in the making, and the stream of a file of it.

The manifest is written only where none is (If-None-Match): of two runs of the same work one publishes.
"""

import hashlib
import json
import logging
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from zhllama import storage
from zhllama.artifacts.blocks import BLOCK, BLOCKS, BlockHasher
from zhllama.artifacts.json_file import value_of
from zhllama.artifacts.manifest import MANIFEST, File, Input, Manifest, placeless_digest
from zhllama.artifacts.published import find_published, place
from zhllama.artifacts.reader import Artifact
from zhllama.errors import StorageFault
from zhllama.progress import Progress
from zhllama.tokenizer.vocabulary import Vocabulary

log = logging.getLogger("artifact")

_OTHER_RUN = "another run of the same work has published"
_STEP = 2**20
"""Bytes of a stream that are hashed, and then written, at once."""


class ArtifactWriter:
    """An artifact in the making. Nothing is visible until `publish`; the root is private to the input key. Set
    `vocabulary`, `facts` and `metrics` before publishing. Use `writer(name)` to stream a file, `add_file` for one on
    disk, `add_bytes` for a small one, `copy` for a file of another artifact that does not change."""

    def __init__(
        self,
        store: str,
        stage: str,
        key: str,
        configuration: Mapping[str, Any] | None = None,
        inputs: Mapping[str, Input] | None = None,
        before_publishing: Callable[[], None] = lambda: None,
    ) -> None:
        """before_publishing: raises where what was read is not what `inputs` says."""
        self.stage, self._work = stage, (store, stage, key)
        self.root = place(*self._work)
        self.configuration, self.inputs = dict(configuration or {}), dict(inputs or {})
        self._before_publishing = before_publishing
        self.vocabulary: Vocabulary | None = None
        self.facts: dict[str, Any] = {}
        self.metrics: dict[str, float] = {}
        self._files: dict[str, File] = {}
        self._beside: dict[str, File] = {}
        self._blocks: dict[str, list[str]] = {}
        self._recorded: set[str] = set()
        self._looking = threading.Lock()
        self._look_at = 0.0
        self._before: bytes | None = None

    @contextmanager
    def writer(self, name: str) -> Iterator["FileStream"]:
        """A stream for a new file, counted in at a clean exit: `with out.writer("x") as stream: stream.write(…)`."""
        with storage.committed(storage.open_writer(storage.join(self.root, name))) as writer:
            stream = FileStream(writer)
            yield stream
            # the last moment to refuse
            self.require_alone()
        self.add_stored(File(name, stream.size, stream.whole.hexdigest()), stream.blocks.digests())

    def add_bytes(self, name: str, content: bytes, beside: bool = False, says_place: bool = False) -> None:
        """beside: a report, or what was measured on the way: it travels with the artifact, outside its digest.
        says_place: of an adapter_config.json, where the base lies, which is not in the digest either."""
        if len(content) > BLOCK and not beside:
            with self.writer(name) as stream:
                stream.write(content)
            return
        self.require_alone()
        storage.write_bytes(storage.join(self.root, name), content)
        stated = placeless_digest(content) if says_place else ""
        file = File(name, len(content), hashlib.sha256(content).hexdigest(), stated)
        if beside:
            self._beside[name] = file
        else:
            self.add_stored(file, [])

    def add_json(self, name: str, value: Any, beside: bool = False) -> None:
        self.add_bytes(name, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(), beside)

    def add_file(self, name: str, path: Path) -> None:
        size = path.stat().st_size
        with Progress("storing", size) as bar, self.writer(name) as stream, open(path, "rb", buffering=0) as file:
            while piece := file.read(_STEP):
                bar.advance(stream.write(piece))

    def require_alone(self) -> None:
        """StorageFault when another run has published this work: not to write over its files. Looks once a second."""
        with self._looking:
            if time.monotonic() < self._look_at:
                return
            found = storage.read_or_none(f"{self.root}/{MANIFEST}")
            if self._look_at and found is not None and found != self._before:
                raise StorageFault(f"{self.root}: {_OTHER_RUN} it; start again to use its result")
            if not self._look_at:
                # a manifest that is there already is damaged, or its files are gone: else nobody would do the work
                self._before = found
            self._look_at = time.monotonic() + 1

    def copy(self, source: Artifact, name: str, new_name: str = "") -> None:
        """A file of another artifact, unchanged: server-side within S3 when its digests are known. new_name: another
        one than it has there."""
        file, new_name = source.file(name), new_name or name
        target = storage.join(self.root, new_name)
        if source.verified and storage.is_s3(source.root) and storage.is_s3(self.root):
            storage.copy(storage.join(source.root, name), target)
        else:
            # what is verified when it is read has known digests: nothing is hashed a second time
            with storage.committed(storage.open_writer(target)) if source.verified else self.writer(new_name) as stream:
                source.pour(name, stream.write)
                self.require_alone()
        if source.verified:
            self.add_stored(replace(file, path=new_name), source.reader.block_digests(file))

    def add_stored(self, file: File, blocks: list[str]) -> None:
        """Counts in a file that lies in its place below the root already: its digest, and those of its 8 MiB blocks."""
        self._files[file.path] = file
        if file.size > BLOCK:
            self._blocks[file.path] = blocks

    @property
    def files(self) -> list[File]:
        """What has been written so far, by name."""
        return [self._files[name] for name in sorted(self._files)]

    def part(self, *names: str) -> dict[str, Any]:
        """What this writer has written (of these names, or all), as JSON: for the process that publishes it."""
        chosen = names or sorted(self._files)
        blocks = {name: self._blocks[name] for name in chosen if name in self._blocks}
        return {"files": [asdict(self._files[name]) for name in chosen], "blocks": blocks}

    def merge_part(self, part: Mapping[str, Any]) -> None:
        """Counts in what another process has written below this root, as its `part` says."""
        for file in part["files"]:
            self.add_stored(File(**file), part["blocks"].get(file["path"], []))

    def record_complete(self, name: str, note: Mapping[str, Any]) -> None:
        """Records that a file is whole, with what the stage has to know of it, for the case that this run is killed."""
        storage.write_bytes(self._record_of(name), json.dumps({"part": self.part(name), "note": note}).encode())
        self._recorded.add(name)

    def resume_record(self, name: str) -> dict[str, Any] | None:
        """The note of a file that a killed run of the same work has kept, which then counts as written; else None."""
        content = storage.read_or_none(self._record_of(name))
        if content is None:
            return None
        uri = storage.join(self.root, name)
        try:
            record = value_of(content)
            part, note = record["part"], dict(record["note"])
            (file,) = part["files"]
            if file["path"] != name or storage.size_of(uri) != file["size"]:
                return None
            self.merge_part(part)
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            # half a note, or none of ours: the file is written once more
            return None
        self._recorded.add(name)
        return note

    def _record_of(self, name: str) -> str:
        # hidden: no listing shows it
        return f"{self.root}/.kept/{name}.json"

    def publish(self, kind: str) -> Manifest:
        """Writes block digests, provenance, then the manifest, and returns it."""
        if not (self._files or self._beside):
            raise StorageFault(f"{self.root}: nothing was written, so nothing is published")
        self._before_publishing()
        if self._blocks:
            written = {"digest": "blake3", "bytes": BLOCK, "files": self._blocks}
            self.add_bytes(BLOCKS, json.dumps(written, sort_keys=True).encode())
        # through JSON and back, so that the digest is of what a reader will see (tuples are lists, keys are strings)
        said = {"configuration": self.configuration, "facts": self.facts, "metrics": self.metrics}
        manifest = Manifest(
            kind=kind,
            stage=self.stage,
            root=self.root,
            files=tuple(self.files),
            beside=tuple(self._beside[name] for name in sorted(self._beside)),
            blocks=BLOCKS if self._blocks else None,
            vocabulary=self.vocabulary,
            inputs=self.inputs,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            host=platform.node(),
            **json.loads(json.dumps(said)),
        )
        manifest = self._write(replace(manifest, digest=manifest.computed_digest()))
        for name in sorted(self._recorded):
            storage.delete(self._record_of(name))
        return manifest

    def _write(self, manifest: Manifest) -> Manifest:
        """The manifest, unless another run was first: then that one's when it is the same work, or StorageFault."""
        try:
            manifest.publish(if_absent=True)
            return manifest
        except FileExistsError:
            there = find_published(*self._work)
        if there is not None and there.digest == manifest.digest:
            log.info("%s: another run has published the same", self.root)
            if there.files != manifest.files or Artifact(there, verified=True).damaged_beside():
                # ours came after that run's reports, or say other places
                manifest.publish()
            return there
        if there is None or Artifact(there, verified=True).find_corruption():
            # of an earlier run, damaged; ours is whole before it takes that one's place
            Artifact(manifest, verified=True).verify()
            manifest.publish()
            return manifest
        raise StorageFault(f"{self.root}: {_OTHER_RUN} another result; start again to use that")


class FileStream:
    """A file being written: hashes what passes, whole and per block."""

    def __init__(self, writer: storage.Writer) -> None:
        self._writer = writer
        self.whole, self.blocks = hashlib.sha256(), BlockHasher()
        self.size = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        view = memoryview(data).cast("B")
        for at in range(0, len(view), _STEP):
            # a little at a time: what was hashed is still in the processor's cache when it is copied, and other
            # threads get their turn, which hashing leaves them and copying does not
            piece = view[at : at + _STEP]
            self.whole.update(piece)
            self.blocks.update(piece)
            self._writer.write(piece)
        self.size += len(view)
        return len(view)
