"""Packing loses nothing, cuts nothing that fits, and fills the blocks."""

from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.prepare_dataset import best_fit
from components.prepare_dataset.best_fit import BestFit, cut
from tests.packed_data import Segment, in_arrays

BLOCK = 32
lengths = st.lists(st.integers(1, BLOCK), min_size=1, max_size=80)


def segments_of(sizes):
    """Segments of these lengths that can be told apart: each token of the i-th is i."""
    return [Segment(np.full(size, index), min(index % 3, size)) for index, size in enumerate(sizes)]


def listed(segments):
    """Many segments as a list of single ones."""
    ends = segments.lengths.cumsum()
    return [
        Segment(segments.ids[end - length : end], int(prompt))
        for end, length, prompt in zip(ends, segments.lengths, segments.prompts, strict=True)
    ]


def listed_blocks(blocks):
    """Blocks as lists of their segments."""
    found = iter(listed(blocks.segments))
    return [[next(found) for _ in range(count)] for count in blocks.counts]


@contextmanager
def limits(window=best_fit.WINDOW, open_blocks=best_fit.OPEN_BLOCKS, tokens=best_fit.WINDOW_TOKENS):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(best_fit, "WINDOW", window)
        patch.setattr(best_fit, "OPEN_BLOCKS", open_blocks)
        patch.setattr(best_fit, "WINDOW_TOKENS", tokens)
        yield


def packed(segments, batch=7, **options):
    packer = BestFit(BLOCK)
    batches = [in_arrays(segments[at : at + batch]) for at in range(0, len(segments), batch)]
    with limits(**options):
        given_out = [blocks for some in batches for blocks in packer.add(some)]
        return [block for blocks in [*given_out, *packer.finish()] for block in listed_blocks(blocks)]


def plain_best_fit(segments, window, open_blocks, tokens):
    """The rule, one segment after another: the longest first, each into the fullest block that still holds it, of
    which the last to have become so full."""
    waiting, blocks, done, taken = [], [], [], 0

    def room(block):
        return BLOCK - sum(len(ids) for ids, _ in block)

    def place():
        by_room = {left: [block for block in blocks if room(block) == left] for left in range(BLOCK + 1)}
        for segment in sorted(waiting, key=lambda segment: -len(segment.ids)):
            left = next((left for left in range(len(segment.ids), BLOCK + 1) if by_room[left]), None)
            block = [] if left is None else by_room[left].pop()
            if left is None:
                blocks.append(block)
            block.append(segment)
            by_room[room(block)].append(block)
        waiting.clear()

    for segment in segments:
        waiting += listed(cut(in_arrays([segment]), BLOCK))
        taken += len(segment.ids)
        if len(waiting) >= window or taken >= tokens:
            place()
            taken = 0
            blocks.sort(key=room)
            count = max(sum(room(block) == 0 for block in blocks), len(blocks) - open_blocks)
            done += blocks[:count]
            del blocks[:count]
    place()
    return done + blocks


def same(one, other):
    return [[(ids.tolist(), prompt) for ids, prompt in block] for block in one] == [
        [(ids.tolist(), prompt) for ids, prompt in block] for block in other
    ]


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4 * BLOCK), min_size=1, max_size=60),
    batch=st.integers(1, 70),
    window=st.integers(1, 90),
    open_blocks=st.integers(0, 5),
    tokens=st.integers(1, 40 * BLOCK),
)
def test_the_blocks_are_those_of_the_rule_however_the_segments_come(sizes, batch, window, open_blocks, tokens):
    segments = segments_of(sizes)
    options = {"window": window, "open_blocks": open_blocks, "tokens": tokens}
    assert same(packed(segments, batch, **options), plain_best_fit(segments, **options))


@settings(max_examples=200, deadline=None)
@given(sizes=lengths, window=st.integers(1, 90), open_blocks=st.integers(0, 5))
def test_every_segment_is_in_one_block_and_no_block_overflows(sizes, window, open_blocks):
    segments = segments_of(sizes)
    blocks = packed(segments, window=window, open_blocks=open_blocks)
    found = Counter((int(ids[0]), len(ids), prompt) for block in blocks for ids, prompt in block)
    assert found == Counter((int(ids[0]), len(ids), prompt) for ids, prompt in segments)
    assert all(0 < sum(len(ids) for ids, _ in block) <= BLOCK for block in blocks)


@settings(max_examples=200, deadline=None)
@given(sizes=lengths)
def test_at_most_one_block_is_half_empty(sizes):
    blocks = packed(segments_of(sizes))
    assert sum(sum(len(ids) for ids, _ in block) <= BLOCK // 2 for block in blocks) <= 1


def test_natural_lengths_fill_over_99_percent():
    sizes = np.clip(np.random.default_rng(7).lognormal(2.0, 0.7, 5000).astype(int), 1, BLOCK)
    blocks = packed(segments_of(sizes.tolist()), window=2000, open_blocks=100)
    assert sizes.sum() / (len(blocks) * BLOCK) > 0.99


def test_memory_is_bounded_by_the_window():
    packer, given_out = BestFit(BLOCK), 0
    with limits(window=10, open_blocks=3):
        for count, segment in enumerate(segments_of([BLOCK // 2 + 1] * 1000), start=1):
            given_out += sum(len(blocks.counts) for blocks in packer.add(in_arrays([segment])))
            assert count - given_out < 10 + 3 + 1


def test_long_segments_make_a_window_shorter():
    packer = BestFit(BLOCK)
    with limits(window=1000, open_blocks=0, tokens=5 * BLOCK):
        given_out = list(packer.add(in_arrays(segments_of([BLOCK] * 9))))
    assert sum(len(blocks.counts) for blocks in given_out) == 5
    assert sum(len(blocks.counts) for blocks in packer.finish()) == 4
    assert list(packer.finish()) == []


def test_the_same_stream_gives_the_same_blocks():
    segments = segments_of(np.random.default_rng(1).integers(1, BLOCK, 500).tolist())
    assert same(packed(segments, window=100), packed(segments, 500, window=100))


@given(length=st.integers(1, 300))
def test_each_token_but_the_first_is_predicted_once(length):
    pieces = listed(cut(in_arrays([Segment(np.arange(length))]), BLOCK))
    assert all(len(ids) <= BLOCK for ids, _ in pieces)
    # a segment's first token is context only
    assert [int(token) for ids, _ in pieces for token in ids[1:]] == list(range(1, length))


@given(length=st.integers(1, BLOCK), prompt=st.integers(0, BLOCK))
def test_what_fits_is_not_cut(length, prompt):
    (only,) = listed(cut(in_arrays([Segment(np.arange(length), prompt)]), BLOCK))
    assert (only.ids.tolist(), only.prompt) == (list(range(length)), prompt)


def test_a_long_document_is_cut_into_blocks_of_its_own():
    blocks = packed([Segment(np.arange(1 + 3 * (BLOCK - 1)))])
    assert [sum(len(ids) for ids, _ in block) for block in blocks] == [BLOCK] * 3
