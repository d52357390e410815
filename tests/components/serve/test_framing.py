"""Where one request ends and the next begins is never in doubt: what could be read in two ways is 400, and the end."""

import json
import re
import socket
from collections.abc import Iterator

import httpx2
import pytest

from tests.components.serve.fronts import listening_front
from tests.fake_engine import FakeEngine

BODY = json.dumps({"model": "zhllama", "messages": [{"role": "user", "content": "hi"}]}).encode()
SIZE = len(BODY)
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY)
LENGTH, CHUNKED = b"Content-Length: %d" % SIZE, b"Transfer-Encoding: chunked"
POST = b"POST /v1/chat/completions HTTP/1.1"
HIDDEN = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
"""What would be answered were the request before it read in another way."""


def post(*lines: bytes, body: bytes = BODY, first: bytes = POST, end: bytes = b"\r\n") -> bytes:
    return end.join([first, b"Host: localhost", b"Content-Type: application/json", *lines, b"", b""]) + body


def get(target: bytes = b"/health", host: bytes = b"localhost", version: bytes = b"HTTP/1.1") -> bytes:
    return b"GET %b %b\r\nHost: %b\r\n\r\n" % (target, version, host)


LENGTHS = (
    b"%d, %d" % (SIZE, SIZE),
    b",%d" % SIZE,
    b"+%d" % SIZE,
    b"-1",
    b"0x%x" % SIZE,
    b"",
    b"%d x" % SIZE,
    "٣".encode(),
    b"9" * 30,
    b"%d\x0b" % SIZE,
    b"1_0",
    b"%d.0" % SIZE,
)
CODINGS = (
    b"identity",
    b"gzip, chunked",
    b"chunked, chunked",
    b"chunked, identity",
    b"xchunked",
    b"\x0bchunked",
    b'"chunked"',
    b"chunked;q=1",
    b"",
    b"chunked,",
)
SIZES = (b"%x;a\n", b"%x;\n\r\n", b"0x%x\r\n", b"+%x\r\n", b"-%x\r\n", b"%x\n", b" %x\r\n", b"%x\r\r\n")
HOSTS = (
    b"a@localhost",
    b"localhost/evil",
    b"localhost?evil",
    b"localhost#@evil",
    b"localhost:80@evil",
    b"localhost:evil",
    b"localhost\\@evil",
    b"localhost, evil",
    b"localhost evil",
    b"[::1",
    b"[::1]evil",
    b"localhost:1:2",
)
TARGETS = (b"http://localhost/v1/models", b"http://evil/v1/models", b"localhost:80", b"*", b"health", b"?a", b"")
DOUBTFUL = {
    "a length beside chunks": post(LENGTH, CHUNKED, body=CHUNKS),
    "chunks beside a length": post(CHUNKED, LENGTH, body=CHUNKS),
    "a length of 0 beside chunks": post(b"Content-Length: 0", CHUNKED, body=CHUNKS),
    "a length twice": post(LENGTH, LENGTH),
    "two lengths": post(LENGTH, b"content-length: 3"),
    "a coding twice": post(CHUNKED, CHUNKED, body=CHUNKS),
    "a space before a colon": post(b"Content-Length : %d" % SIZE),
    "a space before another": post(b"Transfer-Encoding : chunked", LENGTH),
    "a tab before a colon": post(b"Transfer-Encoding\t: chunked", LENGTH),
    "a folded coding": post(b"Transfer-Encoding:\r\n chunked", body=CHUNKS),
    "a folded length": post(b"Content-Length:\r\n\t%d" % SIZE),
    "another folded header": post(b"X: a\r\n Transfer-Encoding: chunked", LENGTH),
    "a folded first header": b"GET /health HTTP/1.1\r\n X: a\r\nHost: localhost\r\n\r\n",
    "line feeds alone": post(LENGTH, end=b"\n"),
    "one line feed alone": post(b"X: a\nTransfer-Encoding: chunked", LENGTH),
    "a line feed alone at the end": get()[:-2] + b"\n",
    "a carriage return alone": post(b"X: a\rTransfer-Encoding: chunked", LENGTH),
    "two carriage returns": post(LENGTH + b"\r"),
    "a NUL": post(b"X: a\0b", LENGTH),
    "no colon": post(b"X", LENGTH),
    "no name": post(b": a", LENGTH),
    "headers behind the body": post(CHUNKED, body=CHUNKS[:-2] + b"Content-Length: 5\r\n\r\n"),
    "headers behind the body, with line feeds": post(CHUNKED, body=CHUNKS[:-2] + b"X: a\n\n"),
    "no end of a chunk": post(CHUNKED, body=b"%x\r\n%b0\r\n\r\n" % (SIZE, BODY)),
    "a body of a hundred thousand chunks": post(CHUNKED, body=b"1\r\n \r\n" * 100_000 + b"0\r\n\r\n"),
    "chunks in HTTP/1.0": post(CHUNKED, body=CHUNKS, first=POST[:-1] + b"0"),
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two hosts": get(host=b"localhost\r\nHost: localhost"),
    "another version": get(version=b"HTTP/1.2"),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/0.9": b"GET /health\r\n\r\n",
    "small letters": get(version=b"http/1.1"),
    "two spaces": get(target=b" /health"),
    "a space at the end": get(version=b"HTTP/1.1 "),
    "an empty line first": b"\r\n" + get(),
    "a target that is no ASCII": get(target="/é".encode()),
    "CONNECT": b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    **{f"the length {one!r}": post(b"Content-Length: " + one) for one in LENGTHS},
    **{f"the coding {one!r}": post(b"Transfer-Encoding: " + one, body=CHUNKS) for one in CODINGS},
    **{f"the size {one!r}": post(CHUNKED, body=one % SIZE + BODY + b"\r\n0\r\n\r\n") for one in SIZES},
    **{f"the host {one!r}": get(host=one) for one in HOSTS},
    **{f"the target {one!r}": get(target=one) for one in TARGETS},
}  # fmt: skip
CLEAR = {
    "a length": post(LENGTH),
    "chunks": post(CHUNKED, body=CHUNKS),
    "CHUNKS": post(CHUNKED.upper(), body=CHUNKS),
    "many chunks": post(CHUNKED, body=b"".join(b"1\r\n%c\r\n" % one for one in BODY) + b"0\r\n\r\n"),
    "a chunk's extension, which means nothing": post(CHUNKED, body=b"%x;a=b\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY)),
    "hosts": get(host=b"LOCALHOST:80"),
    "an address": get(host=b"[::1]:80"),
    "a body that nobody reads": get()[:-2] + b"Content-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN,
}


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[httpx2.Client]:
    with listening_front(engine) as made:
        yield made


def connected(client: httpx2.Client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port), timeout=60)


def answers(connection: socket.socket) -> tuple[list[bytes], bytes]:
    """Until the server ends the connection: the statuses, and all of it."""
    content = b""
    while piece := connection.recv(65536):
        content += piece
    return re.findall(rb"HTTP/1\.1 (\d+) ", content), content


def test_what_can_be_read_in_two_ways_is_refused_and_what_follows_is_not_read(
    client: httpx2.Client, engine: FakeEngine
) -> None:
    for name, sent in DOUBTFUL.items():
        with connected(client) as asking:
            asking.sendall(sent + HIDDEN)
            statuses, content = answers(asking)
        assert statuses == [b"400"], name
        error = json.loads(content.partition(b"\r\n\r\n")[2])["error"]
        assert re.fullmatch(r"this is no HTTP request that can be read: .+", error["message"], re.DOTALL), name
        assert b"\r\nConnection: close\r\n" in content, name
    assert not [path for path, _ in engine.seen if path.startswith("/v1")]


def test_what_can_be_read_in_one_way_is_answered_and_so_is_what_follows(client: httpx2.Client) -> None:
    last = HIDDEN[:-2] + b"Connection: close\r\n\r\n"
    for name, sent in CLEAR.items():
        with connected(client) as asking:
            asking.sendall(sent + last)
            assert answers(asking)[0] == [b"200", b"200"], name


def test_the_answer_is_read_by_who_sends_on(client: httpx2.Client) -> None:
    with connected(client) as asking:
        asking.sendall(post(LENGTH, LENGTH, body=bytes(2**20)))
        assert answers(asking)[0] == [b"400"]
        asking.sendall(bytes(2**10))


@pytest.mark.parametrize("path", [b"/nothing", b"/v1/completions"])
def test_what_goes_wrong_behind_an_answer_ends_the_connection_without_a_line(
    client: httpx2.Client, caplog: pytest.LogCaptureFixture, path: bytes
) -> None:
    with connected(client) as asking:
        asking.sendall(b"POST %b HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" % path)
        assert asking.recv(12) in (b"HTTP/1.1 404", b"HTTP/1.1 415")
        asking.sendall(b"zz\r\n\r\n")
        assert b"400" not in answers(asking)[0]
    assert not caplog.records
