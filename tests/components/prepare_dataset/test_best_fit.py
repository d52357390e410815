"""Packing loses nothing, cuts nothing that fits, and fills the blocks."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from components.prepare_dataset.best_fit import BestFit, cut
from components.shared.packed import Segment

BLOCK = 32
lengths = st.lists(st.integers(1, BLOCK), min_size=1, max_size=80)


def segments_of(sizes):
    """Segments of these lengths that can be told apart: each token of the i-th is i."""
    return [Segment(np.full(size, index), min(index % 3, size)) for index, size in enumerate(sizes)]


def packed(segments, **options):
    packer = BestFit(BLOCK, **options)
    return [block for segment in segments for block in packer.add(segment)] + list(packer.finish())


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
    packer, given_out = BestFit(BLOCK, window=10, open_blocks=3), 0
    for count, segment in enumerate(segments_of([BLOCK // 2 + 1] * 1000), start=1):
        given_out += len(packer.add(segment))
        assert count - given_out < 10 + 3 + 1


def test_long_segments_make_a_window_shorter():
    packer = BestFit(BLOCK, window=1000, open_blocks=0, tokens=5 * BLOCK)
    blocks = [block for segment in segments_of([BLOCK] * 9) for block in packer.add(segment)]
    assert len(blocks) == 5
    assert len(list(packer.finish())) == 4


def test_a_piece_does_not_keep_its_document():
    pieces = cut(Segment(np.arange(10 * BLOCK)), BLOCK)
    assert all(ids.base is None for ids, _ in pieces)


def test_the_same_stream_gives_the_same_blocks():
    sizes = np.random.default_rng(1).integers(1, BLOCK, 500).tolist()
    first, second = (packed(segments_of(sizes), window=100) for _ in range(2))
    assert [[int(ids[0]) for ids, _ in block] for block in first] == [
        [int(ids[0]) for ids, _ in block] for block in second
    ]


@given(length=st.integers(1, 300))
def test_each_token_but_the_first_is_predicted_once(length):
    pieces = cut(Segment(np.arange(length)), BLOCK)
    assert all(len(ids) <= BLOCK for ids, _ in pieces)
    # a segment's first token is context only
    assert [int(token) for ids, _ in pieces for token in ids[1:]] == list(range(1, length))


@given(length=st.integers(1, BLOCK), prompt=st.integers(0, BLOCK))
def test_what_fits_is_not_cut(length, prompt):
    (only,) = cut(Segment(np.arange(length), prompt), BLOCK)
    assert (only.ids.tolist(), only.prompt) == (list(range(length)), prompt)


def test_a_long_document_is_cut_into_blocks_of_its_own():
    blocks = packed([Segment(np.arange(1 + 3 * (BLOCK - 1)))])
    assert [sum(len(ids) for ids, _ in block) for block in blocks] == [BLOCK] * 3
