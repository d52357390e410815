"""What is this user's alone on a machine of many: folders that nobody else can write to, locks, folders for a while.

Names below /tmp belong to whoever makes them first, and a link there leads wherever its maker wants. So what is kept
lies in a folder whose owner and mode were looked at, a lock opens no link and empties nothing, and folders for a while
have names that nobody can guess (mkdtemp's, mode 0700).
"""

import fcntl
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from zhllama.errors import InputError

log = logging.getLogger("storage")

TEMPORARY = "zhllama-tmp-"
YOUNG = 60.0
"""Seconds in which a folder that nobody holds may be one that is just being made."""


def own_folder(path: Path, mend: str) -> Path:
    """The folder, made where it is not there, in which this user alone can write. InputError where it is another's, or
    a link; `mend` says what to do then. Rights that others have in a folder of this user's are taken away."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode):
            raise InputError(f"{path}: it is a link, and may lead anywhere; remove it, or {mend}")
        if found.st_uid != os.geteuid():
            raise InputError(f"{path}: it belongs to another user (number {found.st_uid}); {mend}")
        if found.st_mode & 0o022:
            path.chmod(0o700)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; {mend}") from error
    return path


def own_part_of(path: Path, mend: str) -> Path:
    """A folder that the user named, or, where others may write there too (a mount, a team's), one of this user's own
    in it."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        # the user's own link is followed; whose the folder behind it is counts
        found = path.stat()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; {mend}") from error
    if found.st_uid == os.geteuid() and not found.st_mode & 0o022:
        return path
    if found.st_uid not in (0, os.geteuid()) and not found.st_mode & stat.S_ISVTX:
        log.warning("%s belongs to user %d, who can replace what is kept there; %s", path, found.st_uid, mend)
    return own_folder(path / f"user-{os.geteuid()}", mend)


def open_lock(path: Path | str) -> BinaryIO:
    """A file to lock, made where it is not there. It is not emptied, and a link at its place is an OSError."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    return open(os.open(path, flags, 0o600), "r+b", buffering=0)


def write_private(path: Path, content: bytes) -> None:
    """A small file for its owner's eyes; whole or not at all: what a full disk or a kill left half written would be
    read at every later start."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.unlink(missing_ok=True)
    with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


@contextmanager
def temporary_folder(place: str = "") -> Iterator[str]:
    """A folder below TMPDIR, or below `place`, gone with the block: after an error and a signal too. What a killed
    process left goes when the next one of this user makes a folder: whoever is alive holds a lock on its own."""
    place = place or tempfile.gettempdir()
    _remove_left(Path(place))
    folder = tempfile.mkdtemp(prefix=TEMPORARY, dir=place)
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def _remove_left(place: Path) -> None:
    for path in place.glob(f"{TEMPORARY}*"):
        with suppress(OSError):
            found = path.lstat()
            if found.st_uid != os.geteuid() or time.time() - found.st_mtime < YOUNG:
                continue
            held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(held)
