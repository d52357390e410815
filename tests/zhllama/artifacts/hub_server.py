"""A Hugging Face Hub on loopback that serves datasets from a folder: `OWNER/NAME/files`, one commit each."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


def commit_of(folder: Path) -> str:
    """Forty hexadecimal digits that change with the content, as a Git commit does."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha1(b"".join(str(path).encode() + path.read_bytes() for path in files)).hexdigest()


class _Hub(BaseHTTPRequestHandler):
    root: Path
    seen: list[str]

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, asked: Any = None) -> None:
        path = self.path.split("?")[0]
        self.seen.append(f"{self.command} {path}")
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/(revision|tree|paths-info)/([^/]+)/?(.*)", path):
            name, what, revision, below = found.groups()
            folder = self.root / name
            if folder.is_dir() and revision in ("main", commit_of(folder)):
                return self._json(getattr(self, f"_{what.replace('-', '_')}")(folder, name, below, asked))
            return self._missing("RevisionNotFound" if folder.is_dir() else "RepoNotFound")
        if found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            file = self.root / found[1] / found[3]
            return (
                self._file(file, commit_of(self.root / found[1])) if file.is_file() else self._missing("EntryNotFound")
            )
        return self._missing("")

    def _revision(self, folder: Path, name: str, *_: Any) -> Any:
        siblings = [{"rfilename": entry["path"]} for entry in self._tree(folder)]
        return {"id": name, "sha": commit_of(folder), "siblings": siblings, "private": False, "tags": []}

    def _tree(self, folder: Path, *_: Any) -> Any:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return [
            {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": "0" * 40}
            for path in files
        ]

    def _paths_info(self, folder: Path, name: str, below: str, asked: Any) -> Any:
        return [entry for entry in self._tree(folder) if entry["path"] in asked["paths"]]

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str) -> None:
        self._send(404, b"", {"X-Error-Code": code} if code else {})

    def _file(self, path: Path, commit: str) -> None:
        content = path.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
        }
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            return self._send(206, content[start : end + 1], headers)
        return self._send(200, content, headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def hub_server(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Its address (for HF_ENDPOINT), and the requests it has seen."""
    handler = type("Hub", (_Hub,), {"root": root, "seen": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", handler.seen
        finally:
            server.shutdown()
            thread.join()
