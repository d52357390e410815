"""How many connections clients may have, and how long each may keep the server waiting.

uvicorn waits for ever for a header, for a body, and for a client that does not read on. Here each has its time; where
there is no more room the connection goes that has waited longest without being answered: half-sent requests, however
many, keep nobody out. Looked at instead: hypercorn (times, no limits of connections), granian (times for headers, in
processes of its own), httptools below uvicorn (the same gaps). What is no request, or could be read as two
(framing.py), gets 400 and the end of its connection.
"""

import asyncio
import collections
import errno
import ipaddress
import json
import logging
import resource
import time
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from components.serve.framing import StrictConnection
from components.serve.requests import LONGEST_BODY, ApiError

log = logging.getLogger("serve")

HEADER_SECONDS = 10.0
BODY_SECONDS = 30.0
LINGER_SECONDS = 5.0
"""For the rest of a body that was refused: who is cut off while sending does not read the answer."""
STALLED_SECONDS = 30.0
"""In which a client has to read some ten kilobytes of what waits for it."""
MOST = 2_000
"""Connections, where descriptors allow: each may need one more to the engine."""
LONGEST_HEAD = 2**16
_SPARE = 96
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
_UNREADABLE = (
    b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
)


def room() -> int:
    """How many connections this process may have; its limit of descriptors is raised as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MOST + _SPARE
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return MOST if soft == resource.RLIM_INFINITY else max(8, min(MOST, (soft - _SPARE) // 2))


def limited(most: int) -> type[H11Protocol]:
    """uvicorn's HTTP, with at most so many connections, and half of them for one address that is not this machine's:
    on it is who serves, or a proxy that speaks for many."""

    class Limited(_Connection):
        everyone: ClassVar[dict[_Connection, None]] = {}
        of_address: ClassVar[collections.Counter[str]] = collections.Counter()
        limit = most

    return Limited


class _Connection(H11Protocol):
    everyone: ClassVar[dict["_Connection", None]]
    """In the order in which they began to wait."""
    of_address: ClassVar["collections.Counter[str]"]
    limit: int
    conn: StrictConnection
    _timer: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _waits_for: tuple[Any, bool] | None = None
    _thrown_away = 0
    _refused = False
    _address = ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.conn = StrictConnection(h11.SERVER, max_incomplete_event_size=LONGEST_HEAD)
        self._address = self.client[0] if self.client else ""
        self.everyone[self] = None
        self.of_address[self._address] += 1
        self._wait()
        crowded = self.of_address[self._address] > self.limit // 2 and not _is_here(self._address)
        if crowded or len(self.everyone) > self.limit:
            others = (
                one for one in self.everyone if one is not self and (not crowded or one._address == self._address)
            )
            if (longest := next((one for one in others if not one.is_answered), None)) is not None:
                longest.transport.abort()
                # at once: several come in one turn of the loop, and each has to find another one
                longest._uncount()
            else:
                transport.write(_FULL)
                transport.close()
                self._uncount()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._timer, self._stalled):
            if timer is not None:
                timer.cancel()
        self._uncount()

    def _uncount(self) -> None:
        if self.everyone.pop(self, self) is None:
            self.of_address[self._address] -= 1
            if not self.of_address[self._address]:
                del self.of_address[self._address]

    @property
    def is_answered(self) -> bool:
        """Whether its request is whole, and the answer is not."""
        whole = self.cycle is not None and not self.cycle.more_body
        return whole and not self.cycle.response_complete and not self._refused

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if not self._refused:
            super().data_received(data)
        if self._refused or (
            self.cycle is not None and self.cycle.response_complete and self.conn.their_state is h11.SEND_BODY
        ):
            self._thrown_away += len(data)
            if self._thrown_away > LONGEST_BODY:
                self.transport.abort()
        else:
            self._thrown_away = 0
        self._wait()

    def send_400_response(self, msg: str) -> None:
        """To what is no request, unless an answer has begun."""
        self._refused = True
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(ApiError(400, f"this is no HTTP request that can be read: {self.conn.why}").body).encode()
            self.transport.write(_UNREADABLE % len(body) + body)
        # what is still coming is thrown away: who is cut off while sending does not read the answer
        self.transport.write_eof()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait()

    def _wait(self) -> None:
        """Sets the time for what is to come next: a header, a body or its rest; an answer takes as long as it takes."""
        working = self.cycle is not None and not self.cycle.response_complete and not self._refused
        sending = self._refused or (self.cycle is not None and self.conn.their_state is h11.SEND_BODY)
        if self._waits_for == (waits_for := (self.cycle if working else None, sending)):
            return
        self._waits_for = waits_for
        if self._timer is not None:
            self._timer.cancel()
        seconds = (BODY_SECONDS if working else LINGER_SECONDS) if sending else None if working else HEADER_SECONDS
        self._timer = self.loop.call_later(seconds, self.transport.abort) if seconds else None
        if self in self.everyone and not working:
            # behind those that have waited longer
            self.everyone[self] = self.everyone.pop(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None


def _is_here(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return True
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


class OnceInAWhile:
    """An event loop's handler of errors, that says at most every ten seconds that there are no descriptors left."""

    def __init__(self) -> None:
        self._said = -10.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)):
            loop.default_exception_handler(context)
        elif time.monotonic() - self._said > 10:
            self._said = time.monotonic()
            log.error("no descriptors are left for connections (ulimit -n): they wait until some end")
