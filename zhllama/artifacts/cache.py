"""Artifacts as folders on this machine: the root itself where it is one, else a copy in the node's cache."""

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from zhllama import storage
from zhllama.artifacts.file_digest import file_digest, stamp
from zhllama.artifacts.reader import Artifact
from zhllama.storage.folders import require_space


def materialize(artifact: Artifact, recheck: bool = False) -> Path:
    """A folder on this machine with all files, verified: the root itself when it is one, else a cached copy.

    A folder is read once for that: the cache notes which files were as they should be (sizes, inodes and times of
    change), for the other processes of this node and the next ones. The copies of what is remote (ZHLLAMA_CACHE,
    default below the temporary folder) are keyed by the artifact's digest and shared by the processes of a node:
    the first fetches, the others wait. What an earlier process fetched is used again, file by file, after an
    interruption too; `recheck`: after its digests were compared once more. InputError, before anything is fetched,
    when the disk has not the room.
    """
    if not artifact.remote:
        if artifact.verified:
            _verify_once(artifact, recheck)
        return Path(artifact.root)
    cache = cache_folder()
    folder = cache / artifact.digest[:24]
    folder.mkdir(parents=True, exist_ok=True)
    with open(cache / f"{artifact.digest[:24]}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        complete = folder / ".complete"
        whole = complete.exists()
        missing = _missing(artifact, folder, whole, compare=recheck or not whole)
        if missing:
            complete.unlink(missing_ok=True)
            require_space(str(folder), sum(artifact.file(name).size for name in missing), "ZHLLAMA_CACHE")
            artifact.fetch(folder, missing)
        complete.touch()
    return folder


def _verify_once(artifact: Artifact, recheck: bool) -> None:
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    name = f"{artifact.digest[:24]}-{hashlib.sha256(artifact.root.encode()).hexdigest()[:16]}"
    noted = cache / f"{name}.verified.json"
    with open(cache / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before: list[list[Any]] = []
        for file in artifact.manifest.files:
            with artifact.naming(file.path):
                before.append([file.path, *stamp(Path(storage.join(artifact.root, file.path)))])
        known = json.loads(noted.read_bytes()) if noted.exists() and not recheck else None
        if known != before:
            artifact.verify()
            # what was changed while it was read has other stamps than these, and is read again the next time
            storage.write_bytes(str(noted), json.dumps(before).encode())


def bytes_to_fetch(artifact: Artifact) -> int:
    """Bytes that `materialize` would fetch now: of a folder none, else what the node's cache has not got."""
    if not artifact.remote:
        return 0
    folder = cache_folder() / artifact.digest[:24]
    whole = (folder / ".complete").exists()
    return sum(artifact.file(name).size for name in _missing(artifact, folder, whole, compare=False))


def _missing(artifact: Artifact, folder: Path, whole: bool, compare: bool) -> list[str]:
    """The files that a folder has not got, or not as they should be; `compare`: by digest, not by size alone.

    Of a plain prefix, and of the small files of the Hub, no SHA-256 is known: they count only where the whole was
    fetched.
    """
    found = []
    for file in artifact.manifest.files:
        path = folder / file.path
        there = path.is_file() and path.stat().st_size == file.size
        if there and compare:
            there = file_digest(path, hashlib.sha256()) == file.sha256 if file.sha256 else whole
        if not there and file.path != artifact.manifest.blocks:
            found.append(file.path)
    return found


def cache_folder() -> Path:
    """Where this node keeps what it fetched: ZHLLAMA_CACHE, by default a folder below the temporary one."""
    return Path(os.environ.get("ZHLLAMA_CACHE") or Path(tempfile.gettempdir()) / "zhllama-cache")


def require_room(artifacts: Iterable[Artifact]) -> None:
    """InputError when the node's cache has not the room for all that `materialize` would fetch of these."""
    require_space(str(cache_folder()), sum(bytes_to_fetch(artifact) for artifact in artifacts), "ZHLLAMA_CACHE")
