"""Which blocks are replayed: the share that was asked for, the same for any number of processes, each in turn."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zhllama.training.replay import Replay

OWN, SIZE = -1, 3
"""Of the dataset's blocks, what stands in them; and how many tokens a block has."""


class Blocks:
    """Numbered ones: block 7 is [7, 7, 7]."""

    def __init__(self, count: int, learned: int = SIZE) -> None:
        self.count = count
        self.facts = {"blocks": count, "learned": learned * count}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


def collate(blocks: Any) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([[block] * SIZE for block in blocks])}


def replay(share: float, count: int = 10, own: int = SIZE, learned: int = SIZE, seed: int = 42) -> Replay:
    given: Any = Blocks(count, learned), Blocks(5, own)
    return Replay(*given, collate, seed, share)


def steps(made: list[Replay], turns: int, size: int, count: int) -> list[list[int]]:
    """What stands in the places of each step, one rank's `made` each, in their order over all."""
    found = []
    for _ in range(count):
        parts = []
        for rank, one in enumerate(made):
            batches = [collate([OWN] * size) for _ in range(turns)]
            one.mix(batches, rank, len(made))
            parts.append([batch["input_ids"][:, 0].tolist() for batch in batches])
        found.append([block for turn in zip(*parts, strict=True) for batch in turn for block in batch])
    return found


def test_a_tenth_of_the_blocks_is_replayed_each_before_any_comes_again():
    blocks = [block for step in steps([replay(0.1, count=6)], 1, 8, 15) for block in step if block != OWN]
    assert len(blocks) == 12
    assert sorted(blocks[:6]) == sorted(blocks[6:]) == list(range(6))
    assert blocks[:6] != blocks[6:]


@given(st.floats(0, 0.99), st.integers(1, 4), st.integers(1, 4), st.integers(1, 20))
def test_the_share_holds_at_every_step(share, turns, size, count):
    taken = sum(block != OWN for step in steps([replay(share)], turns, size, count) for block in step)
    assert abs(taken - share * turns * size * count) <= 1 + 1e-6


@given(st.floats(0.01, 0.9), st.sampled_from([(4, 1, 2), (2, 2, 2), (1, 4, 2), (1, 2, 4), (2, 1, 4), (1, 8, 1)]))
def test_processes_and_accumulation_share_one_batch_as_they_like(share, split):
    world, turns, size = split
    assert steps([replay(share) for _ in range(world)], turns, size, 5) == steps([replay(share)], 1, 8, 5)


def test_the_share_is_of_the_tokens_that_are_learned():
    """Items of whose blocks a quarter is learned: one block of text among them is worth four."""
    found = replay(0.2, own=25, learned=100)
    assert found.of_blocks == pytest.approx(1 / 17)
    assert replay(0.2).of_blocks == pytest.approx(0.2)


def test_another_seed_gives_another_order():
    one, other = (steps([replay(0.5, seed=seed)], 1, 8, 3) for seed in (1, 2))
    assert one != other


@given(st.integers(0, 5), st.floats(0.01, 0.6), st.floats(0.01, 0.6))
def test_one_that_goes_on_from_a_checkpoint_takes_the_same(at, share, later):
    def course(interrupted: bool) -> list[list[int]]:
        made, found = replay(share), []
        for step in range(6):
            if step == at:
                made.share = later
                if interrupted:
                    state, made = made.state(), replay(share)
                    made.restore(state)
            found += steps([made], 2, 3, 1)
        return found

    assert course(True) == course(False)
