"""Batches of packed blocks, as the model takes them.

The dataset's labels stand at the tokens' own places; here they move one to the left, to the place that predicts them.
A segment's first token has no label, so nothing is predicted across a border.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from zhllama.artifacts.reader import Artifact
from zhllama.data.packed import TRAIN, VALIDATION
from zhllama.data.packed_reader import IGNORED, PackedDataset

if TYPE_CHECKING:
    Block = dict[str, np.ndarray]


def open_splits(dataset: Artifact) -> tuple[PackedDataset, PackedDataset | None]:
    """The training blocks, and those held out, if there are any."""
    held_out = VALIDATION in dataset.manifest.facts["splits"]
    return PackedDataset(dataset, TRAIN), PackedDataset(dataset, VALIDATION) if held_out else None


class Collate:
    """Blocks → input_ids, position_ids and labels, each [batch, block]; labels[i, t] is the token after t, or -100.

    faithful: as the recipe does it. Padding is cut to the longest of the batch, and positions run on to the block's
    end, so that nothing in it is kept apart.
    """

    def __init__(self, faithful: bool = False) -> None:
        self._faithful = faithful

    def __call__(self, blocks: Sequence["Block"]) -> dict[str, torch.Tensor]:
        batch = {name: torch.from_numpy(np.stack([block[name] for block in blocks])) for name in blocks[0]}
        labels = torch.full_like(batch["labels"], IGNORED)
        labels[:, :-1] = batch["labels"][:, 1:]
        found = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "labels": labels}
        if self._faithful:
            # a sample's last token is always learned, and has no label after the move
            length = int((batch["labels"] != IGNORED).any(dim=0).nonzero().max()) + 1
            found["position_ids"] = torch.arange(labels.shape[1]).expand_as(labels)
            found = {name: tensor[:, :length] for name, tensor in found.items()}
        return found


collate = Collate()
"""Blocks of documents that are kept apart."""
