"""Opening a reference: a manifest, a folder or prefix, a model or dataset of the Hub."""

import hashlib
import re
import time
from pathlib import Path
from typing import Any

from blake3 import blake3

from zhllama import storage
from zhllama.artifacts.hub_dataset import open_hub_dataset
from zhllama.artifacts.hub_model import HUB_NAME, open_hub_model
from zhllama.artifacts.manifest import MANIFEST, File, Manifest, digest_of, read_manifest
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.progress import Progress


def open_artifact(reference: str, option: str = "") -> Artifact:
    """Opens a reference: the URI of a manifest, a folder or prefix with or without one, or a repository of the Hub.
    InputError when nothing is there; `option` (as `--model`) says in the message which option gave it."""
    where = f"{option} {reference}".strip()
    if reference.startswith("hf://datasets/"):
        return open_hub_dataset(reference, where)
    if reference.startswith("hf://"):
        return open_hub_model(reference, where)
    uri = storage.normalise(reference)
    named = uri.endswith(f"/{MANIFEST}")
    manifest = read_manifest(uri if named else storage.join(uri, MANIFEST), where)
    if manifest is not None:
        return Artifact(manifest, verified=True)
    if named:
        raise InputError(f"{where}: there is no such manifest; give the reference that the stage before wrote")
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
    for name in (root, *(item.name for item in stored)):
        if name.encode(errors="ignore").decode() != name:
            raise InputError(f"{root!a}: {name!a} is a name that is no UTF-8, which no manifest holds; rename it")
    files = tuple(File(item.name, item.size, "") for item in stored)
    if storage.is_s3(root):
        identity: list[Any] = [[item.name, item.size, item.tag] for item in stored]

        def changed() -> bool:
            # what came beside the files that were there nobody has read
            there = {item.name: [item.name, item.size, item.tag] for item in storage.listing(root)}
            return [there.get(file.path) for file in files] != identity
    else:
        paths = [Path(root) / file.path for file in files]
        # stamped first: what is written while it is hashed has another stamp afterwards
        stamps = [stamp(path) for path in paths]
        with Progress(f"hashing {root}", sum(file.size for file in files)) as bar:
            identity = [[file.path, _remembered_digest(path, bar)] for file, path in zip(files, paths)]

        def changed() -> bool:
            # a new name of a file, or other rights, change its stamp alone: then it is read once more
            try:
                return any(
                    stamp(path) != before and file_digest(path, blake3()) != digest
                    for path, before, (_, digest) in zip(paths, stamps, identity)
                )
            except FileNotFoundError:
                return True

    manifest = Manifest(kind="files", stage="", root=root, files=files, digest=digest_of(identity))
    return Artifact(manifest, verified=False, changed=changed)


def file_digest(path: Path, algorithm: Any) -> str:
    """The hexadecimal digest of a file, by hashlib's or blake3's object."""
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, lambda: algorithm).hexdigest()


def stamp(path: Path) -> list[int]:
    """Size, inode and times: they cannot all stay when a file is written to (no program can set a time of change)."""
    status = path.stat()
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


_hashed: dict[tuple[int, int, int, int], str] = {}


def _remembered_digest(path: Path, bar: Progress) -> str:
    """A file's BLAKE3 digest (a third of the time of SHA-256), computed once a process, which may open a folder twice;
    but again for a file that was written to in the last two seconds: its time might not show the next write."""
    at = path.stat()
    key = (at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns)
    if key not in _hashed or time.time() - at.st_mtime < 2:
        _hashed[key] = file_digest(path, blake3())
    bar.advance(at.st_size)
    return _hashed[key]
