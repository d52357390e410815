"""Reading ahead: the next item is made in a thread while this one is worked on. Two at a time, so memory is bounded."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Ended:
    pass


def prefetch(items: Iterable[Item], depth: int = 1) -> Generator[Item, None, None]:
    """The items in order; at most `depth` are ready and one more is being made. What making one raises, is raised here.

    A generator: close it (`contextlib.closing`) when it may be left before its end, so that its thread ends too.
    """
    ready: queue.Queue[Item | _Ended | Exception] = queue.Queue(depth)
    left = threading.Event()

    def put(value: Item | _Ended | Exception) -> bool:
        while not left.is_set():
            try:
                ready.put(value, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(_Ended())
        except Exception as error:  # noqa: BLE001 - raised again in the consumer's thread
            put(error)

    thread = threading.Thread(target=make, name="prefetch", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _Ended):
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        left.set()
        thread.join()


def map_ordered(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Generator[Result, None, None]:
    """`function(item)` of every item, `threads` of them side by side; results, and errors, in the items' order.

    At most `threads` + 1 items are taken beyond the last result. Close it when it may be left before its end.
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > threads + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for late in waiting:
                late.cancel()
