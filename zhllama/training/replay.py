"""Text that must not be lost, mixed into a training: some blocks of each step's batch are a replay dataset's.

They take the place of blocks of the dataset, so that a step costs what it did. How many, follows from the share of
the *learned* tokens that is to be replayed: of instructions a fifth of a block may be learned, of text all of it. What
does not come out even is carried over. Which ones, follows from the seed and from how many were taken before, and where
they stand from their number alone; so one process or many, however the batch is split among them, train on the same.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import Subset

from zhllama.artifacts.reader import Artifact
from zhllama.data.corpus import read_documents
from zhllama.data.packed import HELD_OUT_TEXT, TRAIN, VALIDATION, PackedDataset

Batch = dict[str, torch.Tensor]
MEASURED = 32_768
"""Held-out tokens that are measured, about, at most: it is done again and again, and steers by their mean."""


class Blocks(Protocol):
    """Of a packed dataset, or some of them."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Replayed:
    """What a training replays."""

    blocks: PackedDataset
    held_out: Blocks | None
    bytes_per_label: float
    """Of the held-out documents, in UTF-8; 0 where they are no text, or are not kept beside their blocks."""
    base_loss: float | None
    """What an earlier training counts its budget from."""

    @classmethod
    def of(cls, dataset: Artifact, base_loss: float | None) -> "Replayed":
        held_out: Any = None
        size = 0.0
        if VALIDATION in dataset.manifest.facts["splits"]:
            whole: Any = PackedDataset(dataset, VALIDATION, "--replay")
            # from all over it: the longest documents are packed first
            most = max(1, MEASURED // whole.block_size)
            held_out = Subset(whole, range(0, len(whole), -(-len(whole) // most)))
            if HELD_OUT_TEXT in dataset:
                size = sum(len(text.encode()) for text in read_documents(dataset)) / whole.facts["learned"]
        return cls(PackedDataset(dataset, TRAIN, "--replay"), held_out, size, base_loss)


class Replay:
    """`collate`: blocks → a batch, as the training has it. `share`: of the learned tokens, may be changed between two
    steps."""

    def __init__(
        self, replayed: PackedDataset, dataset: PackedDataset, collate: Callable[..., Batch], seed: int, share: float
    ) -> None:
        self._blocks, self._collate, self._seed = replayed, collate, seed
        self._learned = [one.facts["learned"] / one.facts["blocks"] for one in (dataset, replayed)]
        self.share = share
        self._taken = 0
        self._owed = 0.0
        """Of a block, what earlier steps have not taken."""
        self._order: tuple[int, list[int]] = (-1, [])

    def state(self) -> dict[str, Any]:
        """For a checkpoint: as JSON."""
        return {"taken": self._taken, "owed": self._owed, "share": self.share}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._taken, self._owed, self.share = state["taken"], state["owed"], state["share"]

    @property
    def of_blocks(self) -> float:
        """What of a step's blocks is to be replayed for the share of the learned tokens."""
        own, replayed = self._learned
        return self.share * own / (self.share * own + (1 - self.share) * replayed)

    def mix(self, batches: Sequence[Batch], rank: int, world: int) -> None:
        """Puts replayed blocks into this process's batches of a step. All processes call it for each step, with as many
        batches of as many blocks."""
        if not batches:
            return
        size = max(len(batch["input_ids"]) for batch in batches)
        places = len(batches) * world * size
        due = self._owed + self.of_blocks * places
        count = min(math.floor(due), places)
        self._owed = due - count
        for turn, batch in enumerate(batches):
            first = (turn * world + rank) * size
            rows, blocks = [], []
            for row in range(len(batch["input_ids"])):
                # the replayed ones lie evenly among the places of the step, numbered over all processes
                before, after = (at * count // places for at in (first + row, first + row + 1))
                if after > before:
                    rows.append(row)
                    blocks.append(self._blocks[self._number(self._taken + before)])
            if rows:
                for name, tensor in self._collate(blocks).items():
                    batch[name][rows] = tensor.to(batch[name].device)
        self._taken += count

    def _number(self, taken: int) -> int:
        """The block that is taken after so many others: all of them in one order, then in another."""
        turn, at = divmod(taken, len(self._blocks))
        if self._order[0] != turn:
            chance = torch.Generator().manual_seed(self._seed * 1_000_003 + turn)
            self._order = turn, torch.randperm(len(self._blocks), generator=chance).tolist()
        return self._order[1][at]
