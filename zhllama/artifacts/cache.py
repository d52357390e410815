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
from zhllama.artifacts.manifest import File
from zhllama.artifacts.open import file_digest, stamp
from zhllama.artifacts.reader import Artifact
from zhllama.storage.folders import require_space


def materialize(artifact: Artifact, recheck: bool = False) -> Path:
    """A folder on this machine with all files, verified: the root itself when it is one, else a cached copy. A folder
    is read once for that: the cache notes which files were as they should be (sizes, inodes, times of change), for all
    processes of this node. The copies of what is remote are keyed by the artifact's digest and shared by them: the
    first fetches, the others wait. What was fetched before is used again, file by file, after an interruption too;
    `recheck`: after its digests were compared once more. InputError, before a fetch, when the disk has not the room."""
    if not artifact.remote:
        if artifact.verified:
            _verify_once(artifact, recheck)
        return Path(artifact.root)
    folder = _folder_of(artifact)
    folder.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        complete = folder / ".complete"
        if missing := _missing(artifact, folder, compare=recheck or not complete.exists()):
            complete.unlink(missing_ok=True)
            require_space(str(folder), sum(file.size for file in missing), "ZHLLAMA_CACHE")
            artifact.fetch(folder, [file.path for file in missing])
        complete.touch()
    return folder


def _verify_once(artifact: Artifact, recheck: bool) -> None:
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    name = f"{artifact.digest[:24]}-{hashlib.sha256(artifact.root.encode()).hexdigest()[:16]}"
    noted = cache / f"{name}.verified.json"
    with open(cache / f"{name}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before: list[list[Any]] = []
        for file in artifact.manifest.files:
            with artifact.reader.naming(file):
                before.append([file.path, *stamp(Path(storage.join(artifact.root, file.path)))])
        # byte for byte, as it was written: who wrote other bytes there knows nothing
        now = json.dumps(before).encode()
        if recheck or storage.read_or_none(str(noted)) != now:
            artifact.verify()
            # what was changed while it was read has other stamps than these, and is read again the next time
            storage.write_bytes(str(noted), now)


def _folder_of(artifact: Artifact) -> Path:
    return cache_folder() / artifact.digest[:24]


def _missing(artifact: Artifact, folder: Path, compare: bool) -> list[File]:
    """The files that a folder has not got, or not as they should be; `compare`: by digest, not by size alone. Where no
    SHA-256 is known (of a plain prefix, of small files of the Hub), they count only when the whole was fetched."""
    whole = (folder / ".complete").exists()

    def there(file: File) -> bool:
        path = folder / file.path
        if not path.is_file() or path.stat().st_size != file.size:
            return False
        return not compare or (file_digest(path, hashlib.sha256()) == file.sha256 if file.sha256 else whole)

    return [file for file in artifact.manifest.files if file.path != artifact.manifest.blocks and not there(file)]


def cache_folder() -> Path:
    """Where this node keeps what it fetched: ZHLLAMA_CACHE, by default a folder below the temporary one."""
    return Path(os.environ.get("ZHLLAMA_CACHE") or Path(tempfile.gettempdir()) / "zhllama-cache")


def require_room(artifacts: Iterable[Artifact]) -> None:
    """InputError when the node's cache has not the room for all that `materialize` would fetch of these."""
    missing = [_missing(artifact, _folder_of(artifact), compare=False) for artifact in artifacts if artifact.remote]
    require_space(str(cache_folder()), sum(file.size for files in missing for file in files), "ZHLLAMA_CACHE")
