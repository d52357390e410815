"""A small OpenAI-compatible server: it answers from a script, and records what it was asked."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class Model:
    """The server. `script` holds what the next requests get: a status with headers, a text, or raw bytes.

    Its last entry goes on for ever.
    """

    def __init__(self) -> None:
        self.script: list[Any] = []
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str] = []
        model = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                model.asked.append(body)
                model.keys.append(self.headers.get("Authorization", ""))
                entry = model.script.pop(0) if len(model.script) > 1 else model.script[0]
                if entry == "drop":
                    self.connection.close()
                    return
                status, headers, content = answer(entry, body)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def answer(entry: Any, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
    if isinstance(entry, bytes):
        return 200, {"Content-Type": "text/html"}, entry
    kind = {"Content-Type": "application/json"}
    if isinstance(entry, tuple):
        status, headers = entry
        return status, {**kind, **headers}, json.dumps({"error": {"message": f"status {status}"}}).encode()
    message = {"role": "assistant", "content": entry}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    made = {"id": "x", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice]}
    return 200, kind, json.dumps(made).encode()


@pytest.fixture
def model() -> Iterator[Model]:
    server = Model()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-the-tests")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return "sk-secret-of-the-tests"
