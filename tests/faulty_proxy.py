"""An HTTP proxy before an S3 server that breaks what it is told to break, and counts what passes.

Requests and answers are read whole and passed on unchanged (signatures stay right); `fault` is asked for each request
and says what happens to it. Its own code, so that every fault can be placed to the byte.
"""

import http.client
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Request:
    """A request of the client: its target is path and query, header names are in lower case."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def kind(self) -> str:
        """`get`, `head`, `list`, `put`, `part`, `create`, `complete`, `abort`, `parts`, `uploads`, `delete`."""
        query = urlsplit(self.target).query
        names = {word.partition("=")[0] for word in query.split("&")}
        if self.method == "GET":
            found = {"list-type": "list", "uploads": "uploads", "uploadId": "parts"}
            return next((kind for name, kind in found.items() if name in names), "get")
        if self.method == "PUT":
            return "part" if "partNumber" in names else "put"
        if self.method == "POST":
            return {"uploads": "create", "uploadId": "complete"}.get(next(iter(names)), "post")
        if self.method == "DELETE":
            return "abort" if "uploadId" in names else "delete"
        return self.method.lower()


@dataclass(frozen=True)
class Fault:
    """What happens to a request. `at` is where, as a share (0 to 1) of the bytes of the body or the answer.

    status: answered by the proxy with `status` and S3's `code`. reset: nothing reaches the server, the connection is
    reset. lost: the server does its work, its answer is lost. reset answer, stall, truncate, corrupt answer: the answer
    is reset, stops, ends early without a Content-Length, has a flipped byte. corrupt request: the body has one.
    """

    kind: str
    at: float = 0.5
    status: int = 500
    code: str = "InternalError"
    message: str = "no"
    header: str = ""
    """Another header of the proxy's own answer."""


class FaultyProxy:
    """`with FaultyProxy(endpoint) as proxy: … proxy.endpoint`. `proxy.fault` is a function Request → Fault | None."""

    def __init__(self, upstream: str, tls: ssl.SSLContext | None = None) -> None:
        self.upstream = upstream
        self._tls = tls
        self.fault: Callable[[Request], Fault | None] = lambda request: None
        self.requests: list[Request] = []
        """All requests seen, bodies left out."""
        self.bytes_down = 0
        """Bytes of answers' bodies that were sent to clients."""
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.endpoint = f"{'https' if tls else 'http'}://127.0.0.1:{self._listener.getsockname()[1]}"

    def kinds(self) -> list[str]:
        return [request.kind for request in self.requests]

    def count(self, method: str, text: str) -> int:
        """Requests of a method whose target held a text."""
        return sum(request.method == method and text in request.target for request in self.requests)

    def forget(self) -> None:
        with self._lock:
            self.requests, self.bytes_down = [], 0

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._released.set()
        # a thread that waits in accept() is not woken by close(), but by this
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server: socket.socket | None = None
        try:
            if self._tls is not None:
                client = self._tls.wrap_socket(client, server_side=True)
            with client.makefile("rb") as stream:
                while (given := _read_request(stream)) is not None:
                    head, request = given
                    with self._lock:
                        self.requests.append(Request(request.method, request.target, request.headers, b""))
                    fault = self.fault(request)
                    if fault is not None and fault.kind == "reset":
                        return _reset(client)
                    if fault is not None and fault.kind == "status":
                        client.sendall(_refusal(request, fault))
                        continue
                    body = request.body
                    if fault is not None and fault.kind == "corrupt request" and body:
                        body = _flipped(body, fault.at)
                    if server is None:
                        address = urlsplit(self.upstream)
                        server = socket.create_connection((address.hostname, address.port), timeout=60)
                    server.sendall(head)
                    server.sendall(body)
                    if not self._answer(client, server, request, fault):
                        return None
        except (OSError, http.client.HTTPException):
            # the server is gone, or the client is: the other one sees the same
            _reset(client)
        finally:
            client.close()
            if server is not None:
                server.close()
        return None

    def _answer(self, client: socket.socket, server: socket.socket, request: Request, fault: Fault | None) -> bool:
        """Passes the server's answer on; False when the connection ends with it."""
        answer = http.client.HTTPResponse(server, method=request.method)
        answer.begin()
        body = answer.read()
        kind = fault.kind if fault is not None else ""
        at = int((fault.at if fault is not None else 0) * len(body))
        if kind == "lost":
            _reset(client)
            return False
        if kind == "corrupt answer" and body:
            body = _flipped(body, fault.at if fault else 0)
        lines = [f"HTTP/1.1 {answer.status} {answer.reason}"]
        lines += [
            f"{name}: {value}"
            for name, value in answer.getheaders()
            if name.lower() not in ("transfer-encoding", "content-length", "connection")
        ]
        length = answer.getheader("Content-Length") if request.method == "HEAD" else str(len(body))
        lines += ["Connection: close"] if kind == "truncate" else [f"Content-Length: {length or 0}"]
        client.sendall(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
        if kind in ("reset answer", "stall", "truncate"):
            self._send(client, body[:at])
            if kind == "stall":
                self._released.wait()
            if kind != "truncate":
                _reset(client)
            return False
        self._send(client, body)
        return True

    def _send(self, client: socket.socket, body: bytes) -> None:
        client.sendall(body)
        with self._lock:
            self.bytes_down += len(body)


def _read_request(stream: "socket.SocketIO | object") -> tuple[bytes, Request] | None:
    lines = []
    while True:
        line = stream.readline()  # type: ignore[attr-defined]
        if not line:
            return None
        lines.append(line)
        if line == b"\r\n":
            break
    method, target, _ = lines[0].decode("latin-1").split(" ")
    headers = {}
    for line in lines[1:-1]:
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    length = int(headers.get("content-length", 0))
    body = stream.read(length)  # type: ignore[attr-defined]
    if len(body) < length:
        return None
    return b"".join(lines), Request(method, target, headers, body)


def _refusal(request: Request, fault: Fault) -> bytes:
    body = (
        b""
        if request.method == "HEAD"
        else f"<Error><Code>{fault.code}</Code><Message>{fault.message}</Message></Error>".encode()
    )
    more = f"{fault.header}\r\n" if fault.header else ""
    return f"HTTP/1.1 {fault.status} No\r\n{more}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _flipped(body: bytes, at: float) -> bytes:
    index = min(len(body) - 1, int(at * len(body)))
    return body[:index] + bytes([body[index] ^ 0x10]) + body[index + 1 :]


def _reset(client: socket.socket) -> None:
    """Ends a connection so that the other side sees ECONNRESET."""
    try:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    except OSError:
        return
