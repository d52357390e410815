"""Weights hold at every point, and a content is always on the same side."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.prepare_dataset import mixture
from components.prepare_dataset.examples import Examples
from components.prepare_dataset.mixture import Source, held_out, mixed
from zhllama.data.packed import Segments


def source(name, sizes, weight, batch=7):
    """A source of examples of these sizes, in batches; the i-th one is called by its source's name and i."""
    sizes = np.array(sizes, np.int64)
    numbers = np.arange(len(sizes))
    return Source(
        (
            Examples(
                Segments(np.zeros(some.sum()), some, np.zeros_like(some)),
                [b""] * len(some),
                [f"{name}{number}" for number in numbers[at : at + batch]],
                some.tolist(),
            )
            for at in range(0, len(sizes), batch)
            if len(some := sizes[at : at + batch])
        ),
        weight,
    )


def contents(batches):
    return [content for batch in batches for content in batch.contents]


def one_by_one(streams):
    """The rule: always the next one of the source that has given the fewest tokens for its weight; the first of several
    such; until one has no more. `streams`: name → (sizes, weight)."""
    taken, tokens, found = dict.fromkeys(streams, 0), dict.fromkeys(streams, 0), []
    while True:
        name = min(streams, key=lambda name: tokens[name] / streams[name][1])
        sizes, _ = streams[name]
        if taken[name] == len(sizes):
            return found, taken, tokens
        found.append(f"{name}{taken[name]}")
        tokens[name] += sizes[taken[name]]
        taken[name] += 1


streams = st.lists(
    st.tuples(st.lists(st.integers(1, 5), max_size=40), st.sampled_from([0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 2.0])),
    min_size=1,
    max_size=4,
)


@settings(max_examples=200, deadline=None)
@given(given=streams, batch=st.integers(1, 9), together=st.integers(1, 30))
def test_the_mixture_is_that_of_the_rule_however_the_examples_come(given, batch, together):
    named = dict(zip("abcd", given, strict=False))
    sources = [source(name, sizes, weight, batch) for name, (sizes, weight) in named.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture, "TOGETHER", together)
        found = contents(mixed(sources))
    wanted, taken, tokens = one_by_one(named)
    assert found == wanted
    assert [one.taken for one in sources] == list(taken.values())
    assert [one.tokens for one in sources] == list(tokens.values())
    assert sum(one.used_up for one in sources) == 1


@pytest.mark.slow
@settings(deadline=None)
@given(weight=st.floats(0.1, 0.9), sizes=st.lists(st.integers(1, 20), min_size=200, max_size=400))
def test_tokens_stand_in_the_ratio_of_the_weights(weight, sizes):
    sizes = {"a": sizes, "b": sizes[::-1]}
    sources = [source("a", sizes["a"], weight), source("b", sizes["b"], 1 - weight)]
    tokens = {"a": 0, "b": 0}
    for content in islice(contents(mixed(sources)), 150):
        tokens[content[0]] += sizes[content[0]][int(content[1:])]
        # never more than one document ahead of the ratio
        assert abs(tokens["a"] * (1 - weight) - tokens["b"] * weight) <= 20


def test_the_mixture_ends_with_the_first_source_that_is_used_up():
    sources = [source("a", [10] * 100, 0.9), source("b", [10] * 100, 0.1)]
    taken = [content[0] for content in contents(mixed(sources))]
    assert taken.count("a") == 100
    assert taken.count("b") == pytest.approx(11, abs=1)
    assert [one.used_up for one in sources] == [True, False]


def test_unweighted_sources_are_read_whole_one_after_another():
    sources = [source("a", [5, 6], None), source("b", [7], None), source("c", [], None)]
    assert contents(mixed(sources)) == ["a0", "a1", "b0"]
    assert all(one.used_up for one in sources)


def named(count):
    return [str(number).encode() for number in range(count)]


def test_the_share_held_out_is_the_one_asked_for():
    assert held_out(named(20_000), 0.1, 20).sum() == pytest.approx(2000, rel=0.07)


def test_a_content_is_on_its_side_alone_as_among_others():
    together = held_out(named(500), 0.1, 20)
    assert together.tolist() == [bool(held_out([one], 0.1, 20)[0]) for one in named(500)]
    assert held_out([], 0.1, 20).tolist() == []
    # this side of the split is for good: data that was prepared before would mix with data prepared after
    assert np.flatnonzero(held_out(named(60), 0.1, 20)).tolist() == [9, 11, 23, 28, 38, 49, 54]


def test_a_larger_share_holds_out_what_a_smaller_one_does():
    small, large = (set(np.flatnonzero(held_out(named(2000), share, 20))) for share in (0.05, 0.2))
    assert small < large
    assert set(np.flatnonzero(held_out(named(2000), 0.05, 21))) != small


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, False), (1.0, True)])
def test_nothing_and_everything(fraction, expected):
    assert (held_out(named(100), fraction, 1) == expected).all()
