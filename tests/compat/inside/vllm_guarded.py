"""A real `vllm serve` behind components/serve/vllm_guard.py: every path of it, asked without the key and with it."""

import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import ANSWER, CHATS, OUT

GUARD = Path(__file__).parents[3] / "components" / "serve" / "vllm_guard.py"
KEY = "k" * 32
RIGHT = {"Authorization": f"Bearer {KEY}"}
OPEN = ("/health", "/metrics")
STEERING = re.compile(r"pause|abort|sleep|wake|rpc|weight|scal|lora|profile|docs|openapi|redoc|kv_event|server_info")
NEAR = (
    "/", "//v1/models", "/./v1/models", "/health/../v1/models", "/health/%2e%2e/v1/models", "/%76%31/models",
    "/V1/models", "/v1%2fmodels", "http://a/v1/models", "/health/", "/health;/v1/models", "/health%00", "/health%20",
    "/metrics/x", "/metrics//", "/metrics/%2e%2e/pause", "*", "/pause", "/abort_requests", "/sleep",
    "/v1/realtime", "/v1/models/",
)  # fmt: skip
WRONG: tuple[dict[str, str], ...] = (
    {}, {"Authorization": ""}, {"Authorization": "Bearer"}, {"Authorization": "Bearer "}, {"Authorization": KEY},
    {"Authorization": f"Basic {KEY}"}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": f"Bearer {KEY[1:]}"},
    {"Authorization": f"Bearer {KEY}, Bearer x"}, {"X-Api-Key": KEY}, {"Proxy-Authorization": f"Bearer {KEY}"},
    {"X-Forwarded-For": "127.0.0.1", "X-Original-URL": "/health"},
)  # fmt: skip


def ask(port: int, method: str, path: str, headers: list[tuple[str, str]], body: bytes = b"") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in [*headers, ("Content-Type", "application/json"), ("Content-Length", str(len(body)))]:
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def spoken(of: str, folder: str) -> dict[str, Any]:
    """The answers that the key's holder gets; AssertionError for whoever else gets one."""
    place = OUT / "guard"
    place.mkdir(exist_ok=True)
    shutil.copyfile(GUARD, place / "zhllama_vllm_guard.py")
    (place / "key").write_text(f"{KEY}\n")
    # the key's file is the pod's
    (place / "guard_here.py").write_text(
        "import zhllama_vllm_guard\n"
        "class Guard(zhllama_vllm_guard.Guard):\n"
        f"    def __init__(self, app): super().__init__(app, {str(place / 'key')!r})\n"
    )
    port = 20_000 + os.getpid() % 20_000
    command = [str(Path(sys.executable).with_name("vllm")), "serve", folder, "--served-model-name", of]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "256"]
    command += ["--enforce-eager", "--middleware", "guard_here.Guard"]
    path = os.pathsep.join([str(place), os.environ["PYTHONPATH"]])
    environment = {**os.environ, "PYTHONPATH": path, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    said = (place / "log.txt").open("w+")
    with said, subprocess.Popen(command, stdout=said, stderr=said, env=environment) as server:
        try:
            until = time.monotonic() + 600
            while True:
                try:
                    assert ask(port, "GET", "/health", [])[0] == 200
                    break
                except OSError:
                    if server.poll() is not None or time.monotonic() > until:
                        raise
                    time.sleep(0.5)
            said.seek(0)
            paths = sorted(set(re.findall(r"Route: (/[^,\s]*)", said.read())))
            assert "/v1/chat/completions" in paths
            return {"spoken": _attacked(port, of, paths)}
        finally:
            server.terminate()


def _attacked(port: int, of: str, paths: list[str]) -> list[str]:
    upgrade = [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"),
               ("Sec-WebSocket-Key", "A" * 22 + "==")]  # fmt: skip
    for path in [*paths, *NEAR]:
        for method in ("GET", "POST", "PUT", "DELETE", "HEAD", "TRACE"):
            if path in OPEN and method in ("GET", "HEAD"):
                continue
            for headers in WRONG if method == "POST" else WRONG[:1]:
                status, _ = ask(port, method, path, list(headers.items()), b"{}")
                assert status == 401, f"{method} {path} {headers}: {status}"
            twice = [("Authorization", "Bearer x"), *RIGHT.items()]
            assert ask(port, method, path, twice)[0] == 401, f"{method} {path}, two keys"
        assert ask(port, "GET", path, upgrade)[0] in (401, 403), f"{path}, a websocket"
        assert b'"choices"' not in ask(port, "OPTIONS", path, [("Origin", "http://evil.example")])[1]
    for path in paths:
        status, body = ask(port, "POST", path, list(RIGHT.items()), b"{}")
        ours = b"there is no such path here" in body
        assert ours == bool(STEERING.search(path)) or path in OPEN, f"{path}: {status} {body[:200]!r}"
    found = []
    for spelled in ("Authorization", "authorization", "AUTHORIZATION"):
        for kind in ("Bearer", "bearer"):
            assert ask(port, "GET", "/v1/models", [(spelled, f"{kind} {KEY}")])[0] == 200
    for messages in CHATS:
        body = {"model": of, "messages": messages, "temperature": 0, "max_tokens": ANSWER}
        status, answer = ask(port, "POST", "/v1/chat/completions", list(RIGHT.items()), json.dumps(body).encode())
        assert status == 200, answer
        found.append(json.loads(answer)["choices"][0]["message"]["content"])
    return found
