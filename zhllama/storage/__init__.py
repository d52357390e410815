"""Bytes in S3 (`s3://bucket/prefix`) or in folders (`/path`, `file:///path`), behind one small interface.

boto3's standard settings hold, and ZHLLAMA_S3_ENDPOINT before them: KFP pods share their environment with KFP's own S3
client, so our endpoint must not be called AWS_ENDPOINT_URL there. Figures, memory and settings: docs/storage.md.
Errors: what a user can mend (credentials, bucket, endpoint) is an InputError, a server that keeps failing a
StorageFault, a missing object FileNotFoundError.
"""

import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from zhllama.errors import InputError, StorageFault
from zhllama.storage import folders, multipart, s3
from zhllama.storage.addresses import below, is_s3, join, normalise, split_s3
from zhllama.storage.folders import check_room
from zhllama.storage.multipart import PART, Unfinished, Upload, check_size, discard, part_length, unfinished
from zhllama.storage.parallel import Take, Threads, connections, in_parallel
from zhllama.storage.s3_session import forget_client

__all__ = [
    "PART", "Take", "Threads", "Unfinished", "Upload", "check_room", "check_size", "connections", "discard",
    "forget_client", "in_parallel", "is_s3", "join", "normalise", "part_length", "split_s3", "unfinished",
]  # fmt: skip

PIECE = 16 * 2**20
"""Bytes per request of a large read. Of 8 MiB, requests cost SeaweedFS a sixth more and us as much; of 64 no less."""
WHOLE = 256 * 2**20
"""Bytes of a file that is read at once: manifests and notes, which others may write. Of a million files, 130 MB."""
_NEVER = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Stored:
    """A file in a listing: name below the listed prefix, bytes, tag (ETag, or mtime), and last change (UTC)."""

    name: str
    size: int
    tag: str
    modified: datetime = _NEVER


Writer = folders.FileWriter | multipart.S3Writer
"""A stream, visible at commit(), gone after abort(); suspend() stops, too, and keeps what was sent for the next one."""


@contextmanager
def committed(writer: Writer) -> Iterator[Writer]:
    """Commits at a clean end; keeps the parts for another try after a fault of the server's; else leaves nothing."""
    try:
        yield writer
        writer.commit()
    except StorageFault:
        writer.suspend()
        raise
    except BaseException:
        writer.abort()
        raise


def check_writable(uri: str) -> None:
    """Writes and deletes a small object under `uri`; InputError when that fails. The first thing a stage does."""
    # always the same: what a killed command left goes with the next one's
    probe = join(normalise(uri), ".probe")
    try:
        if is_s3(uri):
            # some servers would make an absent bucket at the first write; an account may write below a prefix without
            # any right on the bucket, which the write will tell
            with suppress(InputError):
                s3.call(uri, "head_bucket")
        try:
            write_bytes(probe, b"")
        except (KeyboardInterrupt, SystemExit):
            with suppress(Exception):
                delete(probe)
            raise
        delete(probe)
    except StorageFault as error:
        raise InputError(str(error)) from error
    except OSError as error:
        if is_s3(uri):
            bucket, _ = split_s3(uri)
            raise InputError(f"{uri}: there is no bucket {bucket}; create it, or correct the address") from error
        raise InputError(f"{uri}: cannot write there ({error.strerror}); choose another --store") from error


def size_of(uri: str) -> int:
    """Bytes of one file; FileNotFoundError when it is absent."""
    return s3.size(uri) if is_s3(uri) else os.stat(uri).st_size


def exists(uri: str) -> bool:
    with suppress(FileNotFoundError, NotADirectoryError):
        size_of(uri)
        return True
    return False


def read_or_none(uri: str) -> bytes | None:
    """The file; None where there is none."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return read_bytes(uri)
    return None


def read_bytes(uri: str, start: int = 0, length: int | None = None) -> bytes:
    """The file, or `length` bytes from `start`. Short reads are errors (Truncated). InputError for a file of more than
    WHOLE bytes, where no length says that it is wanted."""
    if length is None and not start:
        return s3.get(uri, WHOLE) if is_s3(uri) else folders.read(uri, WHOLE)
    length = size_of(uri) - start if length is None else length
    buffer = bytearray(length)
    read_into(uri, start, memoryview(buffer))
    return bytes(buffer)


def read_piece(uri: str, start: int, length: int, buffer: memoryview, take: Take | None = None) -> None:
    """Reads `length` of the file's bytes from `start`, in one request, into a writable buffer. Short reads are errors.
    With `take`, which gets every piece as it comes, the buffer may be shorter: STEP bytes, used again and again."""
    (s3.get_into if is_s3(uri) else folders.read_into)(uri, start, length, buffer, take)


def read_into(uri: str, start: int, buffer: memoryview) -> None:
    """As read_piece, by several requests at a time where it is large."""
    if len(buffer) <= PIECE or not is_s3(uri):
        read_piece(uri, start, len(buffer), buffer)
        return
    with Threads(connections()) as threads:
        for at in range(0, len(buffer), PIECE):
            part = buffer[at : at + PIECE]
            threads.call(read_piece, uri, start + at, len(part), part)


def read_chunks(uri: str, chunk: int = PIECE) -> Iterator[bytes]:
    """The file from its beginning, `chunk` bytes at a time."""
    size = size_of(uri)
    for start in range(0, size, chunk):
        yield read_bytes(uri, start, min(chunk, size - start))


def write_bytes(uri: str, content: bytes, if_absent: bool = False) -> None:
    """Writes a whole file at once. With `if_absent`, FileExistsError when it is already there."""
    (s3.put if is_s3(uri) else folders.write)(uri, content, if_absent)


def open_writer(uri: str) -> Writer:
    """A stream into `uri`: a multipart upload, or a temporary file beside it that commit() moves into place."""
    return multipart.S3Writer(uri) if is_s3(uri) else folders.FileWriter(uri)


def copy(source: str, target: str) -> None:
    """One file to another place: server-side within S3, in parts side by side into it, else through this machine."""
    if is_s3(source) and is_s3(target):
        bucket, key = split_s3(source)
        # boto3's managed copy goes to multipart above 8 MB and by parts in parallel
        s3.by_boto3(source, lambda client: client.copy({"Bucket": bucket, "Key": key}, *split_s3(target)))
        return
    with committed(open_writer(target)) as writer:
        if isinstance(writer, multipart.S3Writer):
            writer.send(source)
        else:
            for chunk in read_chunks(source, 2 * PIECE):
                writer.write(chunk)


def listing(uri: str, hidden: bool = False) -> list[Stored]:
    """Every file below a folder or prefix, sorted by name; hidden files (a leading dot) only on demand."""
    # keys that end in a slash are consoles' folder marks
    found = [item for item in _objects(uri) if not item.name.endswith("/")] if is_s3(uri) else _files(Path(uri))
    return sorted((item for item in found if hidden or "/." not in f"/{item.name}"), key=lambda item: item.name)


def not_as_wanted(root: str, wanted: Mapping[str, int]) -> Iterator[tuple[str, int | None]]:
    """Of files that should be below `root`, name → bytes, those that are not, with the bytes they have. A listing may
    lag behind what was written: what it does not show as it should be is asked for by itself."""
    there = {item.name: item.size for item in listing(root, hidden=True)}
    for name, size in wanted.items():
        if there.get(name) != size:
            with suppress(FileNotFoundError, NotADirectoryError):
                there[name] = size_of(join(root, name))
            if there.get(name) != size:
                yield name, there.get(name)


def require_room(root: str, need: int, what: str = "--store") -> None:
    """InputError where the store has no room for `need` bytes below `root`, as far as it can be known: of a folder, and
    of this machine's own S3 server. What a killed run has left there counts."""
    if folders.place_of(root):
        left = sum(item.size for item in listing(root, hidden=True))
        left += sum(upload.bytes for upload in unfinished(root)) if is_s3(root) else 0
        folders.require_space(root, max(0, need - left), what)


def _files(root: Path) -> Iterator[Stored]:
    for path in root.rglob("*"):
        # one may be deleted or renamed meanwhile; or be a link to nothing
        with suppress(FileNotFoundError):
            status = path.stat()
            if stat.S_ISREG(status.st_mode):
                modified = datetime.fromtimestamp(status.st_mtime, UTC)
                yield Stored(path.relative_to(root).as_posix(), status.st_size, str(status.st_mtime_ns), modified)


def _objects(uri: str) -> list[Stored]:
    prefix = below(uri)
    return [
        Stored(item["Key"][len(prefix) :], int(item["Size"]), item["ETag"].strip('"'), item["LastModified"])
        for page in s3.call_pages(uri, "list_objects_v2", Prefix=prefix)
        for item in page.get("Contents", [])
        if item["Key"] != prefix
    ]


def delete(uri: str) -> None:
    """Deletes one file; absent is fine."""
    if is_s3(uri):
        with suppress(FileNotFoundError):
            s3.call(uri, "delete_object", Key=split_s3(uri)[1])
    else:
        Path(uri).unlink(missing_ok=True)


def delete_all(uri: str) -> None:
    """Deletes everything below a folder or prefix, hidden files too."""
    if is_s3(uri):
        in_parallel(delete, [f"{uri}/{item.name}" for item in _objects(uri)])
    else:
        shutil.rmtree(uri, ignore_errors=True)
