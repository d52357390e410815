"""Files in folders: written beside their place under a hidden name, and moved there when they are whole and on disk."""

import errno
import os
import re
import shutil
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from components.shared.errors import Truncated
from components.shared.storage.multipart import Unfinished

_HAND_OVER = 16 * 2**20
"""Bytes after which what was written is handed over to the disk."""
_LEFT = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{32}\.tmp")


def beside(path: str | Path) -> Path:
    """A hidden name of its own in the same folder: listings leave it out, and a rename puts it into place."""
    target = Path(path)
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")


def read_into(path: str, start: int, buffer: memoryview) -> None:
    """Fills `buffer` from byte `start`; Truncated when the file has not so many."""
    with open(path, "rb", buffering=0) as file:
        at = 0
        while at < len(buffer):
            count = os.preadv(file.fileno(), [buffer[at:]], start + at)
            if not count:
                raise Truncated(
                    f"{path}: {at} bytes at {start} where {len(buffer)} were expected; the file is truncated"
                )
            at += count


def write(path: str, content: bytes | memoryview, if_absent: bool = False) -> None:
    """A whole file at once, on the disk when this returns. With `if_absent`, FileExistsError when it is there."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if if_absent:
            os.link(temporary, target)
        else:
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def copy_file(source: str, target: str) -> None:
    """A file to another place, in the kernel where that can."""
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(target)
    try:
        shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


class FileWriter:
    """A stream into a hidden file beside the target; commit() moves it into place."""

    def __init__(self, uri: str) -> None:
        self._target = Path(uri)
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = beside(uri)
        self._file: BinaryIO = open(self._temporary, "wb")
        self._at = self._handed_over = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        count = self._file.write(data)
        self._at += count
        if self._at - self._handed_over >= _HAND_OVER:
            # Linux begins to write these pages to the disk, and does not wait for it: commit() has less to wait for
            os.posix_fadvise(self._file.fileno(), self._handed_over, 0, os.POSIX_FADV_DONTNEED)
            self._handed_over = self._at
        return count

    def commit(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self._target)

    def abort(self) -> None:
        # closing writes what is buffered, and on a full disk fails as the write did; the file is given up anyway
        with suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def leave(self) -> None:
        """A stream into a folder cannot be taken up again: nothing is kept."""
        self.abort()


def left_behind(folder: str) -> list[Unfinished]:
    """The hidden files of writers, of live ones as of those that were killed; oldest first."""
    found = []
    for path in Path(folder).rglob(".*.tmp"):
        match = _LEFT.fullmatch(path.name)
        if match and path.is_file():
            status = path.stat()
            began = datetime.fromtimestamp(status.st_mtime, UTC)
            found.append(Unfinished(str(path.with_name(match["name"])), began, str(path), status.st_size))
    return sorted(found, key=lambda one: one.began)


def check_room(folder: Path, size: int) -> None:
    """OSError (ENOSPC) when `folder`, or the nearest of its parents that is there, has not `size` bytes left."""
    there = folder
    while not there.exists():
        there = there.parent
    if shutil.disk_usage(there).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
