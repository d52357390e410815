"""Artifacts as folders on this machine: the root itself where it is one, else a copy in the node's cache.

The cache is its user's alone. What it holds was verified when it was fetched, and at each opening the files' stamps
(size, inode, times) are held against those noted then: one call a file. What was written to since is compared by its
digest, and fetched again where it differs.
"""

import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from zhllama import storage
from zhllama.artifacts.json_file import object_of
from zhllama.artifacts.manifest import File
from zhllama.artifacts.open import file_digest, stamp
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.storage.folders import require_space
from zhllama.storage.private import open_lock, own_folder, own_part_of

_MEND = "point ZHLLAMA_CACHE to a folder of your own"


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
    folder = own_folder(_folder_of(artifact), _MEND)
    with open_lock(f"{folder}.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        complete = folder / ".complete"
        before = storage.read_or_none(str(complete))
        if missing := _missing(artifact, _is_there(before, recheck)):
            complete.unlink(missing_ok=True)
            require_space(str(folder), sum(file.size for file in missing), "ZHLLAMA_CACHE")
            artifact.fetch(folder, [file.path for file in missing])
        now = json.dumps({file.path: stamp(folder / file.path) for file in _kept(artifact)}).encode()
        if now != before:
            storage.write_bytes(str(complete), now)
    return folder


def _verify_once(artifact: Artifact, recheck: bool) -> None:
    cache = cache_folder()
    name = f"{artifact.digest[:24]}-{hashlib.sha256(artifact.root.encode()).hexdigest()[:16]}"
    noted = cache / f"{name}.verified.json"
    with open_lock(cache / f"{name}.lock") as lock:
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


def _kept(artifact: Artifact) -> list[File]:
    return [file for file in artifact.manifest.files if file.path != artifact.manifest.blocks]


def _missing(artifact: Artifact, there: Callable[[Path, File], bool]) -> list[File]:
    """The files that its folder has not got, or not as they should be."""
    folder = _folder_of(artifact)
    return [file for file in _kept(artifact) if not _has_size(folder, file) or not there(folder, file)]


def _has_size(folder: Path, file: File) -> bool:
    try:
        found = (folder / file.path).lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == file.size and found.st_uid == os.geteuid()


def _is_there(noted: bytes | None, recheck: bool) -> Callable[[Path, File], bool]:
    """Whether a file of the right size is the one that was fetched: as it was noted (nothing was where the fetch was
    interrupted), else by its digest. Where no SHA-256 is known (of a plain prefix, of small files of the Hub) it counts
    as noted alone; what an earlier release fetched whole, and noted as nothing, counts so once."""
    try:
        stamps = object_of(noted or b"{}")
    except ValueError:
        stamps = {}

    def there(folder: Path, file: File) -> bool:
        same = stamps.get(file.path) == stamp(folder / file.path)
        if same and not (recheck and file.sha256):
            return True
        if file.sha256:
            return file_digest(folder / file.path, hashlib.sha256()) == file.sha256
        return noted == b""

    return there


def cache_folder() -> Path:
    """Where this user keeps what was fetched: ZHLLAMA_CACHE, by default `zhllama` in the user's folder for caches.
    InputError where somebody else could write there."""
    if given := os.environ.get("ZHLLAMA_CACHE"):
        return own_part_of(Path(given).absolute(), _MEND)
    try:
        return own_folder(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zhllama", _MEND)
    except RuntimeError as error:
        raise InputError(f"this user has no home (HOME is not set); {_MEND}") from error


def require_room(artifacts: Iterable[Artifact]) -> None:
    """InputError when the node's cache has not the room for all that `materialize` would fetch of these."""
    missing = [_missing(artifact, lambda folder, file: True) for artifact in artifacts if artifact.remote]
    require_space(str(cache_folder()), sum(file.size for files in missing for file in files), "ZHLLAMA_CACHE")
