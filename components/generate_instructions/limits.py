"""How fast to ask: requests and tokens per minute as sliding windows, pauses that the server asks for, and back-off.

A window counts what was sent in the last 60 seconds, so that no minute, wherever it begins, holds more than the limit;
a bucket that fills up again would let twice the limit through in its first. A server's Retry-After holds for all
requests, since it is the account that is throttled. Without one, waits double from half a second to a minute, at
random below that, so that requests that failed together do not return together.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from zhllama.retries import pause_after

MINUTE = 60.0
ATTEMPTS = 10
"""Of one request; a throttled one (429) does not count."""
FIRST_WAIT = 0.5
"""Seconds."""
LONGEST_WAIT = 60.0
LONGEST_PAUSE = 900.0
"""Seconds of a Retry-After that are waited; a server that asks for more is for a later run."""


@dataclass
class Window:
    """What was taken in the last minute, of `limit` a minute (0: no limit). Pure: the clock is the caller's."""

    limit: float
    _taken: deque[list[float]] = field(default_factory=deque)
    _sum: float = 0.0

    def wait(self, now: float, amount: float) -> float:
        """Seconds until `amount` fits. More than the limit fits when nothing else is in the window."""
        while self._taken and self._taken[0][0] <= now - MINUTE:
            self._sum -= self._taken.popleft()[1]
        if not self.limit or not self._taken or self._sum + amount <= self.limit:
            return 0.0
        over, until = self._sum + amount - self.limit, 0.0
        for at, taken in self._taken:
            until = at + MINUTE - now
            over -= taken
            if over <= 0:
                break
        return until

    def take(self, now: float, amount: float) -> Callable[[float], None]:
        """Counts `amount`; what comes back corrects it once the true amount is known."""
        entry = [now, amount]
        if self.limit:
            self._taken.append(entry)
            self._sum += amount

        def correct(to: float) -> None:
            # what has left the window is out of the sum already
            if self._taken and entry[0] >= self._taken[0][0]:
                self._sum += to - entry[1]
            entry[1] = to

        return correct


class Limits:
    """The pace of all requests together. `async with` nothing: await `turn` before each request."""

    def __init__(self, requests_per_minute: float, tokens_per_minute: float) -> None:
        self._requests = Window(requests_per_minute)
        self._tokens = Window(tokens_per_minute)
        self._paused_until = 0.0
        self._one_after_another = asyncio.Lock()
        self._given_back = asyncio.Event()

    async def turn(self, tokens: int) -> Callable[[float], None]:
        """Waits until a request of so many tokens may be sent, first come, first served. What comes back takes the
        tokens that it really had."""
        async with self._one_after_another:
            while True:
                now = time.monotonic()
                wait = max(self._paused_until - now, self._requests.wait(now, 1), self._tokens.wait(now, tokens))
                if wait <= 0:
                    self._requests.take(now, 1)
                    return self._heard(self._tokens.take(now, tokens))
                await self._wait(wait)

    def _heard(self, correct: Callable[[float], None]) -> Callable[[float], None]:
        """The correction, which whoever waits for room hears of."""

        def corrected(to: float) -> None:
            correct(to)
            self._given_back.set()

        return corrected

    async def _wait(self, seconds: float) -> None:
        """So many seconds, or less when tokens come back before: a request takes many more than it mostly needs."""
        self._given_back.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._given_back.wait(), seconds)

    def pause(self, seconds: float) -> None:
        """Nothing is sent for so long."""
        self._paused_until = max(self._paused_until, time.monotonic() + seconds)


def backoff(failures: int) -> float:
    """Seconds to wait after so many failures in a row (1 or more)."""
    return pause_after(failures, FIRST_WAIT, LONGEST_WAIT)


def retry_after(headers: "dict[str, str]") -> float | None:
    """Seconds that a response asks to wait, from retry-after-ms or Retry-After (seconds or a date); None: it does not.

    headers: names in lower case.
    """
    milliseconds, said = headers.get("retry-after-ms", ""), headers.get("retry-after", "").strip()
    for text, unit in ((milliseconds, 1000.0), (said, 1.0)):
        if text.replace(".", "", 1).isdigit():
            return float(text) / unit
    try:
        until = parsedate_to_datetime(said)
    except ValueError:
        return None
    until = until if until.tzinfo else until.replace(tzinfo=UTC)
    return max(0.0, (until - datetime.now(UTC)).total_seconds())
