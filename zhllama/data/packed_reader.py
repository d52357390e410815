"""Packed datasets are read, block by block: memory-mapped, or by range from S3 (the format: packed.py)."""

import bisect
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zhllama.artifacts.cache import materialize
from zhllama.artifacts.reader import Artifact
from zhllama.data.packed import KIND, TRAIN, place_type, shard_name
from zhllama.errors import InputError

if TYPE_CHECKING:
    import numpy as np

IGNORED = -100
"""The label of a token that is not predicted, torch's convention."""


class PackedDataset:
    """One split, readable by index, memory-mapped: a sequence that torch's DataLoader takes as it is.

    The files are fetched whole, once, and verified; with `by_range` nothing is fetched but what is asked for (to look
    at a block of a large dataset in S3).

    An item is a dictionary of int64 arrays of shape [block_size]: `input_ids`; `labels`, -100 over prompts, padding
    and each segment's first token (so that after the model's shift nothing is predicted across a border);
    `position_ids`, which begin at 0 in each segment and again in the padding.
    """

    def __init__(
        self, artifact: Artifact, split: str = TRAIN, option: str = "--dataset", by_range: bool = False
    ) -> None:
        artifact.require_kind(KIND, option=option)
        facts = artifact.manifest.facts
        if "splits" not in facts:
            raise InputError(f"{option} {artifact.root}: not a packed dataset; give what prepare_dataset wrote")
        if split not in facts["splits"]:
            raise InputError(
                f"{option} {artifact.root}: it has no {split} split; prepare it with --validation-fraction or "
                "--validation"
            )
        self.split = split
        self.block_size: int = facts["block_size"]
        self.facts: dict[str, Any] = facts["splits"][split]
        if "columns" not in self.facts:
            raise InputError(
                f"{option} {artifact.root}: an older version of zhllama wrote it; run prepare_dataset again"
            )
        self._columns: int = self.facts["columns"]
        self._token_type: str = facts["token_type"]
        self._ends = list(itertools.accumulate(self.facts["shards"]))
        self._source: Path | Artifact = artifact if by_range else materialize(artifact)
        self._open: dict[str, Any] = {}

    def __len__(self) -> int:
        return self._ends[-1]

    def __getstate__(self) -> dict[str, Any]:
        # a memory map would be pickled whole; a DataLoader's worker opens its own
        return {**self.__dict__, "_open": {}}

    def _numbers(self, name: str, kind: str, begin: int, end: int) -> "np.ndarray":
        """Some of the numbers of a file; those that are read by range are verified."""
        import numpy as np

        if isinstance(self._source, Artifact):
            width = np.dtype(kind).itemsize
            return np.frombuffer(self._source.read_range(name, begin * width, (end - begin) * width), kind)
        if name not in self._open:
            self._open[name] = np.memmap(self._source / name, dtype=kind, mode="r")
        some: np.ndarray = self._open[name][begin:end]
        return some

    def _locate(self, index: int) -> tuple[str, int]:
        """The shard of a block and the block's number in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        return shard_name(self.split, number), index - (self._ends[number - 1] if number else 0)

    def tokens(self, index: int) -> "np.ndarray":
        """The ids of a block as they are stored, [block_size]."""
        name, at = self._locate(index)
        return self._numbers(f"{name}.bin", self._token_type, at * self.block_size, (at + 1) * self.block_size)

    def segments(self, index: int) -> "np.ndarray":
        """The places of a block's segments: int64 [segments, 3], columns start, loss_start, end."""
        import numpy as np

        name, at = self._locate(index)
        first, end = (self._columns * self._numbers(f"{name}.offsets.bin", "<u4", at, at + 2).astype("int64")).tolist()
        places = self._numbers(f"{name}.segments.bin", place_type(self.block_size), first, end)
        rows = places.astype("int64").reshape(-1, self._columns)
        ends = rows[:, -1]
        found = np.zeros((len(rows), 3), np.int64)
        found[1:, 0] = ends[:-1]
        found[:, 1] = rows[:, 0] if self._columns == 2 else found[:, 0] + 1
        found[:, 2] = ends
        return found

    def __getitem__(self, index: int) -> dict[str, "np.ndarray"]:
        import numpy as np

        if index < 0:
            index += len(self)
        input_ids = self.tokens(index).astype(np.int64)
        labels = np.full(self.block_size, IGNORED, np.int64)
        position_ids = np.arange(self.block_size, dtype=np.int64)
        end = 0
        for start, loss_start, end in self.segments(index).tolist():
            labels[loss_start:end] = input_ids[loss_start:end]
            position_ids[start:end] -= start
        position_ids[end:] -= end
        return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
