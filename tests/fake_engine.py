"""A small OpenAI-compatible server with vLLM's paths, over real HTTP: it answers, or misbehaves as a test wants.

`with FakeEngine(encoder) as engine:` listens at `engine.address`. `engine.faults["/v1/chat/completions"] = fault` puts
a fault (a function of the handler) in front of a path; `engine.seen` holds what was asked.
"""

import json
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from zhllama.tokenizer.chat import Chat
from zhllama.tokenizer.vocabulary import Encoder


class FakeEngine:
    def __init__(self, encoder: Encoder, name: str = "zhllama", api_key: str = "") -> None:
        self.encoder = encoder
        self.name = name
        self.api_key = api_key
        self.answer = "好的。"
        self.pieces = ["好", "的", "。"]
        self.faults: dict[str, Callable[[Any], None]] = {}
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.connections: list[socket.socket] = []
        self.released = threading.Event()
        """For faults that wait until the test has seen enough."""
        engine = self

        class Handler(_Handler):
            of = engine

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FakeEngine":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, *given: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(*given)


class _Handler(BaseHTTPRequestHandler):
    of: FakeEngine
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.of.connections.append(self.connection)

    def log_message(self, *_: Any) -> None:
        pass

    def _do(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.loads(content or "{}")
        self.of.seen.append((self.path, body))
        if fault := self.of.faults.get(self.path):
            fault(self)
        elif self.path in ("/health", "/metrics"):
            self.raw(200, b"fake_engine_metric 1\n", "text/plain")
        elif self.of.api_key and self.headers.get("Authorization") != f"Bearer {self.of.api_key}":
            self.json(401, {"error": "Unauthorized"})
        elif self.path == "/tokenize":
            self.json(200, self._tokenized(body))
        elif self.path.startswith("/v1/"):
            self._api(body)
        else:
            self.json(404, {"detail": "Not Found"})

    do_GET = do_POST = _do

    def _tokenized(self, body: dict[str, Any]) -> dict[str, Any]:
        encoder = self.of.encoder
        if "messages" in body:
            ids = Chat(encoder).ids(body["messages"])
        else:
            ids = [encoder.bos, *encoder.encode(body["prompt"])]
        return {"tokens": ids, "count": len(ids), "max_model_len": 2048}

    def _api(self, body: dict[str, Any]) -> None:
        if self.path == "/v1/models":
            self.json(200, {"object": "list", "data": [{"id": self.of.name, "max_model_len": 2048}]})
        elif body.get("stream"):
            self.stream(
                [self.chunk(piece) for piece in self.of.pieces] + [self.chunk("", usage={"completion_tokens": 3})]
            )
        else:
            choice = {"index": 0, "message": {"role": "assistant", "content": self.of.answer}, "text": self.of.answer}
            self.json(200, {"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 3}})

    def chunk(self, text: str, **more: Any) -> bytes:
        value = {"choices": [{"index": 0, "delta": {"content": text}}], **more}
        return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()

    def stream(self, events: list[bytes], whole: bool = True) -> None:
        """The events as a chunked body; not `whole`: the connection ends before the body does."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in events:
            self.wfile.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")
            self.wfile.flush()
        if whole:
            self.wfile.write(b"0\r\n\r\n")
        else:
            self.close_connection = True

    def json(self, status: int, value: Any) -> None:
        self.raw(status, json.dumps(value).encode(), "application/json")

    def raw(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
