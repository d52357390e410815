"""Multipart uploads: parts side by side, each with a checksum, resumed after a kill.

An unfinished upload is found by its key, so nothing has to be kept on this side. A part that is there is not sent again
when it is provably the same: of its size, with its MD5 (the ETag) or the CRC32C that the server kept. Parts are of 16
MiB, from the 5,001st on of 64: boundaries depend on nothing but the number, and an object may hold 419 GB.
"""

import hashlib
import logging
import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NoReturn
from urllib.parse import quote, urlencode

from zhllama.errors import InputError, StorageFault
from zhllama.storage import folders, s3
from zhllama.storage.addresses import below, split_s3
from zhllama.storage.parallel import RoomOfThread, connections
from zhllama.storage.s3_errors import server_code

log = logging.getLogger("storage")

PART = 16 * 2**20
"""Bytes per part of an upload; what fits one part goes in one request."""
MOST_PARTS = 10_000
"""Of one upload, by S3's rules."""
_GONE = ("NoSuchUpload", "NoSuchKey", "404")
_TAG = re.compile(r"[0-9a-f]{32}")
"""An MD5, as a part's tag is unless it is encrypted with a managed key."""


def part_length(number: int) -> int:
    """Bytes of part `number` (from 1), unless it is the last."""
    return PART if number <= 5_000 else 4 * PART


def _md5(content: s3.Buffer) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Part:
    """A part that the server has."""

    number: int
    size: int
    tag: str
    crc32c: str

    def holds(self, content: s3.Buffer) -> bool:
        """Whether it is made of these bytes, as far as the server's tag or checksum can prove it."""
        if self.size != len(content):
            return False
        if _TAG.fullmatch(self.tag):
            return _md5(content) == self.tag
        return bool(self.crc32c) and self.crc32c == s3.crc32c(content)


class Upload:
    """One multipart upload of `uri`: taken up where an earlier one stopped, or begun. Its calls may come from threads.
    `there` maps part number → Part for what an earlier run left; `put` sends only what is not there yet. Parts carry
    CRC32C, or MD5 where parts are to be kept whose content is not at hand (`md5`): not every server lists CRC32C."""

    def __init__(self, uri: str, anew: bool = False, md5: bool = False) -> None:
        self.uri = uri
        self._md5 = md5 or s3.uses_md5()
        self._key = split_s3(uri)[1]
        self.there: dict[int, Part] = {}
        self._sent: dict[int, dict[str, Any]] = {}
        if not anew and (found := _upload_of_key(uri)):
            self._id = found
            self.there = {part.number: part for part in parts_of(uri, self._id)}
            log.info("%s: going on with an upload that stopped, %d parts are there", uri, len(self.there))
        else:
            algorithm = {} if self._md5 else {"ChecksumAlgorithm": "CRC32C"}
            self._id = str(s3.call(uri, "create_multipart_upload", Key=self._key, **algorithm)["UploadId"])

    def put(self, number: int, content: s3.Buffer) -> None:
        """Sends part `number`, from 1, unless the server has it already."""
        there = self.there.get(number)
        tag = there.tag if there is not None and there.holds(content) else None
        checksum = {} if tag and self._md5 else s3.checksum_headers(content, self._md5)
        if tag is None:
            query = urlencode({"partNumber": number, "uploadId": self._id}, quote_via=quote)
            try:
                answer = s3.until_answered(
                    self.uri, lambda session: session.send("PUT", self.uri, checksum, content, query)
                )
            except (StorageFault, FileNotFoundError) as error:
                self._give_up(error)
            tag = answer.headers.get("ETag", "")
        # named with its checksum even where the server lists none: parts with and without one do not mix
        named = {"ChecksumCRC32C": checksum[s3.CRC32C]} if s3.CRC32C in checksum else {}
        self._sent[number] = {"PartNumber": number, "ETag": tag, **named}

    def keep(self, number: int) -> None:
        """Part `number` as an earlier run left it belongs to the object; whoever says so verifies the whole later."""
        self._sent[number] = {"PartNumber": number, "ETag": self.there[number].tag}

    def _give_up(self, error: Exception) -> NoReturn:
        if server_code(error) == "NoSuchUpload":
            raise StorageFault(f"{self.uri}: the upload is gone: ended by another run, or lost; try again") from error
        raise error

    def complete(self) -> None:
        parts = [self._sent[number] for number in sorted(self._sent)]
        upload = {"UploadId": self._id, "MultipartUpload": {"Parts": parts}}
        try:
            s3.call(self.uri, "complete_multipart_upload", Key=self._key, **upload)
        except (StorageFault, FileNotFoundError) as error:
            # the answer to an earlier try may have been lost after the server had done it
            if server_code(error) != "NoSuchUpload" or not self._is_complete([part["ETag"] for part in parts]):
                self._give_up(error)

    def _is_complete(self, tags: list[str]) -> bool:
        tags = [tag.strip('"') for tag in tags]
        if not all(map(_TAG.fullmatch, tags)):
            return False
        try:
            found = str(s3.call(self.uri, "head_object", Key=self._key)["ETag"])
        except FileNotFoundError:
            return False
        return found.strip('"') == f"{_md5(bytes.fromhex(''.join(tags)))}-{len(tags)}"

    def abort(self) -> None:
        discard(self.uri, self._id)


def discard(uri: str, upload: str) -> None:
    """Ends an unfinished upload, and frees its parts; one that is gone is fine."""
    try:
        s3.call(uri, "abort_multipart_upload", Key=split_s3(uri)[1], UploadId=upload)
    except (StorageFault, FileNotFoundError) as error:
        if server_code(error) not in _GONE:
            raise


def _uploads(uri: str, prefix: str) -> list[tuple[str, datetime, str]]:
    """The multipart uploads under way in the bucket of `uri` whose keys begin so: address, beginning (UTC), id."""
    return [
        (f"s3://{split_s3(uri)[0]}/{upload['Key']}", upload["Initiated"].astimezone(UTC), upload["UploadId"])
        for page in s3.call_pages(uri, "list_multipart_uploads", Prefix=prefix)
        for upload in page.get("Uploads", [])
    ]


@dataclass(frozen=True)
class Unfinished:
    """An upload under way to `uri`, of a live writer or a killed one, which costs space; since when (UTC)."""

    uri: str
    began: datetime
    id: str
    bytes: int


def unfinished(uri: str) -> list[Unfinished]:
    """The uploads under way below a prefix."""
    found = _uploads(uri, below(uri))
    return [Unfinished(one, began, id, sum(part.size for part in parts_of(one, id))) for one, began, id in found]


def _upload_of_key(uri: str) -> str | None:
    try:
        found = [(began, id) for one, began, id in _uploads(uri, split_s3(uri)[1]) if one == uri]
        return max(found)[1] if found else None
    except (InputError, StorageFault) as error:
        if server_code(error) in ("AccessDenied", "NotImplemented", "MethodNotAllowed", "501", "405", "403"):
            # an account without the right to list, a server without the call: there is nothing to resume from
            log.debug("unfinished uploads cannot be listed: %s", error)
            return None
        raise


def parts_of(uri: str, upload: str) -> list[Part]:
    """The parts that an unfinished upload has; none when it is gone."""
    try:
        pages = s3.call_pages(uri, "list_parts", Key=split_s3(uri)[1], UploadId=upload)
    except (StorageFault, FileNotFoundError) as error:
        if server_code(error) in _GONE:
            return []
        raise
    return [
        Part(part["PartNumber"], part["Size"], part["ETag"].strip('"'), part.get("ChecksumCRC32C", ""))
        for page in pages
        for part in page.get("Parts", [])
    ]


class S3Writer(folders.PieceWriter):
    """A stream into an object: parts are sent by threads while the next one is filled, what fits one part at commit.
    Memory: PART x (connections + 1)."""

    def __init__(self, uri: str) -> None:
        super().__init__(bytearray(PART), connections())
        self._uri, self._number = uri, 1
        self._upload: Upload | None = None
        self._free: list[bytearray] = []

    def _hand_on(self) -> None:
        if self._number > MOST_PARTS:
            raise InputError(f"{self._uri}: over 419 GB, more than one S3 object can hold in 10,000 parts; split it")
        if self._upload is None:
            self._upload = Upload(self._uri)
        self._threads.call(self._put, self._upload, self._number, self._piece, self._filled)
        self._number += 1
        length = part_length(self._number)
        free = self._free.pop() if self._free else bytearray()
        self._piece = free if len(free) == length else bytearray(length)

    def _put(self, upload: Upload, number: int, buffer: bytearray, length: int) -> None:
        upload.put(number, memoryview(buffer)[:length])
        self._free.append(buffer)

    def send(self, path: str) -> None:
        """A file, its parts read and sent side by side."""
        size, start = os.stat(path).st_size, 0
        if size <= PART:
            folders.read_into(path, 0, size, memoryview(self._piece))
            self._filled = size
            return
        upload = self._upload = Upload(self._uri)
        own = RoomOfThread(part_length(size // PART))

        def put(number: int, start: int, length: int) -> None:
            folders.read_into(path, start, length, own.room)
            upload.put(number, own.room[:length])

        while start < size:
            length = min(part_length(self._number), size - start)
            self._threads.call(put, self._number, start, length)
            self._number, start = self._number + 1, start + length

    def commit(self) -> None:
        if self._upload is None:
            s3.put(self._uri, memoryview(self._piece)[: self._filled])
            return
        if self._filled:
            self._hand_on()
        self._threads.end()
        self._threads.raise_error()
        self._upload.complete()

    def abort(self) -> None:
        self._threads.drop()
        if self._upload is not None:
            self._upload.abort()

    def suspend(self) -> None:
        """Stops here; the parts stay for the next writer of this file, or for `zhllama gc`."""
        self._threads.end(wait=5)
