"""Opening a reference: a manifest, a folder or prefix, a model or dataset of the Hub."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from blake3 import blake3

from zhllama import storage
from zhllama.artifacts.file_digest import file_digest
from zhllama.artifacts.hub_dataset import open_hub_dataset
from zhllama.artifacts.hub_model import HUB_NAME, open_hub_model
from zhllama.artifacts.manifest import MANIFEST, File, Manifest, digest_of
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.progress import Progress


def open_artifact(reference: str, option: str = "") -> Artifact:
    """Opens a reference: the URI of a manifest, a folder or prefix with or without one, or a repository of the Hub.

    InputError when nothing is there; `option` (as `--model`) says in the message which option gave it.
    """
    where = f"{option} {reference}".strip()
    if reference.startswith("hf://datasets/"):
        return open_hub_dataset(reference, where)
    if reference.startswith("hf://"):
        return open_hub_model(reference, where)
    uri = storage.normalise(reference)
    if uri.endswith(f"/{MANIFEST}"):
        content = storage.read_or_none(uri)
        if content is None:
            raise InputError(f"{where}: there is no such manifest; give the reference that the stage before wrote")
        return Artifact(Manifest.from_json(content, where), verified=True)
    content = storage.read_or_none(storage.join(uri, MANIFEST))
    if content is not None:
        return Artifact(Manifest.from_json(content, where), verified=True)
    if not storage.is_s3(uri) and Path(uri).is_file():
        path = Path(uri)
        return _plain(str(path.parent), [storage.Stored(path.name, path.stat().st_size, "")])
    stored = storage.listing(uri)
    if not stored:
        if is_bare_name(reference):
            return open_hub_model(reference, where)
        raise InputError(f"{where}: nothing is there; give a folder, an s3:// prefix or the URI of a manifest")
    return _plain(uri, stored)


def is_bare_name(reference: str) -> bool:
    """Whether this may be `owner/name` on the Hub: two names, of which the first is no folder here."""
    return re.fullmatch(HUB_NAME, reference) is not None and not Path(reference.partition("/")[0]).exists()


def _plain(root: str, stored: list[storage.Stored]) -> Artifact:
    """Files without a manifest. Their digest is of content in a folder, of the server's tags in S3."""
    files = tuple(File(item.name, item.size, "") for item in stored)
    if storage.is_s3(root):
        identity: list[Any] = [[item.name, item.size, item.tag] for item in stored]
        changed: Callable[[], bool] = lambda: _tags(root, files) != identity  # noqa: E731
    else:
        # stamped first: what is written while it is hashed has another stamp afterwards
        watched = _Watched(Path(root), [file.path for file in files])
        with Progress(f"hashing {root}", sum(file.size for file in files)) as bar:
            watched.digests = {file.path: _remembered_digest(Path(root) / file.path, bar) for file in files}
        identity = [[name, digest] for name, digest in watched.digests.items()]
        changed = watched.changed
    manifest = Manifest(kind="files", stage="", root=root, files=files, digest=digest_of(identity))
    return Artifact(manifest, verified=False, changed=changed)


def _tags(root: str, files: Sequence[File]) -> list[list[Any]]:
    """What the server says now of the files that were there; what came beside them nobody has read."""
    there = {item.name: [item.name, item.size, item.tag] for item in storage.listing(root)}
    return [there.get(file.path, [file.path]) for file in files]


class _Watched:
    """The files of a folder, as they were before their digests were taken."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self._root = root
        self._stamps = {name: self._stamp(name) for name in names}
        self.digests: Mapping[str, str] = {}

    def _stamp(self, name: str) -> tuple[int, ...]:
        """What cannot stay the same when a file is written to: no program can set a time of change."""
        status = (self._root / name).stat()
        return status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns

    def changed(self) -> bool:
        """Whether one of them is gone or has other content. A new name of the file, or other rights, change its stamp
        alone: then it is read once more."""
        try:
            return any(
                self._stamp(name) != before and file_digest(self._root / name, blake3()) != self.digests[name]
                for name, before in self._stamps.items()
            )
        except FileNotFoundError:
            return True


_hashed: dict[tuple[int, int, int, int], str] = {}


def _remembered_digest(path: Path, bar: Progress) -> str:
    """A file's BLAKE3 digest (a third of the time of SHA-256, which nobody compares it with), computed once a process:
    a stage opens its folders for the input key, and again to read them.

    A file that was written to in the last two seconds is hashed again: its time might not show the next write.
    """
    at = path.stat()
    key = (at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns)
    if key not in _hashed or time.time() - at.st_mtime < 2:
        _hashed[key] = file_digest(path, blake3())
    bar.advance(at.st_size)
    return _hashed[key]
