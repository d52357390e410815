"""Servers to fetch from: a plain HTTP one that can break connections, and one that speaks the hub's API."""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


class FolderServer(ThreadingHTTPServer):
    """Files of a folder over HTTP, with HEAD and ranges, which counts the bytes it sends.

    break_after: path → bytes after which the next answer ends. ranged False: it knows no ranges. hold_after: when that
    many bytes have gone out altogether, every answer waits (`held` is set) until `go_on` is; with `drops` it then ends.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _FolderHandler)
        self.folder = folder
        self.break_after: dict[str, int] = {}
        self.ranged = True
        self.asked: list[tuple[str, str, str | None]] = []
        self.sent: Counter[str] = Counter()
        self.hold_after: int | None = None
        self.drops = False
        self.held, self.go_on = threading.Event(), threading.Event()
        self._lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def may_send(self, path: str, count: int) -> None:
        if count == 1:
            # asked only to learn whether there are ranges
            return
        with self._lock:
            holds = self.hold_after is not None and self.sent.total() + count > self.hold_after
            if not holds:
                self.sent[path] += count
        if holds:
            self.held.set()
            self.go_on.wait()
            if self.drops:
                raise ConnectionAbortedError
            with self._lock:
                self.sent[path] += count


class _FolderHandler(BaseHTTPRequestHandler):
    server: FolderServer

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        wanted = self.headers.get("Range") if self.server.ranged else None
        self.server.asked.append((self.command, self.path, self.headers.get("Range")))
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        first, _, last = wanted.removeprefix("bytes=").partition("-") if wanted else ("0", "", "")
        start, end = int(first), int(last) + 1 if last else len(content)
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(end - start))
        self.send_header("ETag", f"{path.stat().st_mtime_ns}-{len(content)}")
        self.end_headers()
        if body:
            end = min(end, start + self.server.break_after.pop(self.path, len(content)))
            for at in range(start, end, 65536):
                piece = content[at : min(end, at + 65536)]
                self.server.may_send(self.path, len(piece))
                self.wfile.write(piece)

    def handle(self) -> None:
        # a client that was killed is no error of this server
        with suppress(ConnectionError):
            super().handle()

    def log_message(self, format: str, *args: object) -> None:
        pass


class _HubHandler(_FolderHandler):
    """The calls of the hub that a fetch makes: a repository's files, and a file at a commit."""

    COMMIT = "c" * 40

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._repository("/".join(parts[2:4]))
            return
        # owner/name/resolve/<commit>/file
        if parts[2:4] != ["resolve", self.COMMIT]:
            self.send_error(404)
            return
        self.path = "/" + "/".join([*parts[:2], *parts[4:]])
        super()._answer(body)

    def _repository(self, name: str) -> None:
        folder = self.server.folder / name
        if not folder.is_dir():
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        siblings = []
        for path in sorted(folder.iterdir()):
            content = path.read_bytes()
            git = hashlib.sha1(content).hexdigest()
            sibling = {"rfilename": path.name, "size": len(content), "blobId": git}
            if path.suffix in (".safetensors", ".bin", ".model"):
                # what the hub recorded at upload; one repository was tampered with since
                told = hashlib.sha256(b"another" if "told" in name else content).hexdigest()
                sibling["lfs"] = {"sha256": told, "size": len(content), "pointerSize": 100}
            siblings.append(sibling)
        info = {"id": name, "modelId": name, "sha": self.COMMIT, "siblings": siblings}
        answer = json.dumps(info).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


def _serving(server: FolderServer) -> Iterator[FolderServer]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.go_on.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def http(tmp_path: Path) -> Iterator[FolderServer]:
    """An HTTP server for `tmp_path / "served"`."""
    yield from _serving(FolderServer(tmp_path / "served"))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FolderServer]:
    """A hub whose repositories are the folders `tmp_path / "hub" / owner / name`."""
    server = FolderServer(tmp_path / "hub")
    server.RequestHandlerClass = _HubHandler
    yield from _serving(server)


@pytest.fixture
def write_sums() -> Callable[[Path], Path]:
    """`write_sums(folder)` writes its sha256sums.txt anew and returns the path."""

    def write(folder: Path) -> Path:
        path = folder / "sha256sums.txt"
        files = sorted(file for file in folder.iterdir() if file != path)
        path.write_text("".join(f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in files))
        return path

    return write
