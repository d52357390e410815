"""How many requests at a time, how patient, and a bounded set of threads that does them.

Threads, not processes: what costs time (sockets, hashing, disks) runs outside Python's lock.
"""

import os
import queue
import threading
from collections.abc import Callable, Iterable
from typing import Any, Self

from zhllama.errors import InputError

STEP = 2**19
"""Bytes per read where somebody looks at them at once: they are still in the processor's cache."""
Take = Callable[[int, memoryview], None]
"""Called in the reader's thread with each piece and its place among what is read. Place 0 again: all comes anew."""


def _setting(name: str, default: int) -> int:
    value = os.environ.get(name) or str(default)
    if not value.isdigit() or int(value) < 1:
        raise InputError(f"{name}={value}: give a whole number, 1 or more")
    return int(value)


def room(buffer: memoryview, length: int, at: int) -> memoryview:
    """Where a read's next bytes go: to their place in a buffer of `length`, or to the beginning of a shorter one."""
    place = at if len(buffer) >= length else 0
    return buffer[place : place + min(STEP, length - at)]


class RoomOfThread(threading.local):
    """`room`: so many bytes of memory for each thread, used again and again."""

    def __init__(self, size: int) -> None:
        self.room = memoryview(bytearray(size))


def connections() -> int:
    """Requests under way at a time in one transfer: ZHLLAMA_S3_CONNECTIONS, 8 by default."""
    return _setting("ZHLLAMA_S3_CONNECTIONS", 8)


def patience() -> int:
    """Seconds without a byte after which a request is given up and tried again: ZHLLAMA_S3_TIMEOUT, 60 by default."""
    return _setting("ZHLLAMA_S3_TIMEOUT", 60)


class Threads:
    """Calls side by side, at most `count` at a time: `with Threads(8) as threads: threads.call(function, argument)`.
    `call` waits while all are busy, so that what the calls hold is bounded. The first error is raised by the next one,
    or at the end. The threads are daemons: one that hangs on a dead server keeps no cancelled program alive."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._free = threading.Semaphore(count)
        self._jobs: queue.SimpleQueue[tuple[Callable[..., Any], tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._error: BaseException | None = None

    def call(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._free.acquire()
        self.raise_error()
        if len(self._threads) < self._count:
            thread = threading.Thread(target=self._work, daemon=True)
            self._threads.append(thread)
            thread.start()
        self._jobs.put((function, arguments))

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if self._error is None:
                    job[0](*job[1])
            except Exception as error:  # noqa: BLE001 - raised in the caller's thread
                self._error = self._error or error
            finally:
                # not held while waiting for the next one: what a call holds may be large
                del job
                self._free.release()

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def end(self, wait: float | None = None) -> None:
        """Waits for the calls under way (for each thread at most `wait` seconds)."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(wait)
        self._threads.clear()

    def drop(self, error: BaseException | None = None) -> None:
        """Gives up: calls that wait are dropped, those under way get a moment to end."""
        self._error = self._error or error or RuntimeError("the caller gave the work up")
        self.end(wait=1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is not None:
            self.drop(error)
        else:
            self.end()
            self.raise_error()


def in_parallel(function: Callable[..., Any], items: Iterable[Any]) -> None:
    """Calls `function(item)` for every item, `connections()` of them at a time; raises the first error."""
    with Threads(connections()) as threads:
        for item in items:
            threads.call(function, item)
