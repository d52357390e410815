"""A file written by parts, in any order and from several threads, that goes on where a killed writer stopped.

In S3 the unfinished multipart upload is the record of the parts. Nothing is visible before commit(). The `kept` parts
were hashed by nobody who is still there: read the file again before it is believed.
"""

import os
from pathlib import Path

from zhllama import storage
from zhllama.errors import StorageFault


def extents(size: int) -> list[tuple[int, int]]:
    """The parts of a file, of an empty one too, (first byte, bytes) each: whole 8 MiB blocks but for the last one."""
    found = [(0, min(storage.PART, size))]
    while (start := sum(found[-1])) < size:
        found.append((start, min(storage.part_length(len(found) + 1), size - start)))
    return found


def open_parts(uri: str, size: int, anew: bool = False) -> "Parts":
    """A writer for a file of `size` bytes at `uri`. `anew`: what an earlier writer left is dropped."""
    return (_Upload if storage.is_s3(uri) else _PartsFile)(uri, extents(size), anew)


class _Upload:
    """A multipart upload, the one under way for this key if there is one."""

    def __init__(self, uri: str, parts: list[tuple[int, int]], anew: bool) -> None:
        self._upload = storage.Upload(uri, anew, md5=True)
        there = {number - 1: part.size for number, part in self._upload.there.items()}
        self.kept = frozenset(number for number, (_, length) in enumerate(parts) if there.get(number) == length)
        for number in self.kept:
            self._upload.keep(number + 1)
        self.commit, self.abort = self._upload.complete, self._upload.abort

    def put(self, number: int, content: bytes) -> None:
        self._upload.put(number + 1, content)

    def suspend(self) -> None:
        """An upload under way is a record at the server: there is nothing to let go."""


class _PartsFile:
    """A hidden file beside the target, and the journal of the parts that are in it, a number a line."""

    def __init__(self, uri: str, parts: list[tuple[int, int]], anew: bool) -> None:
        self._target, self._parts = Path(uri), parts
        self._path = self._target.with_name(f".{self._target.name}.parts")
        self._journal = self._target.with_name(f".{self._target.name}.parts.txt")
        self._target.parent.mkdir(parents=True, exist_ok=True)
        if anew:
            self._path.unlink(missing_ok=True)
        if not self._path.exists():
            self._journal.unlink(missing_ok=True)
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        self._log = os.open(self._journal, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        # what follows the last line end may have been cut short
        lines = os.pread(self._log, os.fstat(self._log).st_size, 0).split(b"\n")[:-1]
        size = os.fstat(self._file).st_size
        numbers = {int(line) for line in lines if line.isdigit()}
        self._there = {number for number in numbers if number < len(parts) and sum(parts[number]) <= size}
        self.kept = frozenset(self._there)
        # what a killed writer may have begun is no beginning of our first line
        os.write(self._log, b"\n")

    def put(self, number: int, content: bytes) -> None:
        view = memoryview(content)
        at, _ = self._parts[number]
        while view:
            count = os.pwrite(self._file, view, at)
            view, at = view[count:], at + count
        # a part counts when it is on the disk; its line is one write, whole whatever other threads append
        os.fdatasync(self._file)
        os.write(self._log, f"{number}\n".encode())
        self._there.add(number)

    def commit(self) -> None:
        if len(self._there) != len(self._parts):
            raise ValueError(f"{self._target}: committed before all its parts were put")
        os.fsync(self._file)
        self.suspend()
        try:
            os.replace(self._path, self._target)
        except FileNotFoundError as error:
            raise StorageFault(f"{self._target}: another program wrote the same file; try again") from error
        self._journal.unlink(missing_ok=True)

    def abort(self) -> None:
        self.suspend()
        self._path.unlink(missing_ok=True)
        self._journal.unlink(missing_ok=True)

    def suspend(self) -> None:
        os.close(self._file)
        os.close(self._log)


Parts = _Upload | _PartsFile
"""Parts are numbered from 0, as `extents` cuts the file; `kept`: those of an earlier writer. put() may be called from
any thread; suspend() stops here, and the parts stay for the next writer."""
