"""How fast to ask: requests and tokens per minute as sliding windows, pauses that the server asks for, and back-off.

A window counts what was sent in the last 60 seconds, so that no minute, wherever it begins, holds more than the limit
(a bucket lets twice that through in its first). A server's Retry-After holds for all: the account is throttled.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from zhllama.retries import pause_after

MINUTE = 60.0
ATTEMPTS = 10
"""Of one request; a throttled one (429) does not count."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
"""Seconds."""
LONGEST_PAUSE = 900.0
"""Seconds of a Retry-After that are waited; a server that asks for more is for a later run."""


class Limits:
    """The pace of all requests together, 0 for no limit: await `turn` before each request."""

    def __init__(self, requests_per_minute: float, tokens_per_minute: float) -> None:
        self._most_requests, self._most_tokens = requests_per_minute or math.inf, tokens_per_minute or math.inf
        self._sent: deque[list[float]] = deque()
        """When, and how many tokens, of the last minute."""
        self._paused_until = 0.0
        self._one_after_another = asyncio.Lock()
        self._given_back = asyncio.Event()

    def wait(self, now: float, tokens: float) -> float:
        """Seconds until such a request fits. More than a limit fits when nothing else is in the window."""
        while self._sent and self._sent[0][0] <= now - MINUTE:
            self._sent.popleft()
        requests, until = len(self._sent) + 1, self._paused_until
        tokens += sum(taken for _, taken in self._sent)
        for at, taken in self._sent:
            if requests <= self._most_requests and tokens <= self._most_tokens:
                break
            until = max(until, at + MINUTE)
            requests, tokens = requests - 1, tokens - taken
        return max(0.0, until - now)

    def take(self, now: float, tokens: float) -> Callable[[float], None]:
        """Counts a request; what comes back takes the tokens that it really had, which whoever waits hears of."""
        entry = [now, tokens]
        if min(self._most_requests, self._most_tokens) < math.inf:
            self._sent.append(entry)

        def correct(to: float) -> None:
            entry[1] = to
            self._given_back.set()

        return correct

    async def turn(self, tokens: int) -> Callable[[float], None]:
        """Waits until a request of so many tokens may be sent, first come, first served; see take."""
        async with self._one_after_another:
            while (wait := self.wait(now := time.monotonic(), tokens)) > 0:
                await self._wait(wait)
        return self.take(now, tokens)

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


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a response asks to wait by retry-after-ms or Retry-After (seconds or a date), if it does."""
    milliseconds, said = headers.get("retry-after-ms", ""), headers.get("retry-after", "").strip()
    for text, unit in ((milliseconds, 1000.0), (said, 1.0)):
        if text.isascii() and text.replace(".", "", 1).isdigit():
            return float(text) / unit
    try:
        until = parsedate_to_datetime(said)
    except (ValueError, OverflowError):
        return None
    until = until if until.tzinfo else until.replace(tzinfo=UTC)
    return max(0.0, (until - datetime.now(UTC)).total_seconds())
