"""Bytes in S3 (`s3://bucket/prefix`) or in folders (`/path`, `file:///path`), behind one small interface.

boto3 underneath with its standard settings (profile, region, AWS_ENDPOINT_URL_S3, CA bundle, web identity).
ZHLLAMA_S3_ENDPOINT wins over them: KFP pods share their environment with KFP's own S3 client, so our endpoint must not
be called AWS_ENDPOINT_URL there. Retries are botocore's `standard` mode. Memory: a streaming upload holds one part
(16 MiB) at a time; a read holds what was asked for.

Errors: what a user can mend (credentials, bucket, endpoint) is an InputError, a server that keeps failing a
StorageFault, a missing object FileNotFoundError.
"""

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from components.shared.errors import InputError, StorageFault

PART = 16 * 2**20
"""Bytes per part of a multipart upload. S3 allows 10,000 parts, so one object may hold 160 GB."""


@dataclass(frozen=True)
class Stored:
    """A file in a listing: name relative to the listed prefix, bytes, and the server's tag (ETag, or mtime)."""

    name: str
    size: int
    tag: str


class Writer(Protocol):
    """A stream that becomes visible at commit() and leaves nothing behind after abort()."""

    def write(self, data: bytes | memoryview) -> int: ...
    def commit(self) -> None: ...
    def abort(self) -> None: ...


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def normalise(uri: str) -> str:
    """`s3://bucket/a/b` without a trailing slash, or an absolute path. InputError for other schemes."""
    if is_s3(uri):
        bucket = uri[5:].split("/", 1)[0]
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket):
            raise InputError(f"{uri}: not a bucket name; write s3://bucket/prefix")
        return uri.rstrip("/")
    if uri.startswith("file://"):
        uri = uri[len("file://") :]
    elif "://" in uri:
        raise InputError(f"{uri}: unknown kind of address; use s3://bucket/prefix or a path")
    if not uri:
        raise InputError("an empty address was given; use s3://bucket/prefix or a path")
    return os.path.abspath(os.path.expanduser(uri))


def join(uri: str, name: str) -> str:
    """`uri/name`; a name that would leave the prefix is refused (manifests and listings are not trusted)."""
    parts = name.split("/")
    if name.startswith("/") or "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise InputError(f"{uri}: the file name {name!r} leads out of its folder; the manifest or listing is corrupt")
    return f"{uri.rstrip('/')}/{name}"


def split_s3(uri: str) -> tuple[str, str]:
    bucket, _, key = uri[5:].partition("/")
    return bucket, key


@lru_cache(maxsize=4)
def _client_for(endpoint: str | None, process: int) -> Any:
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "total_max_attempts": 5},
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=32,
        s3={"addressing_style": "path"} if endpoint else {},
    )
    try:
        # a session of its own: boto3's default one is shared by threads and keeps the first credentials it found
        return boto3.session.Session().client("s3", endpoint_url=endpoint, config=config)
    except ValueError as error:
        raise InputError(f"ZHLLAMA_S3_ENDPOINT={endpoint}: {error}; write http://host:port or https://host") from error


def s3_client() -> Any:
    """boto3's S3 client for this process (a forked child gets its own). A test may clear it with `forget_client`."""
    with _mapped("s3"):
        return _client_for(os.environ.get("ZHLLAMA_S3_ENDPOINT") or None, os.getpid())


def forget_client() -> None:
    _client_for.cache_clear()


_CREDENTIALS = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "ExpiredToken", "InvalidToken")
_REGION = ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException")


@contextmanager
def _mapped(uri: str) -> Iterator[None]:
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
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code in ("NoSuchKey", "404", "NotFound"):
            raise FileNotFoundError(uri) from error
        if code == "NoSuchBucket":
            bucket, _ = split_s3(uri)
            raise InputError(f"{uri}: there is no bucket {bucket}; create it, or correct the address") from error
        if code in _REGION:
            raise InputError(
                f"{uri}: S3 says the bucket is in another region ({code}); set AWS_DEFAULT_REGION"
            ) from error
        if code in _CREDENTIALS or status in (401, 403):
            raise InputError(
                f"{uri}: S3 refuses these credentials ({code}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the "
                "rights of this account on the bucket"
            ) from error
        raise StorageFault(f"{uri}: S3 answered {code or status} ({error}); try again") from error
    except (boto.EndpointConnectionError, boto.ConnectTimeoutError) as error:
        raise StorageFault(f"{uri}: no S3 server answers at {endpoint}; check the endpoint and the network") from error
    except (boto.HTTPClientError, boto.IncompleteReadError, boto.ResponseStreamingError) as error:
        raise StorageFault(f"{uri}: the connection to S3 failed ({error}); try again") from error
    except boto.BotoCoreError as error:
        raise InputError(f"{uri}: S3 settings are wrong ({error}); check the endpoint, region and profile") from error


def check_writable(uri: str) -> None:
    """Writes and deletes a small object under `uri`; InputError when that fails. The first thing a stage does."""
    probe = join(normalise(uri), f".probe-{uuid.uuid4().hex}")
    try:
        if is_s3(uri):
            _check_bucket(uri)
        write_bytes(probe, b"")
        delete(probe)
    except StorageFault as error:
        raise InputError(str(error)) from error
    except OSError as error:
        raise InputError(f"{uri}: cannot write there ({error.strerror}); choose another --store") from error


def _check_bucket(uri: str) -> None:
    """InputError when the bucket is absent: some servers would make it at the first write."""
    bucket, _ = split_s3(uri)
    try:
        with _mapped(uri):
            s3_client().head_bucket(Bucket=bucket)
    except FileNotFoundError as error:
        raise InputError(f"{uri}: there is no bucket {bucket}; create it, or correct the address") from error
    except InputError:
        # an account may write below a prefix without any right on the bucket; the write will tell
        return


def size_of(uri: str) -> int:
    """Bytes of one file; FileNotFoundError when it is absent."""
    if not is_s3(uri):
        return os.stat(uri).st_size
    bucket, key = split_s3(uri)
    with _mapped(uri):
        return int(s3_client().head_object(Bucket=bucket, Key=key)["ContentLength"])


def exists(uri: str) -> bool:
    try:
        size_of(uri)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def read_bytes(uri: str, start: int = 0, length: int | None = None) -> bytes:
    """The file, or `length` bytes from `start`. Short reads are errors (StorageFault)."""
    if not is_s3(uri):
        with open(uri, "rb") as file:
            file.seek(start)
            content = file.read() if length is None else file.read(length)
    else:
        if length == 0:
            return b""
        bucket, key = split_s3(uri)
        wanted: dict[str, str] = {}
        if start or length is not None:
            wanted["Range"] = f"bytes={start}-" + ("" if length is None else str(start + length - 1))
        content = _read_object(uri, bucket, key, wanted)
    if length is not None and len(content) != length:
        raise StorageFault(
            f"{uri}: {len(content)} bytes at {start} where {length} were expected; the file is truncated"
        )
    return content


def _read_object(uri: str, bucket: str, key: str, wanted: dict[str, str]) -> bytes:
    # botocore retries the request, not the reading of its body: a connection lost half-way is ours to retry
    from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_random_exponential

    @retry(
        retry=retry_if_exception_type(StorageFault),
        stop=stop_after_attempt(4),
        wait=wait_random_exponential(multiplier=0.2, max=5),
        reraise=True,
    )
    def attempt() -> bytes:
        with _mapped(uri):
            return bytes(s3_client().get_object(Bucket=bucket, Key=key, **wanted)["Body"].read())

    return attempt()


def write_bytes(uri: str, content: bytes, if_absent: bool = False) -> None:
    """Writes a whole file at once. With `if_absent`, FileExistsError when it is already there."""
    if is_s3(uri):
        bucket, key = split_s3(uri)
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        try:
            with _mapped(uri):
                s3_client().put_object(Bucket=bucket, Key=key, Body=content, **condition)
        except StorageFault as error:
            if if_absent and "PreconditionFailed" in str(error):
                raise FileExistsError(uri) from error
            raise
        return
    target = Path(uri)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(uri)
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


def _beside(path: str) -> Path:
    """A hidden name of its own in the same folder: listings leave it out, and a rename puts it into place."""
    target = Path(path)
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")


def open_writer(uri: str) -> Writer:
    """A stream into `uri`: a multipart upload, or a temporary file beside it that commit() moves into place."""
    return _S3Writer(uri) if is_s3(uri) else _FileWriter(uri)


class _FileWriter:
    def __init__(self, uri: str) -> None:
        self._target = Path(uri)
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = _beside(uri)
        self._file: BinaryIO = open(self._temporary, "wb")

    def write(self, data: bytes | memoryview) -> int:
        return self._file.write(data)

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


class _S3Writer:
    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._bucket, self._key = split_s3(uri)
        self._buffer = bytearray()
        self._upload: str | None = None
        self._parts: list[dict[str, Any]] = []

    def write(self, data: bytes | memoryview) -> int:
        self._buffer += data
        while len(self._buffer) >= PART:
            self._send(bytes(self._buffer[:PART]))
            del self._buffer[:PART]
        return len(data)

    def _send(self, part: bytes) -> None:
        with _mapped(self._uri):
            client = s3_client()
            if self._upload is None:
                self._upload = client.create_multipart_upload(Bucket=self._bucket, Key=self._key)["UploadId"]
            number = len(self._parts) + 1
            answer = client.upload_part(
                Bucket=self._bucket, Key=self._key, UploadId=self._upload, PartNumber=number, Body=part
            )
            self._parts.append({"PartNumber": number, "ETag": answer["ETag"]})

    def commit(self) -> None:
        if self._upload is None:
            write_bytes(self._uri, bytes(self._buffer))
            return
        if self._buffer:
            self._send(bytes(self._buffer))
        with _mapped(self._uri):
            s3_client().complete_multipart_upload(
                Bucket=self._bucket, Key=self._key, UploadId=self._upload, MultipartUpload={"Parts": self._parts}
            )

    def abort(self) -> None:
        if self._upload is not None:
            with _mapped(self._uri):
                s3_client().abort_multipart_upload(Bucket=self._bucket, Key=self._key, UploadId=self._upload)


def copy(source: str, target: str) -> None:
    """One file to another place: server-side within S3, else through a stream."""
    if is_s3(source) and is_s3(target):
        bucket, key = split_s3(source)
        target_bucket, target_key = split_s3(target)
        with _mapped(source):
            # the managed copy goes to multipart above 5 GB, which a plain copy_object refuses
            s3_client().copy({"Bucket": bucket, "Key": key}, target_bucket, target_key)
        return
    if not is_s3(source) and not is_s3(target):
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(target)
        try:
            shutil.copyfile(source, temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        return
    writer = open_writer(target)
    try:
        for chunk in read_chunks(source):
            writer.write(chunk)
        writer.commit()
    except BaseException:
        writer.abort()
        raise


def read_chunks(uri: str, chunk: int = 8 * 2**20) -> Iterator[bytes]:
    """The file from its beginning, `chunk` bytes at a time."""
    size = size_of(uri)
    for start in range(0, size, chunk):
        yield read_bytes(uri, start, min(chunk, size - start))


def listing(uri: str) -> list[Stored]:
    """Every file below a folder or prefix, sorted by name; hidden files (a leading dot) are left out."""
    found: list[Stored] = []
    if is_s3(uri):
        found = [item for item in _objects(uri) if not item.name.endswith("/")]
    else:
        root = Path(uri)
        for path in root.rglob("*"):
            if path.is_file():
                status = path.stat()
                found.append(Stored(path.relative_to(root).as_posix(), status.st_size, str(status.st_mtime_ns)))
    return sorted((f for f in found if not any(p.startswith(".") for p in f.name.split("/"))), key=lambda f: f.name)


def _objects(uri: str) -> list[Stored]:
    """Every object below a prefix, page by page; keys that end in a slash are consoles' folder marks."""
    bucket, key = split_s3(uri)
    prefix = f"{key}/" if key else ""
    with _mapped(uri):
        pages = s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [
            Stored(item["Key"][len(prefix) :], int(item["Size"]), item["ETag"].strip('"'))
            for page in pages
            for item in page.get("Contents", [])
            if item["Key"] != prefix
        ]


def delete(uri: str) -> None:
    """Deletes one file; absent is fine."""
    if is_s3(uri):
        bucket, key = split_s3(uri)
        with _mapped(uri):
            s3_client().delete_object(Bucket=bucket, Key=key)
    else:
        Path(uri).unlink(missing_ok=True)


def delete_all(uri: str) -> None:
    """Deletes everything below a folder or prefix, hidden files too."""
    if is_s3(uri):
        for item in _objects(uri):
            delete(f"{uri}/{item.name}")
    else:
        shutil.rmtree(uri, ignore_errors=True)
