"""A proxy before the tests' S3 server that lets some requests fail, as a server or a network does.

Hosts are passed on as they came, so that signatures stay right.
"""

import http.client
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import urlsplit

Faults = Callable[[str, str], str]
"""(method, path) → "" for none, "503" for an answer that asks to slow down, "reset" for a broken connection."""


class S3Proxy:
    """`with S3Proxy(endpoint) as proxy: … proxy.endpoint … proxy.faults = lambda method, path: "503"`."""

    def __init__(self, endpoint: str) -> None:
        target = urlsplit(endpoint).netloc
        self.faults: Faults = lambda method, path: ""
        self.seen: list[tuple[str, str, str]] = []
        """(method, path, fault) of each request."""
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fault = proxy.faults(self.command, self.path)
                proxy.seen.append((self.command, self.path, fault))
                if fault == "reset":
                    self.close_connection = True
                    self.connection.close()
                    return
                if fault:
                    self.answer(503, {}, b"<Error><Code>SlowDown</Code></Error>")
                    return
                onward = http.client.HTTPConnection(target, timeout=60)
                onward.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() != "expect":
                        onward.putheader(name, value)
                onward.endheaders(body)
                reply = onward.getresponse()
                content = b"" if self.command == "HEAD" else reply.read()
                self.answer(reply.status, dict(reply.getheaders()), content)
                onward.close()

            def answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                        self.send_header(name, value)
                length = headers.get("Content-Length") if self.command == "HEAD" else str(len(content))
                self.send_header("Content-Length", length or "0")
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = pass_on

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def count(self, method: str, text: str) -> int:
        """Requests of a method whose path held a text."""
        return sum(1 for one, path, _ in self.seen if one == method and text in path)
