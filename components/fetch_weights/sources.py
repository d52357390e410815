"""Where weights come from: a folder, S3, HTTP, the Hugging Face hub, behind a few questions.

`stat(name)`: is this file there, how large. `names(likely)`: what is there (HTTP has no listing: the likely names are
tried). `chunks(name)`: its bytes; a broken connection goes on where it broke. `ranged(name)`: whether a part of it can
be had (`chunks(name, start, length)`), which simple HTTP servers do not give.
"""

import ipaddress
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from http.client import HTTPException, HTTPMessage
from typing import IO, Any, Protocol
from urllib.parse import quote, urlsplit

from zhllama import storage
from zhllama.artifacts.blocks import Source as Blocks
from zhllama.artifacts.hub_model import HUB_NAME, hub_files, hub_source, parse_address
from zhllama.artifacts.in_memory import read_by
from zhllama.artifacts.json_file import LARGEST
from zhllama.artifacts.reader import Artifact
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
    address: str

    def stat(self, name: str) -> Found | None: ...
    def names(self, likely: Iterable[str]) -> list[str]: ...
    def chunks(self, name: str, start: int = 0, length: int | None = None) -> Iterator[bytes]: ...

    def ranged(self, name: str) -> bool:
        return True

    def below(self, folder: str) -> "Source":
        return open_source(f"{self.address}/{folder}")

    def above(self) -> "Source | None":
        parent = self.address.rpartition("/")[0]
        return open_source(parent) if parent and not parent.endswith(":/") else None


def read(source: Source, name: str) -> bytes:
    """A small file, whole. InputError for one that is none, or does not end."""
    content, known = bytearray(), source.stat(name)
    large = known is not None and (known.size or 0) > LARGEST
    for chunk in () if large else source.chunks(name):
        content += chunk
        if large := len(content) > LARGEST:
            break
    if large:
        raise InputError(f"--source {source.address}/{name}: over {LARGEST:,} bytes; fetch another copy")
    return bytes(content)


def files_of(source: Source, found: Iterable[Found]) -> Artifact:
    """Files of a source as an artifact, of which ranges can be read before it is fetched. Where the server has none,
    what lies before is read too."""
    sizes = {one.name: one.size for one in found}
    if unsaid := [name for name, size in sizes.items() if size is None]:
        said = "the server does not say how long it is; download it, and give the file"
        raise InputError(f"--source {source.address}/{unsaid[0]}: {said}")

    def read(name: str, start: int, length: int) -> bytes:
        if source.ranged(name):
            return b"".join(source.chunks(name, start, length))
        content = bytearray()
        for chunk in source.chunks(name):
            content += chunk
            if len(content) >= start + length:
                break
        return bytes(content[start : start + length])

    return read_by(read, {name: size or 0 for name, size in sizes.items()}, source.address)


def open_source(address: str) -> Source:
    """InputError for an address of no known kind."""
    if address.startswith(("http://", "https://")):
        return HttpSource(address)
    if re.fullmatch(HUB_NAME, address) and not os.path.isdir(address):
        address = f"hf://{address}"
    if not address.startswith("hf://"):
        return StoredSource(storage.normalise(address).removesuffix("/manifest.json"))
    if (found := parse_address(address)) is None:
        raise InputError(f"--source {address}: no repository; write hf://owner/name or hf://owner/name@revision")
    return HubSource(*found)


class StoredSource(Source):
    """A folder or an s3:// prefix."""

    def __init__(self, address: str) -> None:
        self.address = address

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

    def chunks(self, name: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        """At once, as the hub's: what is larger than a part is asked for by parts."""
        yield storage.read_bytes(storage.join(self.address, name), start, length)


class HttpSource(Source):
    """Files below an https:// address (http:// on this machine only). `query` goes with every request and is never
    shown: it may be a signature."""

    def __init__(self, address: str, query: str = "", option: str = "--source") -> None:
        parts = urlsplit(address)
        if parts.scheme == "http" and not _loopback(parts.hostname or ""):
            raise InputError(f"{option} {parts.scheme}://{parts.hostname}: weights are fetched by https:// only")
        if parts.username or parts.query or parts.fragment or not parts.hostname:  # it would stand in the manifest
            raise InputError(f"{option}: give the https:// address of a folder, without user, query or fragment")
        self.address = address.rstrip("/")
        self._query, self._option = query and f"?{query}", option
        self._known: dict[str, Found | None] = {}

    def _url(self, name: str) -> str:
        return f"{self.address}/{quote(name)}"

    def _open(self, url: str, method: str = "GET", span: str = "") -> Any:
        headers = {"User-Agent": "zhllama"} | ({"Range": f"bytes={span}"} if span else {})
        request = urllib.request.Request(f"{url}{self._query}", headers=headers, method=method)
        return urllib.request.build_opener(_OnlyHttps()).open(request, timeout=TIMEOUT)

    def stat(self, name: str) -> Found | None:
        if self._query:
            # what is signed for GET is refused to HEAD
            return None
        if name in self._known:
            return self._known[name]
        url, passes = self._url(name), (OSError, HTTPException)

        def head() -> Found | None:
            try:
                with self._open(url, "HEAD") as answer:
                    length = answer.headers.get("Content-Length")
                    return Found(name, int(length) if length else None, _tag(answer.headers))
            except urllib.error.HTTPError as error:
                if error.code in (403, 404, 410):
                    # object stores answer 403 for what is absent when listing is not allowed
                    return None
                if error.code < 500:
                    raise self._refused(url, error) from error
                raise

        try:
            retried = with_retries(
                head, lambda error: isinstance(error, passes), tries=ATTEMPTS, first=PAUSE, longest=LONGEST_PAUSE
            )
        except passes as error:
            raise StorageFault(
                f"{self._option} {url}: no answer after {ATTEMPTS} attempts ({error}); check address and network"
            ) from error
        return self._known.setdefault(name, retried)

    def _refused(self, url: str, error: urllib.error.HTTPError) -> InputError:
        mend = "; a signed address may be over: make a new one" if self._query else ""
        return InputError(f"{self._option} {url}: the server answers {error.code} ({error.reason}){mend}")

    def names(self, likely: Iterable[str]) -> list[str]:
        return [name for name in likely if self.stat(name) is not None]

    def chunks(self, name: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        """Connected anew where it broke. StorageFault if it keeps breaking."""
        url, known = self._url(name), self.stat(name)
        size = known.size if length is None and known else length
        at, failures, last = start, 0, "" if length is None else start + length - 1
        while True:
            before = at
            try:
                # the whole is asked for without a range: not every server knows them
                span = f"{at}-{last}" if at or length is not None else ""
                with self._open(url, span=span) as answer:
                    if span and answer.status != 206:
                        raise InputError(
                            f"{self._option} {url}: the server knows no ranges, and the connection broke; try again"
                        )
                    if known and _tag(answer.headers) != known.tag:
                        what = f"{self._option} {url}: the file was changed"
                        raise StorageFault(f"{what} while it was fetched; try again")
                    while chunk := answer.read(CHUNK):
                        at += len(chunk)
                        yield chunk
                if size is None or at - start >= size:
                    return
                raise HTTPException(f"{at - start} of {size} bytes came")
            except (OSError, HTTPException) as error:
                if isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code not in (408, 425, 429):
                    raise self._refused(url, error) from error
                # progress made: the server is alive, so the count begins anew
                failures = 1 if at > before else failures + 1
                if failures >= ATTEMPTS:
                    raise StorageFault(f"{url}: the connection broke at byte {at} ({error}); try again") from error
                time.sleep(pause_after(failures, PAUSE, LONGEST_PAUSE))

    def ranged(self, name: str) -> bool:
        """Asked with a range of one byte: what a server says of itself in headers is often left out."""
        try:
            with self._open(self._url(name), span="0-0") as answer:
                return bool(answer.status == 206)
        except (OSError, HTTPException):
            # the stream that is tried instead says what is wrong
            return False


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
            asked = req.full_url.partition("?")[0]
            raise InputError(f"{asked}: the server redirects to {target.scheme}://{target.hostname}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class HubSource(Source):
    """A repository of the Hugging Face hub, or a folder in it, at one commit; token and endpoint are the library's."""

    def __init__(self, repository: str, revision: str | None, folder: str) -> None:
        self.repository, self._revision, self._folder = repository, revision, folder
        self.address = f"hf://{repository}/{folder}".rstrip("/")

    @cached_property
    def _listing(self) -> tuple[Blocks, dict[str, Found]]:
        where = f"--source {self.address}"
        commit, entries = hub_files(self.repository, self._revision, self._folder, where)
        files = hub_source(where, self.repository, commit, f"{self._folder}/" if self._folder else "")
        return files, {
            name: Found(name, entry.size, entry.blob_id or "", entry.lfs.sha256 if entry.lfs else None)
            for name, entry in entries.items()
            if entry.size is not None
        }

    def stat(self, name: str) -> Found | None:
        return self._listing[1].get(name)

    def names(self, likely: Iterable[str]) -> list[str]:
        return list(self._listing[1])

    def chunks(self, name: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        content = bytearray(self._listing[1][name].size or 0 if length is None else length)
        self._listing[0](name, start, len(content), memoryview(content), None)
        yield bytes(content)

    def below(self, folder: str) -> Source:
        return HubSource(self.repository, self._revision, f"{self._folder}/{folder}".strip("/"))

    def above(self) -> Source | None:
        parent = self._folder.rpartition("/")[0]
        return HubSource(self.repository, self._revision, parent) if self._folder else None
