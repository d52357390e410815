"""Batches of packed blocks, as the model takes them.

The dataset's labels stand at the tokens' own places; here they move one to the left, to the place that predicts them.
A segment's first token has no label, so nothing is predicted across a border.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from components.shared.artifact import Artifact
from components.shared.packed import IGNORED, TRAIN, VALIDATION, PackedDataset

if TYPE_CHECKING:
    Block = dict[str, np.ndarray]


def open_splits(dataset: Artifact) -> tuple[PackedDataset, PackedDataset | None]:
    """The training blocks, and those held out, if there are any."""
    held_out = VALIDATION in dataset.manifest.facts["splits"]
    return PackedDataset(dataset, TRAIN), PackedDataset(dataset, VALIDATION) if held_out else None


def collate(blocks: Sequence["Block"]) -> dict[str, torch.Tensor]:
    """input_ids, position_ids and labels, each [batch, block]; labels[i, t] is the token that follows t, or -100."""
    batch = {name: torch.from_numpy(np.stack([block[name] for block in blocks])) for name in blocks[0]}
    labels = torch.full_like(batch["labels"], IGNORED)
    labels[:, :-1] = batch["labels"][:, 1:]
    return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "labels": labels}
