"""Reading ahead: the same items in the same order, errors where they belong, and no thread left behind."""

import threading
from contextlib import closing

import pytest

from zhllama.storage.prefetch import map_ordered, prefetch


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_items_come_in_order():
    assert list(prefetch(range(1000))) == list(range(1000))
    assert threads() == []


def test_what_making_an_item_raises_comes_after_the_items_before_it():
    def items():
        yield 1
        raise ValueError("the second one")

    given = prefetch(items())
    assert next(given) == 1
    with pytest.raises(ValueError, match="the second one"):
        next(given)


def test_the_thread_ends_with_a_consumer_that_leaves_early():
    made = []

    def items():
        for number in range(10_000):
            made.append(number)
            yield number

    with closing(prefetch(items())) as given:
        assert next(given) == 0
    assert threads() == []
    assert len(made) <= 4


def test_results_come_in_the_order_of_their_items_whichever_is_ready_first():
    second_is_done = threading.Event()

    def work(number: int) -> int:
        if number == 1:
            second_is_done.set()
        if number == 0:
            assert second_is_done.wait(60)
        return -number

    assert list(map_ordered(work, range(100), 2)) == [-number for number in range(100)]


def test_what_an_item_raises_comes_in_its_place():
    def work(number: int) -> int:
        if number == 3:
            raise ValueError("the third")
        return number

    given = map_ordered(work, range(10), 2)
    assert [next(given) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="the third"):
        next(given)


def test_no_more_is_taken_than_works_side_by_side_and_one_more():
    taken = []

    def items():
        for number in range(100):
            taken.append(number)
            yield number

    with closing(map_ordered(lambda number: number, items(), 2)) as given:
        next(given)
        assert len(taken) == 4
