"""A way to a pod that is refused is said in one line, with the server's own words."""

import json
import socket
import ssl
import threading

import pytest
from kubernetes.client.exceptions import ApiException
from kubernetes.stream import ws_client
from websocket import WebSocketBadStatusException

from components.serve.port_forward import refusal
from tests.recordings import answered

NOT_FOUND = answered("not-found/pod")["body"]


def refused(body: bytes | None) -> Exception:
    """As the kubernetes client raises it: the handshake's answer, in a text with all of its headers."""
    said = f"Handshake status 404 Not Found -+-+- {{'date': 'x', 'audit-id': 'y'}} -+-+- {body!r}"
    try:
        try:
            raise WebSocketBadStatusException(said, 404, "Not Found", {"audit-id": "y"}, body)
        except WebSocketBadStatusException as error:
            raise ApiException(status=0, reason=str(error))  # noqa: B904 - as the client does it
    except ApiException as error:
        return error


def test_a_refused_handshake_is_its_status_and_the_servers_words() -> None:
    assert refusal(refused(json.dumps(NOT_FOUND).encode())) == '404 pods "none" not found'


def test_a_proxys_page_in_place_of_a_status_is_one_line_too() -> None:
    assert refusal(refused(b"<html>\n<h1>no</h1>\n</html>")) == "404 Not Found"
    assert refusal(refused(None)) == "404 Not Found"


def test_what_is_no_handshake_is_said_in_one_line() -> None:
    assert refusal(OSError("the connection\nwas reset")) == "the connection was reset"


class Broken:
    """A WebSocket whose connection ends in the middle, as one over TLS says it."""

    connected = True

    def __init__(self) -> None:
        self.sock, self._other = socket.socketpair()
        self._other.sendall(b"x")

    def fileno(self) -> int:
        return self.sock.fileno()

    def recv_data_frame(self, control: bool) -> None:
        raise ssl.SSLEOFError(8, "EOF occurred in violation of protocol (_ssl.c:2396)")

    def close(self) -> None:
        self.connected = False


def test_a_way_that_breaks_is_at_its_end_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    died: list[object] = []
    monkeypatch.setattr(threading, "excepthook", died.append)
    websocket = Broken()
    way = ws_client.PortForward(websocket, [8000])
    far = way.socket(8000)
    far.settimeout(10)
    # who reads it is not left waiting
    assert far.recv(1) == b""
    for thread in threading.enumerate():
        if "port forward" in thread.name:
            thread.join(10)
    assert not died
    assert not websocket.connected
