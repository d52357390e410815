"""Reading ahead: the same items in the same order, errors where they belong, and no thread left behind."""

import threading
from contextlib import closing

import pytest

from components.shared.ahead import ahead


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "ahead"]


def test_items_come_in_order():
    assert list(ahead(range(1000))) == list(range(1000))
    assert threads() == []


def test_what_making_an_item_raises_comes_after_the_items_before_it():
    def items():
        yield 1
        raise ValueError("the second one")

    given = ahead(items())
    assert next(given) == 1
    with pytest.raises(ValueError, match="the second one"):
        next(given)


def test_the_thread_ends_with_a_consumer_that_leaves_early():
    made = []

    def items():
        for number in range(10_000):
            made.append(number)
            yield number

    with closing(ahead(items())) as given:
        assert next(given) == 0
    assert threads() == []
    assert len(made) <= 4
