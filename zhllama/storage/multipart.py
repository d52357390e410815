"""Multipart uploads: parts side by side, each with a checksum, resumed after a kill.

An unfinished upload is found by its key, so nothing has to be kept on this side. A part that is there is not sent again
when it is provably the same: of its size, with its MD5 (the ETag) or the CRC32C that the server kept. Parts are of 16
MiB, from the 5,001st on of 64: boundaries depend on nothing but the number, and an object may hold 419 GB.
"""

import hashlib
import logging
import os
import re
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NoReturn
from urllib.parse import quote, urlencode, urlsplit

from zhllama.errors import InputError, StorageFault
from zhllama.storage import folders, s3
from zhllama.storage.addresses import below, is_s3, split_s3
from zhllama.storage.parallel import RoomOfThread, connections
from zhllama.storage.s3_errors import CHECKSUM, REFUSED, RIGHTS, kind_behind, server_code
from zhllama.storage.s3_session import current_session

log = logging.getLogger("storage")

PART = 16 * 2**20
"""Bytes per part of an upload; what fits one part goes in one request."""
MOST_PARTS = 10_000
"""Of one upload, by S3's rules."""
_PARTS_OF_ONE_SIZE = 5_000
_MOST_BYTES = _PARTS_OF_ONE_SIZE * 5 * PART
_GONE = ("NoSuchUpload", "NoSuchKey", "404")
_TAG = re.compile(r"[0-9a-f]{32}")
"""An MD5, as a part's tag is unless it is encrypted with a managed key."""


def part_length(number: int) -> int:
    """Bytes of part `number` (from 1), unless it is the last."""
    return PART if number <= _PARTS_OF_ONE_SIZE else 4 * PART


def _md5(content: s3.Buffer) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _equal_parts(uri: str) -> bool:
    """Whether the store wants all parts but the last of one size: Cloudflare's R2 does."""
    host = urlsplit(current_session().client.meta.endpoint_url).hostname or ""
    return is_s3(uri) and host.endswith(".r2.cloudflarestorage.com")


def check_size(uri: str, size: int) -> None:
    """InputError for a file of more bytes than an object may have there."""
    if is_s3(uri) and size > (most := _PARTS_OF_ONE_SIZE * PART if _equal_parts(uri) else _MOST_BYTES):
        raise _too_much(uri, most)


def _too_much(uri: str, most: int) -> InputError:
    why = "10,000 parts" if most == _MOST_BYTES else "parts of one size, which this store wants"
    return InputError(f"{uri}: over {most / 1e9:.1f} GB, more than one object can hold there in {why}; split it")


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
        if _TAG.fullmatch(self.tag) and _md5(content) == self.tag:
            return True
        return bool(self.crc32c) and self.crc32c == s3.crc32c(content)


class Upload:
    """One multipart upload of `uri`: taken up where an earlier one stopped, or begun. Its calls may come from threads.
    `there` maps part number → Part for what an earlier run left; `put` sends only what is not there yet. Parts carry
    CRC32C, or MD5 where parts are to be kept whose content is not at hand (`md5`): not every server lists CRC32C.

    One that was begun with another kind of checksum takes no part of ours. Where the server lists the kind, it is left;
    where it refuses the first part instead, it is left then."""

    def __init__(self, uri: str, anew: bool = False, md5: bool = False) -> None:
        self.uri = uri
        self._md5 = md5 or s3.uses_md5()
        self._key = split_s3(uri)[1]
        self._lock = threading.Lock()
        self.there: dict[int, Part] = {}
        self._sent: dict[int, dict[str, Any]] = {}
        self._made: dict[int, tuple[int, str]] = {}
        """Of each part, its bytes and its digest; without one for what is kept unseen."""
        found = None if anew else _upload_of_key(uri, self._md5)
        self._taken = found is None
        """Whether the server has taken a part of ours, or would: an upload that we began."""
        if found:
            self._id, self.there = found
            log.info("%s: going on with an upload that stopped, %d parts are there", uri, len(self.there))
        else:
            self._id = self._begin()

    def _begin(self) -> str:
        algorithm = {} if self._md5 else {"ChecksumAlgorithm": "CRC32C"}
        return str(s3.call(self.uri, "create_multipart_upload", Key=self._key, **algorithm)["UploadId"])

    def put(self, number: int, content: s3.Buffer) -> None:
        """Sends part `number`, from 1, unless the server has it already."""
        there = self.there.get(number)
        held = there is not None and there.holds(content)
        digest = there.tag if there and held and self._md5 else self._digest(content)
        # named with its checksum even where the server lists none: parts with and without one do not mix
        named = {} if self._md5 else {"ChecksumCRC32C": digest}
        with self._lock:
            if held and there and self.there.get(number) is there:
                self._sent[number] = {"PartNumber": number, "ETag": there.tag, **named}
                self._made[number] = len(content), digest
                return
            upload = self._id
        checksum = s3.checksum_headers(content, md5=True) if self._md5 else {s3.CRC32C: digest}
        query = urlencode({"partNumber": number, "uploadId": upload}, quote_via=quote)
        try:
            answer = s3.until_answered(
                self.uri, lambda session: session.send("PUT", self.uri, checksum, content, query)
            )
        except (StorageFault, FileNotFoundError, InputError) as error:
            if not self._left(upload, error):
                self._give_up(error)
            self.put(number, content)
            return
        with self._lock:
            if self._id == upload:
                self._taken = True
                self._sent[number] = {"PartNumber": number, "ETag": answer.headers.get("ETag", ""), **named}
                self._made[number] = len(content), digest
                return
        self.put(number, content)

    def _digest(self, content: s3.Buffer) -> str:
        return _md5(content) if self._md5 else s3.crc32c(content)

    def keep(self, number: int) -> None:
        """Part `number` as an earlier run left it belongs to the object; whoever says so verifies the whole later."""
        self._sent[number] = {"PartNumber": number, "ETag": self.there[number].tag}
        self._made[number] = self.there[number].size, ""

    def _left(self, upload: str, error: Exception) -> bool:
        """Whether another upload has taken the place of this one, which is not ours to go on with."""
        if kind_behind(error) not in (REFUSED, CHECKSUM):
            return False
        with self._lock:
            if self._id != upload:
                return True
            if self._taken:
                return False
            if self._sent:
                # what of it was to be used is not at hand any more: the next run begins anew
                self._drop(error)
            self._id, self.there, self._taken = self._begin(), {}, True
            log.info("%s: the upload that stopped was begun with other settings and is left; begun anew", self.uri)
            return True

    def _drop(self, error: Exception) -> NoReturn:
        self.abort()
        said = "an upload that stopped cannot be gone on with, and is dropped; try again"
        raise StorageFault(f"{self.uri}: {said} ({error})") from error.__cause__

    def _give_up(self, error: Exception) -> NoReturn:
        if server_code(error) == "NoSuchUpload":
            raise StorageFault(f"{self.uri}: the upload is gone: ended by another run, or lost; try again") from error
        raise error

    def complete(self) -> None:
        parts = [self._sent[number] for number in sorted(self._sent)]
        upload = {"UploadId": self._id, "MultipartUpload": {"Parts": parts}}
        try:
            s3.call(self.uri, "complete_multipart_upload", Key=self._key, **upload)
        except (StorageFault, FileNotFoundError, InputError) as error:
            if self.there and (kind_behind(error) is REFUSED or server_code(error).startswith("InvalidPart")):
                self._drop(error)
            # the answer to an earlier try may have been lost after the server had done it
            if server_code(error) != "NoSuchUpload" or not self._is_complete([part["ETag"] for part in parts]):
                self._give_up(error)

    def _is_complete(self, tags: list[str]) -> bool:
        """Whether the object is made of our parts: by its tag, or by its bytes where that is no MD5 (encrypted with a
        managed key, R2): they are read again, which is less than to send them again."""
        try:
            found = s3.call(self.uri, "head_object", Key=self._key)
        except FileNotFoundError:
            return False
        made = [self._made[number] for number in sorted(self._made)]
        if found["ContentLength"] != sum(size for size, _ in made):
            return False
        tags = [tag.strip('"') for tag in tags]
        if all(map(_TAG.fullmatch, tags)):
            whole = f"{_md5(bytes.fromhex(''.join(tags)))}-{len(tags)}"
            if str(found["ETag"]).strip('"') == whole:
                return True
        start = 0
        for size, digest in made:
            content = memoryview(bytearray(size))
            s3.get_into(self.uri, start, size, content)
            if digest and self._digest(content) != digest:
                return False
            start += size
        return True

    def abort(self) -> None:
        discard(self.uri, self._id)


def discard(uri: str, upload: str) -> None:
    """Ends an unfinished upload, and frees its parts; one that is gone is fine."""
    try:
        s3.call(uri, "abort_multipart_upload", Key=split_s3(uri)[1], UploadId=upload)
    except (StorageFault, FileNotFoundError) as error:
        if server_code(error) not in _GONE:
            raise


@dataclass(frozen=True)
class Unfinished:
    """An upload under way to `uri`, of a live writer or a killed one, which costs space; since when (UTC)."""

    uri: str
    began: datetime
    id: str
    bytes: int


def unfinished(uri: str) -> list[Unfinished]:
    """The uploads under way below a prefix. Those of the whole bucket are listed: MinIO takes a prefix for a key."""
    bucket, prefix = split_s3(uri)[0], below(uri)
    found = []
    for upload in _uploads(uri, ""):
        if upload["Key"].startswith(prefix):
            one = f"s3://{bucket}/{upload['Key']}"
            size = sum(part["Size"] for part in _parts(one, upload["UploadId"])[0])
            found.append(Unfinished(one, upload["Initiated"].astimezone(UTC), upload["UploadId"], size))
    return found


def _uploads(uri: str, prefix: str) -> list[dict[str, Any]]:
    """The multipart uploads under way in the bucket of `uri` whose keys begin so, as the server lists them."""
    pages = s3.call_pages(uri, "list_multipart_uploads", Prefix=prefix)
    return [upload for page in pages for upload in page.get("Uploads", [])]


def _upload_of_key(uri: str, md5: bool) -> tuple[str, dict[int, Part]] | None:
    """The newest upload under way to `uri` that may take parts with our checksum, and its parts."""
    # AWS gives an upload that was begun without a kind of checksum its own
    ours = {"", "CRC64NVME"} if md5 else {"", "CRC32C"}
    try:
        found = [one for one in _uploads(uri, split_s3(uri)[1]) if one["Key"] == split_s3(uri)[1]]
    except (InputError, StorageFault) as error:
        if kind_behind(error) in (RIGHTS, REFUSED):
            # an account without the right to list, a server without the call: there is nothing to resume from
            log.debug("unfinished uploads cannot be listed: %s", error)
            return None
        raise
    for one in sorted(found, key=lambda one: one["Initiated"], reverse=True):
        listed, told = _parts(uri, one["UploadId"])
        told = [one, *told]
        kinds = {key.removeprefix("Checksum") for part in listed for key in part if key.startswith("Checksum")}
        kinds |= {said.get("ChecksumAlgorithm", "") for said in told}
        # ours is a checksum of each part
        whole = not md5 and any(said.get("ChecksumType") == "FULL_OBJECT" for said in told)
        if kinds <= ours and not whole:
            parts = [
                Part(part["PartNumber"], part["Size"], part["ETag"].strip('"'), part.get("ChecksumCRC32C", ""))
                for part in listed
            ]
            return one["UploadId"], {part.number: part for part in parts}
        log.info("%s: an upload that stopped was begun with another kind of checksum, and is left", uri)
    return None


def _parts(uri: str, upload: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The parts that an unfinished upload has, as the server lists them, and the pages of the list; none when it is
    gone."""
    try:
        pages = s3.call_pages(uri, "list_parts", Key=split_s3(uri)[1], UploadId=upload)
    except (StorageFault, FileNotFoundError) as error:
        if server_code(error) in _GONE:
            return [], []
        raise
    return [part for page in pages for part in page.get("Parts", [])], pages


class S3Writer(folders.PieceWriter):
    """A stream into an object: parts are sent by threads while the next one is filled, what fits one part at commit.
    Memory: PART x (connections + 1)."""

    def __init__(self, uri: str) -> None:
        super().__init__(bytearray(PART), connections())
        self._uri, self._number = uri, 1
        self._upload: Upload | None = None
        self._free: list[bytearray] = []

    def _hand_on(self) -> None:
        if self._number > _PARTS_OF_ONE_SIZE and (self._number > MOST_PARTS or _equal_parts(self._uri)):
            raise _too_much(self._uri, _PARTS_OF_ONE_SIZE * PART if _equal_parts(self._uri) else _MOST_BYTES)
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
        check_size(self._uri, size)
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
