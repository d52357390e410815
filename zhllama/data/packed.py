"""The packed dataset: blocks of token ids, all of one length, and where the documents in each block lie.

Two bytes a token while the vocabulary fits 16 bits (four beyond that), against 36 for the same text tokenised into
Arrow lists. A block is found by arithmetic, so one is read by range from S3 or memory-mapped from a folder; nothing is
decoded. A shard is at most 1 GB and is three files, little-endian:

    train-00000.bin            blocks × block_size ids, u16 or u32
    train-00000.offsets.bin    u32 × (blocks + 1): block i has the segments offsets[i] to offsets[i + 1]
    train-00000.segments.bin   of each segment, where it ends in its block, and, where there are prompts, from where it
                               is learned: (end) or (loss_start, end), u16, or u32 for longer blocks

A segment is a document or a piece of one; it begins where the one before it ends. Attention and positions need not
cross its borders. Its tokens from `loss_start` to `end` are predicted; the first one never is, since nothing of its
document stands before it. What follows the last segment of a block is padding. For reviews of 51 tokens on average
that is 2.04 bytes a token. Splits: `train`, and `validation` unless nothing was held out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Self

from zhllama.tokenizer.spans import spans

if TYPE_CHECKING:
    import numpy as np

KIND = "packed-dataset"
TRAIN = "train"
VALIDATION = "validation"
HELD_OUT_TEXT = "held-out.jsonl"
HELD_OUT_INSTRUCTIONS = "held-out.json"
"""The validation documents as they were, for `evaluate`: `{"text"}` lines, or an Alpaca list."""


@dataclass(frozen=True)
class Segments:
    """Many segments (documents, or pieces of them) in three arrays: a tenth of the work on one after another."""

    ids: "np.ndarray"
    """[tokens]: the ids of all, one segment after another."""
    lengths: "np.ndarray"
    """int64 [segments]: how many ids each has."""
    prompts: "np.ndarray"
    """int64 [segments]: how many of these are prompt."""

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The segments of all parts, at least one, in order."""
        import numpy as np

        if len(parts) == 1:
            return parts[0]
        return cls(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.lengths for part in parts]),
            np.concatenate([part.prompts for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def part(self, begin: int, end: int) -> Self:
        """The segments from `begin` to `end`, as views."""
        lengths = self.lengths[begin:end]
        first = int(self.lengths[:begin].sum())
        return type(self)(self.ids[first : first + int(lengths.sum())], lengths, self.prompts[begin:end])

    def where(self, kept: "np.ndarray") -> Self:
        """The segments for which `kept` is true."""
        import numpy as np

        return type(self)(self.ids[np.repeat(kept, self.lengths)], self.lengths[kept], self.prompts[kept])

    def take(self, chosen: "np.ndarray") -> Self:
        """The segments of these numbers, in this order."""
        lengths = self.lengths[chosen]
        starts = self.lengths.cumsum() - self.lengths
        return type(self)(self.ids[spans(starts[chosen], lengths)], lengths, self.prompts[chosen])


class Blocks(NamedTuple):
    """Blocks one after another: the first holds the first `counts[0]` of the segments, and so on."""

    segments: Segments
    counts: "np.ndarray"
    """int64 [blocks]: how many segments each has."""


def token_type(vocabulary_size: int) -> str:
    """numpy's name of the ids' type in a file: `<u2` up to 65,536 pieces, else `<u4`."""
    return "<u2" if vocabulary_size <= 2**16 else "<u4"


def place_type(block_size: int) -> str:
    return "<u2" if block_size < 2**16 else "<u4"


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}"
