"""S3: boto3's client for the calls that are few, and signed requests of our own for the bytes: 0.3-0.4 CPU-seconds per
GB where boto3's transfers cost 1.7-4, most of it in Python between socket and buffer.

Retries are ours: a request is tried 8 times (AWS_MAX_ATTEMPTS) with growing pauses, some 12 s in all, which a server
that is started again needs; a read goes on at the byte where it broke.
"""

import base64
import hashlib
import http.client
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from crc32c import crc32c as crc32c_of

from zhllama.errors import InputError, StorageFault, Truncated
from zhllama.retries import Result, with_retries
from zhllama.storage.addresses import split_s3, too_large
from zhllama.storage.parallel import Take, room
from zhllama.storage.s3_errors import (
    AGAIN,
    code_and_status,
    kind_of,
    knows_no_condition,
    mapped,
    region_of,
    server_code,
    wait_asked,
    worth_reading_again,
)
from zhllama.storage.s3_session import Buffer, Session, current_session, forget_client

CRC32C = "x-amz-checksum-crc32c"
VERSIONS = 5
"""Of an object that is replaced while it is read: so many are begun."""


def until_answered(uri: str, attempt: Callable[[Session], Result], tries: int | None = None) -> Result:
    """What `attempt(session)` returns, tried again while that makes sense; raises our errors.

    Credentials that are refused are read again once (a rotated file, a new web identity token), and so they are where
    the server says no more than 400, 401 or 403, as it does to every HEAD; one wrong signature is forgiven with that: a
    byte that flips on the way looks like it. A bucket is looked for once in the region that the server names.
    """
    from botocore.exceptions import ClientError

    refused, moves = False, 0

    def answered() -> Result:
        nonlocal refused, moves
        while True:
            session = current_session()
            try:
                return attempt(session)
            except ClientError as error:
                _, status = code_and_status(error)
                region = region_of(error.response)
                if region and status in (301, 307, 400) and moves < 2 and session.moved(split_s3(uri)[0], region):
                    moves += 1
                    continue
                if refused or not worth_reading_again(error):
                    raise
                refused = True
                forget_client()

    with mapped(uri):
        return with_retries(answered, _passes, tries=tries or current_session().attempts, asked=wait_asked)


def _passes(error: BaseException) -> bool:
    """Whether the same request may be answered later."""
    from botocore import exceptions as boto

    if isinstance(error, boto.ClientError):
        return kind_of(error) is AGAIN
    return isinstance(error, (boto.HTTPClientError, boto.IncompleteReadError)) and not isinstance(error, boto.SSLError)


def call(uri: str, operation: str, **arguments: Any) -> dict[str, Any]:
    """One of boto3's operations on the bucket of `uri` (`Bucket` is filled in); boto3 retries, and we map errors."""
    return dict(by_boto3(uri, lambda client: getattr(client, operation)(Bucket=split_s3(uri)[0], **arguments)))


def call_pages(uri: str, operation: str, **arguments: Any) -> list[dict[str, Any]]:
    arguments["Bucket"] = split_s3(uri)[0]
    return by_boto3(uri, lambda client: list(client.get_paginator(operation).paginate(**arguments)))


def by_boto3(uri: str, ask: Callable[[Any], Result]) -> Result:
    """`ask(client)` of boto3, which tries again by itself, but for an answer that it cannot read; raises our errors."""
    from botocore.exceptions import ResponseStreamingError
    from botocore.parsers import ResponseParserError

    # what its parsers raise where a number, a date or the XML around them is none
    unreadable = (ResponseParserError, ValueError, LookupError)

    def attempt(session: Session) -> Result:
        try:
            return ask(session.client)
        except unreadable:
            try:
                return ask(session.client)
            except unreadable as error:
                raise ResponseStreamingError(error=error) from error

    return until_answered(uri, attempt, tries=1)


def checksum_headers(content: Buffer, md5: bool = False) -> dict[str, str]:
    """CRC32C, which the server checks before it stores; or MD5, on demand or where the settings ask for it."""
    if md5 or uses_md5():
        digest = hashlib.md5(content, usedforsecurity=False).digest()
        return {"Content-MD5": base64.b64encode(digest).decode()}
    return {CRC32C: crc32c(content)}


def uses_md5() -> bool:
    """Whether the settings ask for no newer checksum (AWS_REQUEST_CHECKSUM_CALCULATION=when_required)."""
    return bool(current_session().checksums == "when_required")


def crc32c(content: Buffer) -> str:
    """CRC32C as S3 writes it: base64 of four bytes, big-endian."""
    return base64.b64encode(struct.pack(">I", crc32c_of(content))).decode()


def put(uri: str, content: Buffer, if_absent: bool = False) -> None:
    """A whole object in one request. With `if_absent`, FileExistsError when it is already there."""
    signed = hashlib.sha256(content).hexdigest()
    tries = 0

    def attempt(session: Session) -> None:
        nonlocal tries
        tries += 1
        headers = {"X-Amz-Content-SHA256": signed, **checksum_headers(content)}
        session.send("PUT", uri, headers | ({"If-None-Match": "*"} if if_absent else {}), content)

    try:
        until_answered(uri, attempt)
    except FileExistsError:
        # the answer to an earlier try may have been lost after the server had stored it
        if tries == 1 or size(uri) != len(content) or get(uri, len(content)) != bytes(content):
            raise
    except InputError as error:
        if not if_absent or not knows_no_condition(error):
            raise
        # a server without conditional writes: two that look at the same moment are not kept apart
        with suppress(FileNotFoundError):
            size(uri)
            raise FileExistsError(uri) from error
        put(uri, content)


def get(uri: str, most: int) -> bytes:
    """A whole object; InputError where it has more bytes."""

    from botocore.exceptions import ResponseStreamingError

    def attempt(session: Session) -> bytes:
        with _streaming(session, uri, {}) as (raw, headers):
            said = headers.get("Content-Length")
            if said is not None and not said.isdigit():
                raise ResponseStreamingError(error=f"Content-Length: {said}")
            length = int(said) if said is not None else size(uri)
            if length > most:
                raise too_large(uri, length, most)
            buffer = bytearray(length)
            for _ in _filled(raw, len(buffer), lambda at: memoryview(buffer)[at:]):
                pass
            return bytes(buffer)

    return until_answered(uri, attempt)


def size(uri: str) -> int:
    """Bytes of an object."""
    bucket, key = split_s3(uri)

    return by_boto3(uri, lambda client: int(client.head_object(Bucket=bucket, Key=key)["ContentLength"]))


def get_into(uri: str, start: int, length: int, buffer: memoryview, take: Take | None = None) -> None:
    """Reads `length` of the object's bytes from `start`, as storage.read_piece does; Truncated when it has not so many.
    A connection that breaks is taken up at the byte where it broke, of the same version of the object."""
    from botocore.exceptions import ResponseStreamingError

    if not length:
        return None
    done = 0
    tag: str | None = None

    def truncated(there: int) -> Truncated:
        return Truncated(f"{uri}: {there} bytes at {start} where {length} were expected; the file is truncated")

    def attempt(session: Session) -> None:
        nonlocal done, tag
        begun, first, last = done, start + done, start + length - 1
        headers = {"Range": f"bytes={first}-{last}", **({"If-Match": tag} if done and tag else {})}
        with _streaming(session, uri, headers) as (raw, answer):
            found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", answer.get("Content-Range", ""))
            # a server that knows no ranges sends the whole
            if not found and (first or answer.get("Content-Length") != str(length)):
                raise StorageFault(f"{uri}: the server does not answer with ranges; use another S3 server")
            if found and (int(found[1]) != first or int(found[2]) > last):
                raise ResponseStreamingError(error=f"{found[0]} came where {first}-{last} were asked for")
            if found and int(found[2]) < last:
                raise truncated(max(0, int(found[2]) + 1 - start))
            tag = answer.get("ETag")
            for piece in _filled(raw, length - begun, lambda at: room(buffer, length, begun + at)):
                if take:
                    take(done, piece)
                done += len(piece)

    for _ in range(VERSIONS):
        try:
            return until_answered(uri, attempt)
        except FileExistsError:
            # If-Match did not hold: another version since, which is read from its beginning
            done, tag = 0, None
        except StorageFault as error:
            if server_code(error) in ("InvalidRange", "416"):
                raise truncated(0) from error
            raise
    raise StorageFault(f"{uri}: it was replaced {VERSIONS} times while it was read; try again when nobody writes it")


@contextmanager
def _streaming(session: Session, uri: str, headers: Mapping[str, str]) -> Iterator[tuple[Any, Any]]:
    """The body of a GET as a stream, and its headers. What was not read to its end is not used again."""
    response = session.send("GET", uri, headers)
    try:
        yield response.raw, response.headers
    except BaseException:
        response.raw.close()
        raise
    # a body that has more bytes than were asked of it leaves a connection that nobody may use
    if response.raw.read(1):
        response.raw.close()
    response.raw.release_conn()


def _filled(raw: Any, length: int, into: Callable[[int], memoryview]) -> Iterator[memoryview]:
    """Reads `length` bytes, by `into(bytes so far)`, and yields what came. A body that ends early is an error."""
    from botocore.exceptions import IncompleteReadError, ResponseStreamingError
    from urllib3.exceptions import HTTPError

    # urllib3's own readinto reads into bytes of its own and copies them: a third more time, all of it under the GIL.
    # The response of http.client below it (botocore reaches for it, too) reads into ours.
    source = raw._fp
    at = 0
    while at < length:
        piece = into(at)
        try:
            count = source.readinto(piece)
        except (HTTPError, http.client.HTTPException, OSError) as error:
            raise ResponseStreamingError(error=error) from error
        if not count:
            raise IncompleteReadError(actual_bytes=at, expected_bytes=length)
        at += count
        # not in the try: a full disk, where the bytes go to, is no fault of the server's
        yield piece[:count]
