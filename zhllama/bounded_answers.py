"""Bounds on what another server answers over HTTP, where its bytes come in: hooks for any of httpx2's async clients.

    httpx2.AsyncClient(event_hooks={"response": [bounded], "request": [uncompressed]})

What parses an answer holds it: an event of a stream until its empty line comes, a body until it ends. A server that
never ends either takes all memory in seconds (measured: 6.9 GB in 20 s). Compressed bytes would say nothing of what
they become, so none are asked for, and none are taken.
"""

import re
import time
from collections.abc import AsyncIterator

import httpx2

LONGEST_EVENT = 4 * 2**20
"""Bytes of one event of a stream: some hundred thousand characters, and their names around them."""
LONGEST_BODY = 32 * 2**20
LONGEST_STREAM = 512 * 2**20
"""Of what is not held: a stream whose events are read one by one, a file that is written to disk."""
_END_OF_EVENT = re.compile(rb"\n\r?\n|\r\r\n?|\r\n\r\n")


class AnswerWithoutEnd(httpx2.TransportError):
    """More than any answer has."""


async def uncompressed(request: httpx2.Request) -> None:
    request.headers["Accept-Encoding"] = "identity"


async def bounded(response: httpx2.Response) -> None:
    """AnswerWithoutEnd, now or when the bytes come."""
    _require_plain(response)
    response.stream = _Bounded(response, response.stream)


def whole(response: httpx2.Response, seconds: float) -> bytes:
    """The body of an answer that was asked for uncompressed, as a stream of a client that waits: AnswerWithoutEnd for
    one that is longer than any, or still comes after so many seconds."""
    _require_plain(response)
    content, late = bytearray(), time.monotonic() + seconds
    for chunk in response.iter_raw():
        content += chunk
        if len(content) > LONGEST_BODY:
            raise AnswerWithoutEnd(f"an answer has more than {LONGEST_BODY:,} bytes")
        if time.monotonic() > late:
            raise AnswerWithoutEnd(f"an answer has not ended after {seconds:.0f} s")
    return bytes(content)


def _require_plain(response: httpx2.Response) -> None:
    if (encoding := response.headers.get("content-encoding", "identity").lower()) != "identity":
        raise AnswerWithoutEnd(f"an answer is compressed ({encoding}), which it was not asked to be")


class _Bounded(httpx2.AsyncByteStream):
    def __init__(self, response: httpx2.Response, stream: object) -> None:
        assert isinstance(stream, httpx2.AsyncByteStream)
        self._stream = stream
        self._events = response.headers.get("content-type", "").startswith("text/event-stream")
        # a file of the Batch API
        file = response.request.url.path.endswith("/content")
        self._most = LONGEST_STREAM if self._events or file else LONGEST_BODY

    async def __aiter__(self) -> AsyncIterator[bytes]:
        whole = event = 0
        last = b""
        async for chunk in self._stream:
            whole += len(chunk)
            event += len(chunk)
            if self._events:
                joined = last + chunk
                for end in _END_OF_EVENT.finditer(joined):
                    event = len(joined) - end.end()
                last = joined[-3:]
                if event > LONGEST_EVENT:
                    raise AnswerWithoutEnd(f"a stream has an event of more than {LONGEST_EVENT:,} bytes")
            if whole > self._most:
                raise AnswerWithoutEnd(f"an answer has more than {self._most:,} bytes")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()
