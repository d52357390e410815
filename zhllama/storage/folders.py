"""Files in folders: written beside their place under a hidden name, and moved there when they are whole and on disk;
and whether there is room for what will be written, since hours of work must not end on a full disk."""

import errno
import fcntl
import mmap
import os
import shutil
import stat
import uuid
from contextlib import suppress
from pathlib import Path

from zhllama.errors import InputError, Truncated
from zhllama.progress import human
from zhllama.storage.addresses import is_s3, too_large
from zhllama.storage.parallel import Take, Threads, room
from zhllama.storage.s3_errors import LOCAL_FOLDER

_PIECE = 8 * 2**20
"""Bytes that a stream writes at once."""
_O_DIRECT = getattr(os, "O_DIRECT", 0)
"""0 where the system has no such thing (macOS)."""


def beside(path: str) -> Path:
    """A hidden name of its own in the same folder: listings leave it out, and a rename puts it into place."""
    target = Path(path)
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")


def read_into(path: str, start: int, length: int, buffer: memoryview, take: Take | None = None) -> None:
    """Reads `length` bytes from `start`, as storage.read_piece does; Truncated when the file has not so many."""
    with open(path, "rb", buffering=0) as file:
        at = 0
        while at < length:
            piece = room(buffer, length, at) if take else buffer[at:length]
            count = os.preadv(file.fileno(), [piece], start + at)
            if not count:
                raise Truncated(f"{path}: {at} bytes at {start} where {length} were expected; the file is truncated")
            if take:
                take(at, piece[:count])
            at += count


def read(path: str, most: int) -> bytes:
    """A whole file, or what a pipe gives to its end; InputError where it has more bytes."""
    # of a pipe that nobody writes to, opening alone would wait: this one is at its end
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        found = os.fstat(file.fileno())
        if found.st_size > most:
            raise too_large(path, found.st_size, most)
        if stat.S_ISREG(found.st_mode):
            return file.read()
        # a pipe and a device say nothing of their size
        os.set_blocking(file.fileno(), True)
        if len(content := file.read(most + 1)) > most:
            raise too_large(path, len(content), most)
        return content


def write(path: str, content: bytes | memoryview, if_absent: bool = False) -> None:
    """A whole file at once, on the disk when this returns. With `if_absent`, FileExistsError when it is there."""
    temporary = beside(path)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        (os.link if if_absent else os.replace)(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class PieceWriter:
    """A stream that fills pieces of memory; a full one is handed on to threads when more comes."""

    def __init__(self, piece: bytearray | mmap.mmap, threads: int) -> None:
        self._piece, self._filled = piece, 0
        self._threads = Threads(threads)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        view = memoryview(data).cast("B")
        at = 0
        while at < len(view):
            if self._filled == len(self._piece):
                self._hand_on()
                self._filled = 0
            count = min(len(self._piece) - self._filled, len(view) - at)
            self._piece[self._filled : self._filled + count] = view[at : at + count]
            self._filled += count
            at += count
        return len(view)

    def _hand_on(self) -> None:
        raise NotImplementedError


class FileWriter(PieceWriter):
    """A stream into a hidden file beside the target; commit() moves it into place. What is larger than a piece goes to
    the disk past the page cache (O_DIRECT), where the file system can: models are written faster than disks take them,
    and filling the cache with what has to be on the disk at the end cost 1 to 2 CPU-seconds a GB where this costs 0.1.
    A thread writes a piece while the next one is filled. Memory: two pieces."""

    def __init__(self, uri: str) -> None:
        self._target = Path(uri)
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = beside(uri)
        self._file = open(self._temporary, "xb", buffering=0)
        super().__init__(_pages(), threads=1)
        self._other: bytearray | mmap.mmap = _pages()
        self._set_direct(True)

    def _hand_on(self) -> None:
        # waits for the piece before, whose memory is then free
        self._threads.call(self._put, memoryview(self._piece))
        self._piece, self._other = self._other, self._piece

    def _set_direct(self, direct: bool) -> None:
        self._direct = direct and bool(_O_DIRECT)
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL) & ~_O_DIRECT
        try:
            fcntl.fcntl(self._file, fcntl.F_SETFL, flags | (_O_DIRECT if self._direct else 0))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._direct = False

    def _put(self, piece: memoryview) -> None:
        begin = self._file.tell()
        while piece:
            try:
                piece = piece[os.write(self._file.fileno(), piece) :]
            except OSError as error:
                # a file system that cannot after all, or what is left of a piece that was written in part
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._set_direct(False)
        if not self._direct and hasattr(os, "posix_fadvise"):
            # Linux begins to write these pages to the disk, and does not wait for it: commit() has less to wait for
            os.posix_fadvise(self._file.fileno(), begin, 0, os.POSIX_FADV_DONTNEED)

    def commit(self) -> None:
        self._threads.end()
        self._threads.raise_error()
        # the last piece is no whole number of pages
        self._set_direct(False)
        self._put(memoryview(self._piece)[: self._filled])
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self._target)

    def abort(self) -> None:
        self._threads.end()
        # on some file systems closing, too, says that the disk is full; the file is given up anyway
        with suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    # a stream into a folder cannot be taken up again: nothing is kept
    suspend = abort


def _pages() -> mmap.mmap:
    """Memory of whole pages, as O_DIRECT wants it; large ones where there are such, which the disk takes for less."""
    memory = mmap.mmap(-1, _PIECE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # a kernel without them refuses the advice
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _room_left(folder: Path) -> tuple[int, Path]:
    """Bytes that are free there, and the folder they are asked of: the nearest of its parents that is there."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free, folder


def check_room(folder: Path, size: int) -> None:
    """OSError (ENOSPC) when a folder, which need not be there yet, has not `size` bytes left."""
    if _room_left(folder)[0] < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def place_of(uri: str) -> Path | None:
    """The folder whose disk a file at `uri` takes; None for S3 on another machine, which says nothing of that."""
    if not is_s3(uri):
        return Path(uri)
    return Path(folder) if (folder := os.environ.get(LOCAL_FOLDER)) else None


def require_space(uri: str, need: int, what: str) -> None:
    """InputError when the disk of a folder, or of this machine's own S3 server, has less than `need` bytes free. what:
    option or purpose."""
    if (place := place_of(uri)) is None:
        return
    free, folder = _room_left(place)
    if free < need:
        wanted = f"{human(need, 'B')} will be needed and {human(free, 'B')} are free"
        raise InputError(f"{what} {folder}: {wanted}; free some or choose another place")
