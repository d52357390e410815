"""Where weights come from: a folder, S3, HTTP, the Hugging Face hub, behind a few questions.

`stat(name)`: is this file there, how large. `names(likely)`: what is there; HTTP has no listing, so there the likely
names are tried one by one. `chunks(name)`: its bytes, streamed; a broken connection goes on where it broke. `ranged`:
whether parts of it can be had, which all but simple HTTP servers give; `part(name, start, length)`: one of them.
"""

import ipaddress
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from http.client import HTTPException, HTTPMessage
from typing import IO, Any, Protocol
from urllib.parse import quote, urlsplit

from zhllama import storage
from zhllama.artifacts.hub_model import HUB_NAME, endpoint, hub_errors, hub_files, parse_address
from zhllama.errors import InputError, StorageFault
from zhllama.retries import pause_after, with_retries

CHUNK = 4 * 2**20
ATTEMPTS = 5
PAUSE, LONGEST_PAUSE = 0.5, 5.0
"""Seconds before the second attempt, and before each one after some."""
TIMEOUT = 60.0
"""Seconds without a byte."""


@dataclass(frozen=True)
class Found:
    """A file of a source. `tag` changes when the file does; `sha256` only where the source itself says it."""

    name: str
    size: int | None
    tag: str
    sha256: str | None = None


class Source(Protocol):
    @property
    def address(self) -> str: ...

    def stat(self, name: str) -> Found | None: ...
    def names(self, likely: Iterable[str]) -> list[str]: ...
    def chunks(self, name: str) -> Iterator[bytes]: ...
    def ranged(self, name: str) -> bool: ...
    def part(self, name: str, start: int, length: int) -> Iterator[bytes]: ...
    def below(self, folder: str) -> "Source": ...
    def above(self) -> "Source | None": ...


def read(source: Source, name: str) -> bytes:
    """A small file, whole."""
    return b"".join(source.chunks(name))


def open_source(address: str) -> Source:
    """InputError for an address of no known kind."""
    if address.startswith(("http://", "https://")):
        return HttpSource(address)
    if address.startswith("hf://"):
        return HubSource.parse(address)
    if re.fullmatch(HUB_NAME, address) and not os.path.isdir(address):
        return HubSource.parse(f"hf://{address}")
    return StoredSource(storage.normalise(address).removesuffix("/manifest.json"))


@dataclass(frozen=True)
class StoredSource:
    """A folder or an s3:// prefix."""

    address: str

    @cached_property
    def _listing(self) -> dict[str, storage.Stored]:
        return {item.name: item for item in storage.listing(self.address)}

    def stat(self, name: str) -> Found | None:
        if "/" not in name and "_listing" in self.__dict__:
            item = self._listing.get(name)
            return None if item is None else Found(name, item.size, item.tag)
        uri = storage.join(self.address, name)
        return Found(name, storage.size_of(uri), "") if storage.exists(uri) else None

    def names(self, likely: Iterable[str]) -> list[str]:
        return list(self._listing)

    def chunks(self, name: str) -> Iterator[bytes]:
        return storage.read_chunks(storage.join(self.address, name), CHUNK)

    def ranged(self, name: str) -> bool:
        return True

    def part(self, name: str, start: int, length: int) -> Iterator[bytes]:
        yield storage.read_bytes(storage.join(self.address, name), start, length)

    def below(self, folder: str) -> "StoredSource":
        return StoredSource(storage.join(self.address, folder))

    def above(self) -> "StoredSource | None":
        parent = self.address.rpartition("/")[0]
        return StoredSource(parent) if parent and not parent.endswith(":/") else None


class _Resume(Exception):
    """A connection that ended early."""


def _resumed(name: str, connect: Callable[[int], Iterator[bytes]], end: int | None, start: int = 0) -> Iterator[bytes]:
    """What `connect(start)` streams up to `end`, connected anew where it broke. StorageFault if it keeps breaking."""
    at, failures = start, 0
    while True:
        before = at
        try:
            for chunk in connect(at):
                at += len(chunk)
                yield chunk
            if end is not None and at < end:
                raise _Resume(f"{at - start} of {end - start} bytes came")
            return
        except (_Resume, OSError, HTTPException) as error:
            # progress made: the server is alive, so the count begins anew
            failures = 1 if at > before else failures + 1
            if failures >= ATTEMPTS:
                raise StorageFault(f"{name}: the connection broke at byte {at} ({error}); try again") from error
            time.sleep(pause_after(failures, PAUSE, LONGEST_PAUSE))


class HttpSource:
    """Files below an https:// address (http:// on this machine only)."""

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        if parts.scheme == "http" and not _loopback(parts.hostname or ""):
            raise InputError(f"--source {parts.scheme}://{parts.hostname}: weights are fetched by https:// only")
        if parts.username or parts.query or parts.fragment or not parts.hostname:
            # it would stand in the manifest
            raise InputError("--source: give the https:// address of a folder, without user, query or fragment")
        self.address = address.rstrip("/")
        self._known: dict[str, Found | None] = {}

    def _url(self, name: str) -> str:
        return f"{self.address}/{quote(name)}"

    def _open(self, url: str, method: str = "GET", start: int | None = None, end: int | None = None) -> Any:
        request = urllib.request.Request(url, method=method)
        request.add_header("User-Agent", "zhllama")
        if start is not None:
            request.add_header("Range", f"bytes={start}-" + ("" if end is None else str(end - 1)))
        return _opener().open(request, timeout=TIMEOUT)

    def stat(self, name: str) -> Found | None:
        if name not in self._known:
            self._known[name] = self._head(name)
        return self._known[name]

    def _head(self, name: str) -> Found | None:
        url = self._url(name)

        def head() -> Found | None:
            with self._open(url, "HEAD") as answer:
                length = answer.headers.get("Content-Length")
                return Found(name, int(length) if length else None, _tag(answer.headers))

        def passes(error: BaseException) -> bool:
            return isinstance(error, (OSError, HTTPException)) and (
                not isinstance(error, urllib.error.HTTPError) or error.code >= 500
            )

        try:
            return with_retries(head, passes, tries=ATTEMPTS, first=PAUSE, longest=LONGEST_PAUSE)
        except urllib.error.HTTPError as error:
            if error.code in (403, 404, 410):
                # object stores answer 403 for what is absent when listing is not allowed
                return None
            if error.code < 500:
                raise InputError(f"--source {url}: the server answers {error.code} ({error.reason})") from error
            failed: Exception = error
        except (OSError, HTTPException) as error:
            failed = error
        raise StorageFault(
            f"--source {url}: no answer after {ATTEMPTS} attempts ({failed}); check address and network"
        ) from failed

    def names(self, likely: Iterable[str]) -> list[str]:
        return [name for name in likely if self.stat(name) is not None]

    def chunks(self, name: str) -> Iterator[bytes]:
        found = self.stat(name)
        return _resumed(self._url(name), lambda at: self._stream(name, at or None, None), found.size if found else None)

    def ranged(self, name: str) -> bool:
        """Asked with a range of one byte: what a server says of itself in headers is often left out."""
        try:
            with self._open(self._url(name), start=0, end=1) as answer:
                return bool(answer.status == 206)
        except (OSError, HTTPException):
            # the stream that is tried instead says what is wrong
            return False

    def part(self, name: str, start: int, length: int) -> Iterator[bytes]:
        end = start + length
        return _resumed(self._url(name), lambda at: self._stream(name, at, end), end, start)

    def _stream(self, name: str, start: int | None, end: int | None) -> Iterator[bytes]:
        url = self._url(name)
        with self._open(url, start=start, end=end) as answer:
            if start is not None and answer.status != 206:
                raise InputError(f"--source {url}: the server knows no ranges, and the connection broke; try again")
            tag, known = _tag(answer.headers), self.stat(name)
            if known is not None and tag != known.tag:
                raise StorageFault(f"--source {url}: the file was changed while it was fetched; try again")
            while chunk := answer.read(CHUNK):
                yield chunk

    def below(self, folder: str) -> "HttpSource":
        return HttpSource(f"{self.address}/{folder}")

    def above(self) -> "HttpSource | None":
        parent = self.address.rpartition("/")[0]
        return HttpSource(parent) if urlsplit(parent).hostname else None


def _tag(headers: HTTPMessage) -> str:
    return headers.get("ETag") or headers.get("Last-Modified") or ""


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _OnlyHttps(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from https to http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        target = urlsplit(newurl)
        if target.scheme != "https" and not _loopback(target.hostname or ""):
            raise InputError(f"--source {req.full_url}: the server redirects to {target.scheme}://{target.hostname}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_OnlyHttps())


class HubSource:
    """A repository of the Hugging Face hub, or a folder in it, at one commit.

    Token and endpoint are taken from where the hub's own library takes them (HF_TOKEN, HF_ENDPOINT).
    """

    def __init__(self, repository: str, revision: str | None = None, folder: str = "") -> None:
        self.repository = repository
        self._revision = revision
        self._folder = folder

    @staticmethod
    def parse(address: str) -> "HubSource":
        """`hf://owner/name`, `hf://owner/name@revision`, `hf://owner/name/folder`."""
        found = parse_address(address)
        if found is None:
            raise InputError(f"--source {address}: no repository; write hf://owner/name or hf://owner/name@revision")
        return HubSource(*found)

    @property
    def address(self) -> str:
        folder = f"/{self._folder}" if self._folder else ""
        return f"hf://{self.repository}{folder}"

    @cached_property
    def _listing(self) -> tuple[str, dict[str, Found]]:
        """The commit, and the files of the folder."""
        commit, entries = hub_files(self.repository, self._revision, self._folder, f"--source {self.address}")
        return commit, {
            name: Found(name, entry.size, entry.blob_id or "", entry.lfs.sha256 if entry.lfs else None)
            for name, entry in entries.items()
        }

    def stat(self, name: str) -> Found | None:
        return self._listing[1].get(name)

    def names(self, likely: Iterable[str]) -> list[str]:
        return list(self._listing[1])

    @cached_property
    def _files(self) -> Any:
        """The hub's files by path. One for all threads, so that a repository is listed once."""
        from huggingface_hub import HfFileSystem

        return HfFileSystem(endpoint=endpoint(), skip_instance_cache=True)

    def _path(self, name: str) -> str:
        commit, _ = self._listing
        return f"{self.repository}@{commit}/{f'{self._folder}/' if self._folder else ''}{name}"

    def chunks(self, name: str) -> Iterator[bytes]:
        size = self._listing[1][name].size
        at = 0
        where = f"--source {self.address}/{name}"
        with hub_errors(where), self._files.open(self._path(name), "rb", block_size=0) as file:
            while chunk := file.read(CHUNK):
                at += len(chunk)
                yield chunk
        if size is not None and at != size:
            raise StorageFault(f"{self.address}/{name}: {at} of {size} bytes came; try again")

    def ranged(self, name: str) -> bool:
        return True

    def part(self, name: str, start: int, length: int) -> Iterator[bytes]:
        with hub_errors(f"--source {self.address}/{name}"):
            found: bytes = self._files.cat_file(
                self._path(name), start, start + length, block_size=length, cache_type="none"
            )
        if len(found) != length:
            raise StorageFault(f"{self.address}/{name}: {len(found)} of {length} bytes at {start} came; try again")
        yield found

    def below(self, folder: str) -> "HubSource":
        return HubSource(self.repository, self._revision, f"{self._folder}/{folder}".strip("/"))

    def above(self) -> "HubSource | None":
        if not self._folder:
            return None
        return HubSource(self.repository, self._revision, self._folder.rpartition("/")[0])
