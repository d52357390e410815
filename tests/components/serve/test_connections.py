"""Clients that are slow, dead or many: each has its time, and keeps nobody else out."""

import asyncio
import errno
import json
import logging
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import httpx2
import pytest

from components.serve import connections
from components.serve.connections import OnceInAWhile, room
from tests.components.serve.fronts import listening_front
from tests.fake_engine import FakeEngine

KEY = "a-key-for-the-tests-only"
CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "zhllama", "messages": [{"role": "user", "content": "你好"}]}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """Connections there may be."""
    monkeypatch.setattr("components.serve.local.room", lambda: 12)
    return 12


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that a test can wait for."""
    for name in ("HEADER", "BODY", "LINGER", "STALLED"):
        monkeypatch.setattr(connections, f"{name}_SECONDS", 0.3)


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[httpx2.Client]:
    with listening_front(engine) as made:
        yield made


def connected(client: httpx2.Client, content: bytes = b"") -> socket.socket:
    made = socket.create_connection((client.base_url.host, client.base_url.port), timeout=60)
    made.sendall(content)
    return made


def is_closed(connection: socket.socket) -> bool:
    """By the other side, at once or within a minute; what it says before is read."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        return True
    return True


def request(client: httpx2.Client, path: str = CHAT, length: int | None = None, **more: str) -> bytes:
    content = json.dumps(BODY).encode()
    head = {"Host": f"127.0.0.1:{client.base_url.port}", "Content-Type": "application/json", **more}
    head["Content-Length"] = str(len(content) if length is None else length)
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + content


def asks(client: httpx2.Client) -> None:
    with httpx2.Client(base_url=client.base_url, timeout=60) as other:
        assert other.post(CHAT, json=BODY).status_code == 200


def test_a_header_or_a_body_that_does_not_come_ends_its_connection(client: httpx2.Client, short: None) -> None:
    for sent in (b"", b"POST ", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ", request(client, length=10_000)):
        with connected(client, sent) as slow:
            begin = time.monotonic()
            assert is_closed(slow)
            assert time.monotonic() - begin < 30
    asks(client)


def test_bytes_that_trickle_in_do_not_help(client: httpx2.Client, short: None) -> None:
    with connected(client, b"GET /health HTTP/1.1\r\n") as slow:
        until = time.monotonic() + 60
        with suppress(OSError):
            while time.monotonic() < until:
                slow.sendall(b"x")
                time.sleep(0.02)
        assert time.monotonic() < until


def test_a_connection_may_ask_often_and_long_answers_are_not_cut(
    client: httpx2.Client, engine: FakeEngine, short: None
) -> None:
    def late(handler: Any) -> None:
        engine.released.wait(1)
        handler.json(200, {"choices": []})

    for _ in range(3):
        assert client.post(CHAT, json=BODY).status_code == 200
    engine.faults[CHAT] = late
    assert client.post(CHAT, json=BODY).status_code == 200


@pytest.mark.parametrize("half", [b"", b"GET /health HT", "body"], ids=["nothing", "half a header", "half a body"])
def test_half_sent_requests_keep_nobody_out(engine: FakeEngine, few: int, half: Any) -> None:
    with listening_front(engine) as client:
        sent = request(client, length=10_000) if half == "body" else half
        held = [connected(client, sent) for _ in range(5 * few)]
        for _ in range(3):
            asks(client)
        for one in held:
            one.close()


def test_what_is_being_answered_is_not_ended_for_others_and_more_is_503(engine: FakeEngine, few: int) -> None:
    def waits(handler: Any) -> None:
        engine.released.wait(60)
        handler.json(200, {"choices": []})

    engine.faults[CHAT] = waits
    with listening_front(engine) as client:
        held = [connected(client, request(client)) for _ in range(few)]
        until = time.monotonic() + 60
        while sum(path == CHAT for path, _ in engine.seen) < few:
            assert time.monotonic() < until
            time.sleep(0.01)
        with connected(client) as other:
            assert other.recv(100).startswith(b"HTTP/1.1 503 ")
        engine.released.set()
        for one in held:
            assert one.recv(12) == b"HTTP/1.1 200"
            one.close()
        asks(client)


def test_one_address_gets_half_unless_it_is_this_machines(monkeypatch: pytest.MonkeyPatch, engine: FakeEngine) -> None:
    monkeypatch.setattr("components.serve.local.room", lambda: 12)
    monkeypatch.setattr(connections, "_is_here", lambda address: False)
    with listening_front(engine) as client:
        held = [connected(client) for _ in range(7)]
        assert is_closed(held[0])
        for one in held[1:]:
            one.setblocking(False)
            with pytest.raises(BlockingIOError):
                one.recv(1)
            one.close()


def test_an_upload_without_the_key_is_answered_before_it_is_read_and_then_cut_off(engine: FakeEngine, few: int) -> None:
    with listening_front(engine, KEY, host="0.0.0.0") as client:
        with connected(client, request(client, length=200 * 2**20)) as upload:
            assert upload.recv(100).startswith(b"HTTP/1.1 401 ")
            sent = 0
            with suppress(OSError):
                while sent < 200 * 2**20:
                    upload.sendall(bytes(2**20))
                    sent += 2**20
            assert sent < 30 * 2**20
        with connected(client, request(client, Expect="100-continue")) as polite:
            assert polite.recv(100).startswith(b"HTTP/1.1 401 ")


def test_a_client_that_does_not_read_on_loses_its_stream_and_the_engine_is_free(
    client: httpx2.Client, engine: FakeEngine, short: None
) -> None:
    ended = threading.Event()

    def forever(handler: Any) -> None:
        try:
            handler.stream([handler.chunk("好")], whole=False)
            event = handler.chunk("好" * 10_000)
            while not engine.released.is_set():
                handler.wfile.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")
        except OSError:
            ended.set()

    engine.faults[CHAT] = forever
    content = json.dumps({**BODY, "stream": True}).encode()
    head = request(client, length=len(content)).partition(b"\r\n\r\n")[0]
    with connected(client, head + b"\r\n\r\n" + content):
        assert ended.wait(60)


@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_leaves_ends_its_request_at_the_engine_too(
    client: httpx2.Client, engine: FakeEngine, reset: bool
) -> None:
    left = threading.Event()

    def waits(handler: Any) -> None:
        handler.connection.settimeout(60)
        # nothing more is sent: what comes is the end
        if handler.connection.recv(1) == b"":
            left.set()

    engine.faults[CHAT] = waits
    with connected(client, request(client)) as leaving:
        until = time.monotonic() + 60
        while not engine.seen:
            assert time.monotonic() < until
            time.sleep(0.01)
        if reset:
            leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert left.wait(60)


def test_what_is_no_http_is_answered_and_leaves_no_line(
    client: httpx2.Client, caplog: pytest.LogCaptureFixture
) -> None:
    for sent in (
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET / HTTP/9\r\n\r\n",
        b"\r\n" * 100_000,
        b"x" * 200_000 + b"\r\n\r\n",
    ):
        with connected(client) as odd:
            try:
                odd.sendall(sent)
            except OSError:
                continue
            odd.shutdown(socket.SHUT_WR)
            assert is_closed(odd)
    asks(client)
    assert not [record for record in caplog.records if record.name.startswith("uvicorn")]


def test_lack_of_descriptors_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    handler = OnceInAWhile()
    loop = asyncio.new_event_loop()
    with caplog.at_level(logging.ERROR):
        for _ in range(1_000):
            handler(loop, {"message": "x", "exception": OSError(errno.EMFILE, "Too many open files")})
        handler(loop, {"message": "something else"})
    loop.close()
    assert [record.message for record in caplog.records] == [
        "no descriptors are left for connections (ulimit -n): they wait until some end",
        "something else",
    ]


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "raised"),
    [(256, 256, 80, 256), (256, 4_096, 2_000, 4_096), (1_024, resource.RLIM_INFINITY, 2_000, 4_096), (32, 32, 8, 32)],
)
def test_the_room_is_what_descriptors_allow(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, wanted: int, raised: int
) -> None:
    found = [(soft, hard)]
    monkeypatch.setattr(connections.resource, "getrlimit", lambda _: found[-1])
    monkeypatch.setattr(connections.resource, "setrlimit", lambda _, both: found.append(both))
    assert room() == wanted
    assert found[-1][0] == raised


SERVER = """
import sys
from components.serve.local import listening, running
async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"here"})
with listening("127.0.0.1", 0) as listener, running(app, listener):
    print(listener.getsockname()[1], flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_with_few_descriptors_half_sent_requests_that_come_at_once_keep_nobody_out() -> None:
    """Each that is accepted finds another one to end, or descriptors run out and nobody is accepted for a second."""

    def with_few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))

    with (
        subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=with_few,
        ) as server,
        ExitStack() as held,
    ):
        held.callback(server.kill)
        assert server.stdin
        assert server.stdout
        assert server.stderr
        place = ("127.0.0.1", int(server.stdout.readline()))
        server.send_signal(signal.SIGSTOP)
        for sent in (
            b"",
            b"GET / HTTP/1.1\r\nHost: a\r\nX: ",
            b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n",
        ) * 70:
            held.enter_context(socket.create_connection(place, timeout=60)).sendall(sent)
        server.send_signal(signal.SIGCONT)
        begin = time.monotonic()
        assert httpx2.get(f"http://127.0.0.1:{place[1]}", timeout=60).text == "here"
        # far below the time that half a request has
        assert time.monotonic() - begin < connections.HEADER_SECONDS - 2
        server.stdin.close()
        assert server.stderr.read() == b""
