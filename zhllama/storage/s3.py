"""S3: boto3's client for the calls that are few, and signed requests of our own for the bytes.

boto3's own transfers cost 1.7-4 CPU-seconds per GB, most of it in Python between socket and buffer. Here a request is
signed by botocore, sent by botocore's HTTP session (its connection pool, TLS settings, CA bundle and proxies), and
read straight into the caller's memory: 0.3-0.4 CPU-seconds per GB. Where a bucket lies (region, path or host style,
custom endpoint) is asked of boto3's client, so that every standard AWS setting counts in both.

Retries are ours: a request is tried 8 times (AWS_MAX_ATTEMPTS) with growing pauses, some 12 s in all, which a server
that is started again needs; a read goes on at the byte where it broke.

Errors: what a user can mend (credentials, bucket, endpoint, certificates) is an InputError, a server that keeps
failing a StorageFault, a missing object FileNotFoundError, a condition that does not hold FileExistsError.
"""

import base64
import hashlib
import http.client
import os
import random
import re
import socket
import struct
import threading
import time
import xml.etree.ElementTree
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import parse_qs, quote, urlencode, urlsplit

from crc32c import crc32c as crc32c_of

from zhllama.errors import InputError, StorageFault, Truncated
from zhllama.storage.addresses import split_s3
from zhllama.storage.parallel import Take, patience, room

Result = TypeVar("Result")
Buffer = bytes | bytearray | memoryview

ATTEMPTS = 8
"""Of one request, the first included, unless AWS_MAX_ATTEMPTS says otherwise."""
UNSIGNED = "UNSIGNED-PAYLOAD"


@dataclass(frozen=True)
class _Bucket:
    """Where boto3 would send a request for a bucket: the address before the key, and what goes into the signature."""

    address: str
    region: str
    service: str


class _Session:
    """The standard AWS settings of this process: credentials, client, connection pool."""

    def __init__(self, endpoint: str | None) -> None:
        import boto3
        import botocore.session
        from botocore.config import Config
        from botocore.httpsession import URLLib3Session
        from botocore.utils import get_environ_proxies

        # a session of its own: boto3's default one is shared by threads and keeps the first credentials it found
        core = botocore.session.Session()
        self._boto3 = boto3.session.Session(botocore_session=core)
        self.attempts = int(core.get_config_variable("max_attempts") or ATTEMPTS)
        styled = "addressing_style" in core.get_scoped_config().get("s3", {}) if _profile_is_there(core) else False
        self._endpoint = endpoint
        self._config = Config(
            signature_version="s3v4",
            retries={"mode": "standard", "total_max_attempts": min(self.attempts, 5)},
            connect_timeout=10,
            read_timeout=patience(),
            max_pool_connections=32,
            # our own endpoint is a server on a laptop or in a cluster: bucket names are no host names there
            s3={"addressing_style": "path"} if endpoint and not styled else None,
        )
        try:
            self.client = self._boto3.client("s3", endpoint_url=endpoint, config=self._config)
        except ValueError as error:
            raise InputError(
                f"ZHLLAMA_S3_ENDPOINT={endpoint}: {error}; write http://host:port or https://host"
            ) from error
        self.checksums = self.client.meta.config.request_checksum_calculation
        self.credentials = self._boto3.get_credentials()
        self._http = URLLib3Session(
            verify=core.get_config_variable("ca_bundle") or True,
            proxies=get_environ_proxies(self.client.meta.endpoint_url),
            timeout=(10, patience()),
            max_pool_connections=64,
            # head and body of a request are two packets: without this a body waits 40 ms until the head is acknowledged
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
        )
        self._buckets: dict[str, _Bucket] = {}
        self._signer = _signer_class()

    def _bucket(self, bucket: str) -> _Bucket:
        if bucket not in self._buckets:
            self._buckets[bucket] = self._ask(self.client, bucket)
        return self._buckets[bucket]

    @staticmethod
    def _ask(client: Any, bucket: str) -> _Bucket:
        url = urlsplit(client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "k"}))
        scope = parse_qs(url.query)["X-Amz-Credential"][0].split("/")
        return _Bucket(f"{url.scheme}://{url.netloc}{url.path.removesuffix('/k')}", scope[-3], scope[-2])

    def moved(self, bucket: str, region: str) -> bool:
        """The server named another region than the settings: from now on it is asked there."""
        if self._bucket(bucket).region == region:
            return False
        client = self._boto3.client("s3", region_name=region, endpoint_url=self._endpoint, config=self._config)
        self._buckets[bucket] = self._ask(client, bucket)
        return True

    def send(
        self, method: str, uri: str, query: Mapping[str, str], headers: Mapping[str, str], body: Buffer, stream: bool
    ) -> Any:
        """One signed request; returns botocore's AWSResponse. ClientError for an error of the server's."""
        from botocore.awsrequest import AWSPreparedRequest, AWSRequest
        from botocore.exceptions import NoCredentialsError

        if self.credentials is None:
            raise NoCredentialsError
        name, key = split_s3(uri)
        bucket = self._bucket(name)
        url = f"{bucket.address}/{quote(key, safe='/~')}" + (f"?{urlencode(query, quote_via=quote)}" if query else "")
        request = AWSRequest(method, url, headers=dict(headers))
        self._signer(self.credentials.get_frozen_credentials(), bucket.service, bucket.region).add_auth(request)
        if method == "PUT":
            request.headers["Content-Length"] = str(len(body))
        prepared = AWSPreparedRequest(method, url, dict(request.headers.items()), body or None, stream)
        response = self._http.send(prepared)
        if response.status_code >= 300:
            raise _client_error(method, response)
        return response


def _profile_is_there(core: Any) -> bool:
    from botocore.exceptions import ProfileNotFound

    try:
        core.get_scoped_config()
    except ProfileNotFound:
        # said in full where the client is made
        return False
    return True


@lru_cache(maxsize=1)
def _signer_class() -> Any:
    from botocore.auth import S3SigV4Auth

    class Signer(S3SigV4Auth):
        """Signs the payload's digest that the request itself names: large bodies are hashed once, by their owner."""

        def payload(self, request: Any) -> str:
            return str(request.headers.get("X-Amz-Content-SHA256", UNSIGNED))

        def _modify_request_before_signing(self, request: Any) -> None:
            named = request.headers.get("X-Amz-Content-SHA256")
            super()._modify_request_before_signing(request)
            if named:
                request.headers.replace_header("X-Amz-Content-SHA256", named)

    return Signer


def _client_error(method: str, response: Any) -> Exception:
    from botocore.exceptions import ClientError, ResponseStreamingError
    from urllib3.exceptions import HTTPError

    try:
        content = response.content
    except (HTTPError, OSError) as error:
        return ResponseStreamingError(error=error)
    try:
        # what the answer says of its encoding is not believed: a byte that flips there names one that nobody knows
        text = xml.etree.ElementTree.fromstring(content, xml.etree.ElementTree.XMLParser(encoding="utf-8"))
        code, message = text.findtext("Code") or "", text.findtext("Message") or ""
    except xml.etree.ElementTree.ParseError:
        code, message = "", ""
    status = response.status_code
    metadata = {"HTTPStatusCode": status, "HTTPHeaders": dict(response.headers.items())}
    said = {"Error": {"Code": code or str(status), "Message": message}, "ResponseMetadata": metadata}
    return ClientError(said, method)


@lru_cache(maxsize=4)
def _session_for(endpoint: str | None, process: int) -> _Session:
    return _Session(endpoint)


def _session() -> _Session:
    with _making:
        return _session_for(os.environ.get("ZHLLAMA_S3_ENDPOINT") or None, os.getpid())


_making = threading.Lock()


def s3_client() -> Any:
    """boto3's S3 client for this process (a forked child gets its own). A test may clear it with `forget_client`."""
    with mapped("s3"):
        return _session().client


def forget_client() -> None:
    """The settings are read again at the next request."""
    _session_for.cache_clear()


os.register_at_fork(after_in_child=lambda: globals().update(_making=threading.Lock()))


# --- errors -----------------------------------------------------------------------------------------------------------

_CREDENTIALS = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "InvalidToken")
_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired")
_REGION = ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException")
_AGAIN = (
    "SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "Throttling", "ThrottlingException",
    "RequestLimitExceeded", "BadDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch", "IncompleteBody",
)  # fmt: skip
"""What a server says of a request that may succeed when it is sent again; a bad digest is a byte lost on the way."""


@contextmanager
def mapped(uri: str) -> Iterator[None]:
    """Turns botocore's exceptions into ours."""
    from botocore import exceptions as boto

    endpoint = os.environ.get("ZHLLAMA_S3_ENDPOINT") or os.environ.get("AWS_ENDPOINT_URL_S3") or "the AWS endpoint"
    try:
        yield
    except (boto.NoCredentialsError, boto.PartialCredentialsError, boto.ProfileNotFound) as error:
        raise InputError(
            f"{uri}: no S3 credentials ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from error
    except boto.NoRegionError as error:
        raise InputError(f"{uri}: no S3 region; set AWS_DEFAULT_REGION") from error
    except boto.ClientError as error:
        raise _ours(uri, error) from error
    except (boto.EndpointConnectionError, boto.ConnectTimeoutError) as error:
        raise StorageFault(f"{uri}: no S3 server answers at {endpoint}; check the endpoint and the network") from error
    except boto.SSLError as error:
        raise InputError(
            f"{uri}: the certificate of {endpoint} is not accepted ({error}); name its CA in AWS_CA_BUNDLE"
        ) from error
    except (boto.HTTPClientError, boto.IncompleteReadError) as error:
        raise StorageFault(f"{uri}: the connection to S3 failed ({error}); try again") from error
    except boto.BotoCoreError as error:
        raise InputError(f"{uri}: S3 settings are wrong ({error}); check the endpoint, region and profile") from error


def _ours(uri: str, error: Any) -> Exception:
    code, status = _said(error)
    if code in ("NoSuchKey", "404", "NotFound"):
        return FileNotFoundError(uri)
    if code in ("PreconditionFailed", "412", "ConditionalRequestConflict"):
        return FileExistsError(uri)
    if code == "NoSuchBucket":
        bucket, _ = split_s3(uri)
        return InputError(f"{uri}: there is no bucket {bucket}; create it, or correct the address")
    if code in _REGION:
        return InputError(f"{uri}: S3 says the bucket is in another region ({code}); set AWS_DEFAULT_REGION")
    if code in _CREDENTIALS or code in _EXPIRED or status in (401, 403):
        return InputError(
            f"{uri}: S3 refuses these credentials ({code}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the "
            "rights of this account on the bucket"
        )
    return StorageFault(f"{uri}: S3 answered {code or status} ({error}); try again")


def _said(error: Any) -> tuple[str, int]:
    """The server's code and the HTTP status of a ClientError."""
    return (
        str(error.response.get("Error", {}).get("Code", "")),
        int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)),
    )


def said(error: BaseException | None) -> str:
    """The server's code behind one of our errors; empty where no server spoke."""
    from botocore.exceptions import ClientError

    cause = error.__cause__ if error is not None else None
    return _said(cause)[0] if isinstance(cause, ClientError) else ""


# --- requests ---------------------------------------------------------------------------------------------------------


def patiently(uri: str, attempt: Callable[[_Session], Result], tries: int | None = None) -> Result:
    """Calls `attempt(session)` until it succeeds or it makes no sense any more; raises our errors.

    Expired credentials are read again once (a rotated file, a new web identity token), a bucket is looked for once in
    the region that the server names, and one wrong signature is forgiven: a byte that flips on the way looks like that.
    """
    from botocore import exceptions as boto

    failures, refused = 0, False
    with mapped(uri):
        while True:
            session = _session()
            try:
                return attempt(session)
            except boto.SSLError:
                raise
            except boto.ClientError as error:
                code, status = _said(error)
                region = error.response["ResponseMetadata"].get("HTTPHeaders", {}).get("x-amz-bucket-region")
                if code in (*_EXPIRED, "SignatureDoesNotMatch") and not refused:
                    refused = True
                    if code in _EXPIRED:
                        forget_client()
                    continue
                if region and status in (301, 307, 400) and session.moved(split_s3(uri)[0], region):
                    continue
                if not (status >= 500 or status == 429 or code in _AGAIN) or status == 501:
                    raise
                failed: Exception = error
            except (boto.HTTPClientError, boto.IncompleteReadError) as error:
                failed = error
            failures += 1
            if failures >= (tries or session.attempts):
                raise failed
            time.sleep(min(0.1 * 2**failures, 5) * random.uniform(0.5, 1))


def call(uri: str, operation: str, **arguments: Any) -> dict[str, Any]:
    """One of boto3's operations on the bucket of `uri` (`Bucket` is filled in); boto3 retries, and we map errors."""
    bucket, _ = split_s3(uri)
    return dict(by_boto3(uri, lambda client: getattr(client, operation)(Bucket=bucket, **arguments)))


def call_pages(uri: str, operation: str, **arguments: Any) -> list[dict[str, Any]]:
    """All pages of one of boto3's listings."""
    bucket, _ = split_s3(uri)
    return by_boto3(uri, lambda client: list(client.get_paginator(operation).paginate(Bucket=bucket, **arguments)))


def by_boto3(uri: str, ask: Callable[[Any], Result]) -> Result:
    """`ask(client)` of boto3, which tries again by itself; raises our errors.

    Only an answer that it cannot read, because a byte of it was lost on the way, it does not ask for again.
    """
    from botocore.exceptions import ResponseStreamingError
    from botocore.parsers import ResponseParserError

    # what its parsers raise where a number, a date or the XML around them is none
    unreadable = (ResponseParserError, ValueError, LookupError)

    def attempt(session: _Session) -> Result:
        try:
            return ask(session.client)
        except unreadable:
            try:
                return ask(session.client)
            except unreadable as error:
                raise ResponseStreamingError(error=error) from error

    return patiently(uri, attempt, tries=1)


def checksum_headers(content: Buffer, md5: bool = False) -> dict[str, str]:
    """CRC32C, which the server checks before it stores; or MD5, on demand or where the settings ask for it."""
    if md5 or uses_md5():
        digest = hashlib.md5(content, usedforsecurity=False).digest()
        return {"Content-MD5": base64.b64encode(digest).decode()}
    return {"x-amz-checksum-crc32c": crc32c(content)}


def uses_md5() -> bool:
    """Whether the settings ask for no newer checksum (AWS_REQUEST_CHECKSUM_CALCULATION=when_required)."""
    return bool(_session().checksums == "when_required")


def crc32c(content: Buffer) -> str:
    """CRC32C as S3 writes it: base64 of four bytes, big-endian."""
    return base64.b64encode(struct.pack(">I", crc32c_of(content))).decode()


def put(uri: str, content: Buffer, conditions: Mapping[str, str] | None = None) -> str:
    """A whole object in one request; returns its tag. FileExistsError when a condition (If-None-Match: *) fails."""
    signed = hashlib.sha256(content).hexdigest()
    tries = 0

    def attempt(session: _Session) -> str:
        nonlocal tries
        tries += 1
        headers = {"X-Amz-Content-SHA256": signed, **checksum_headers(content), **(conditions or {})}
        return str(session.send("PUT", uri, {}, headers, content, False).headers.get("ETag", "")).strip('"')

    try:
        return patiently(uri, attempt)
    except FileExistsError:
        # the answer to an earlier try may have been lost after the server had stored it
        if tries > 1 and get(uri) == bytes(content):
            return ""
        raise


def put_part(uri: str, upload: str, number: int, content: Buffer, md5: bool = False) -> dict[str, Any]:
    """A part of a multipart upload (numbered from 1); returns it as the end of the upload names it."""
    checksum = checksum_headers(content, md5)

    def attempt(session: _Session) -> dict[str, Any]:
        query = {"partNumber": str(number), "uploadId": upload}
        answer = session.send("PUT", uri, query, checksum, content, False)
        return {"PartNumber": number, "ETag": answer.headers.get("ETag", "")}

    part = patiently(uri, attempt)
    if "x-amz-checksum-crc32c" in checksum:
        part["ChecksumCRC32C"] = checksum["x-amz-checksum-crc32c"]
    return part


def get(uri: str, start: int = 0) -> bytes:
    """An object from byte `start` to its end."""

    def attempt(session: _Session) -> bytes:
        with _streaming(session, uri, {"Range": f"bytes={start}-"} if start else {}) as (raw, headers):
            length = headers.get("Content-Length")
            size = int(length) if length is not None else _size(session, uri) - start
            buffer = bytearray(size)
            _fill(raw, size, lambda at: memoryview(buffer)[at:], lambda piece: None)
            return bytes(buffer)

    try:
        return patiently(uri, attempt)
    except StorageFault as error:
        if start and said(error) in ("InvalidRange", "416"):
            return b""
        raise


def size(uri: str) -> int:
    """Bytes of an object."""
    return by_boto3(uri, lambda client: _length(client, uri))


def _size(session: _Session, uri: str) -> int:
    from botocore.exceptions import ResponseStreamingError

    try:
        return _length(session.client, uri)
    except KeyError as error:
        # an answer that was garbled on the way: asked for again
        raise ResponseStreamingError(error="the answer does not say how long the object is") from error


def _length(client: Any, uri: str) -> int:
    bucket, key = split_s3(uri)
    return int(client.head_object(Bucket=bucket, Key=key)["ContentLength"])


def get_into(uri: str, start: int, length: int, buffer: memoryview, take: Take | None = None) -> None:
    """Reads `length` of the object's bytes from `start`, as storage.read_piece does; Truncated when it has not so many.

    A connection that breaks is taken up at the byte where it broke, of the same version of the object.
    """
    if not length:
        return
    done = 0
    tag: str | None = None

    def advance(piece: memoryview) -> None:
        nonlocal done
        if take:
            take(done, piece)
        done += len(piece)

    def attempt(session: _Session) -> None:
        nonlocal done, tag
        begun = done
        first, last = start + begun, start + length - 1
        headers = {"Range": f"bytes={first}-{last}"}
        if done and tag:
            headers["If-Match"] = tag
        try:
            with _streaming(session, uri, headers) as (raw, answer):
                found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", answer.get("Content-Range", ""))
                if not found:
                    # a server that knows no ranges sends the whole
                    if first or answer.get("Content-Length") != str(length):
                        raise StorageFault(f"{uri}: the server does not answer with ranges; use another S3 server")
                elif int(found[1]) != first or int(found[2]) != last:
                    there = max(0, int(found[2]) + 1 - start)
                    raise Truncated(
                        f"{uri}: {there} bytes at {start} where {length} were expected; the file is truncated"
                    )
                tag = answer.get("ETag")
                _fill(raw, length - begun, lambda at: room(buffer, length, begun + at), advance)
        except Exception as error:
            from botocore.exceptions import ClientError

            if done and isinstance(error, ClientError) and _said(error)[1] == 412:
                # another version since: from its beginning
                done, tag = 0, None
                attempt(session)
                return
            raise

    try:
        patiently(uri, attempt)
    except StorageFault as error:
        if said(error) in ("InvalidRange", "416"):
            raise Truncated(f"{uri}: 0 bytes at {start} where {length} were expected; the file is truncated") from error
        raise


@contextmanager
def _streaming(session: _Session, uri: str, headers: Mapping[str, str]) -> Iterator[tuple[Any, Any]]:
    """The body of a GET as a stream, and its headers. What was not read to its end is not used again."""
    response = session.send("GET", uri, {}, headers, b"", True)
    try:
        yield response.raw, response.headers
    except BaseException:
        response.raw.close()
        raise
    # a body that has more bytes than were asked of it leaves a connection that nobody may use
    if response.raw.read(1):
        response.raw.close()
    response.raw.release_conn()


def _fill(raw: Any, length: int, into: Callable[[int], memoryview], advance: Callable[[memoryview], None]) -> None:
    """Reads `length` bytes, each time into `into(bytes so far)`. A body that ends early is no success, whatever its
    headers said."""
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
        advance(piece[:count])
