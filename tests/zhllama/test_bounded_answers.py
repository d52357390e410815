"""What another server answers is read within bounds, over a real socket."""

import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
import pytest

from zhllama import bounded_answers
from zhllama.bounded_answers import AnswerWithoutEnd, whole

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"


@contextmanager
def serving(head: bytes, *parts: bytes, again: bytes = b"") -> Iterator[str]:
    """Answers every request with these bytes, and then with `again`, without end."""

    class Answer(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)
            try:
                self.request.sendall(head + b"".join(parts))
                while again:
                    self.request.sendall(again)
            except OSError:
                return

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Answer) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def read(address: str, seconds: float = 30) -> bytes:
    with httpx2.Client(trust_env=False).stream("GET", address, headers={"Accept-Encoding": "identity"}) as answer:
        return whole(answer, seconds)


def test_an_answer_is_read_whole():
    with serving(HEAD + b"Content-Length: 5\r\n\r\n", b"12345") as address:
        assert read(address) == b"12345"


def test_one_without_end_is_given_up_at_its_longest(monkeypatch):
    monkeypatch.setattr(bounded_answers, "LONGEST_BODY", 2**20)
    with (
        serving(HEAD + b"\r\n", again=b" " * 65536) as address,
        pytest.raises(AnswerWithoutEnd, match="1,048,576 bytes"),
    ):
        read(address)


def test_one_that_comes_for_ever_is_given_up_in_time():
    began = time.monotonic()
    with serving(HEAD + b"\r\n", again=b" ") as address, pytest.raises(AnswerWithoutEnd, match="has not ended after"):
        read(address, seconds=0.2)
    assert time.monotonic() - began < 10


def test_one_that_is_compressed_unasked_is_not_taken():
    with serving(HEAD + b"Content-Encoding: gzip\r\n\r\n") as address, pytest.raises(AnswerWithoutEnd, match="gzip"):
        read(address)
