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
        self.pad_id: int = facts["pad_id"]
        self.vocabulary = artifact.manifest.vocabulary
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

    def _map(self, name: str, kind: str) -> Any:
        """The numbers of a file, to be sliced."""
        import numpy as np

        if name not in self._open:
            if isinstance(self._source, Artifact):
                self._open[name] = _Ranges(self._source, name, kind)
            else:
                self._open[name] = np.memmap(self._source / name, dtype=kind, mode="r")
        return self._open[name]

    def _locate(self, index: int) -> tuple[str, int]:
        """The shard of a block and the block's number in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        return shard_name(self.split, number), index - (self._ends[number - 1] if number else 0)

    def tokens(self, index: int) -> "np.ndarray":
        """The ids of a block as they are stored, [block_size]."""
        name, at = self._locate(index)
        ids: np.ndarray = self._map(f"{name}.bin", self._token_type)[at * self.block_size : (at + 1) * self.block_size]
        return ids

    def segments(self, index: int) -> "np.ndarray":
        """The places of a block's segments: int64 [segments, 3], columns start, loss_start, end."""
        import numpy as np

        name, at = self._locate(index)
        first, end = self._map(f"{name}.offsets.bin", "<u4")[at : at + 2].tolist()
        places = self._map(f"{name}.segments.bin", place_type(self.block_size))
        rows = places[self._columns * first : self._columns * end].astype("int64").reshape(-1, self._columns)
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


class _Ranges:
    """The numbers of an artifact's file, read (and verified) slice by slice."""

    def __init__(self, artifact: Artifact, name: str, kind: str) -> None:
        self._artifact = artifact
        self._name = name
        self._kind = kind

    def __getitem__(self, chosen: slice) -> "np.ndarray":
        import numpy as np

        width = np.dtype(self._kind).itemsize
        content = self._artifact.read_range(self._name, chosen.start * width, (chosen.stop - chosen.start) * width)
        return np.frombuffer(content, self._kind)
