"""Weights hold at every point, and a content is always on the same side."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.prepare_dataset.examples import Example
from components.prepare_dataset.mixture import Source, is_held_out, mixed
from components.shared.packed import Segment


def source(name, sizes, weight):
    return Source(iter([Example(Segment(np.zeros(size)), b"", list, name, name, size) for size in sizes]), weight)


@settings(deadline=None)
@given(weight=st.floats(0.1, 0.9), sizes=st.lists(st.integers(1, 20), min_size=200, max_size=400))
def test_tokens_stand_in_the_ratio_of_the_weights(weight, sizes):
    sources = [source("a", sizes, weight), source("b", sizes[::-1], 1 - weight)]
    for _ in islice(mixed(sources), 150):
        taken = [one.tokens for one in sources]
        # never more than one document ahead of the ratio
        assert abs(taken[0] * (1 - weight) - taken[1] * weight) <= 20


def test_the_mixture_ends_with_the_first_source_that_is_used_up():
    sources = [source("a", [10] * 100, 0.9), source("b", [10] * 100, 0.1)]
    taken = [example.text for example in mixed(sources)]
    assert taken.count("a") == 100
    assert taken.count("b") == pytest.approx(11, abs=1)
    assert [one.used_up for one in sources] == [True, False]


def test_unweighted_sources_are_read_whole_one_after_another():
    sources = [source("a", [5, 6], 1), source("b", [7], 1), source("c", [], 1)]
    assert [example.text for example in mixed(sources)] == ["a", "a", "b"]
    assert all(one.used_up for one in sources)


def test_the_share_held_out_is_the_one_asked_for():
    held = sum(is_held_out(str(number).encode(), 0.1, 20) for number in range(20_000))
    assert held == pytest.approx(2000, rel=0.07)


def test_a_larger_share_holds_out_what_a_smaller_one_does():
    texts = [str(number).encode() for number in range(2000)]
    small, large = ({text for text in texts if is_held_out(text, share, 20)} for share in (0.05, 0.2))
    assert small < large
    assert {text for text in texts if is_held_out(text, 0.05, 21)} != small


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, False), (1.0, True)])
def test_nothing_and_everything(fraction, expected):
    assert all(is_held_out(str(number).encode(), fraction, 1) is expected for number in range(100))
