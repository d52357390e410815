"""Reading ahead: items are made in threads while earlier ones are worked on; a few at a time, so memory is bounded."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import repeat
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(items: Iterable[Item]) -> Generator[Item, None, None]:
    """The items in order; one is ready and one more is being made. What making one raises, is raised here. A generator:
    close it (`contextlib.closing`) when it may be left before its end, so that its thread ends too."""
    source, ended = iter(items), object()
    made: Generator[Any, None, None] = map_ordered(lambda _: next(source, ended), repeat(None), 1)
    with closing(made):
        for item in made:
            if item is ended:
                return
            yield item


def map_ordered(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int = 1
) -> Generator[Result, None, None]:
    """`function(item)` of every item, `threads` of them side by side; results, and errors, in the items' order. At most
    `threads` + `ahead` items are taken beyond the last result. Close it when it may be left before its end."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, "prefetch") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > threads + ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for late in waiting:
                late.cancel()
