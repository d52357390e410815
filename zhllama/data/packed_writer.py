"""Packed datasets are written: blocks, as arrays of segments, into shards (the format: packed.py)."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

from zhllama.artifacts.writer import ArtifactWriter, FileStream
from zhllama.data.packed import Blocks, Segments, place_type, shard_name, token_type

if TYPE_CHECKING:
    import numpy as np

MAX_SHARD = 10**9
_AT_ONCE = 2**20
"""Bytes of blocks that are laid out together."""


class PackedWriter:
    """Writes one split: `with PackedWriter(out, TRAIN, 512, encoder.size, pad) as split: split.write_blocks(…)`.

    Memory: 1 MB of blocks beyond those it is given, however much is written.
    """

    def __init__(
        self,
        out: ArtifactWriter,
        split: str,
        block_size: int,
        vocabulary_size: int,
        pad_id: int,
        max_shard: int = MAX_SHARD,
        prompts: bool = True,
    ) -> None:
        """`prompts`: whether any segment has one; else two bytes a segment are saved."""
        self._out = out
        self._columns = 2 if prompts else 1
        self.split = split
        self._block_size = block_size
        self._pad_id = pad_id
        self._type = token_type(vocabulary_size)
        block_bytes = block_size * int(self._type[-1])
        self._per_shard = max(1, max_shard // block_bytes)
        self._at_once = max(1, _AT_ONCE // block_bytes)
        self._shard = ExitStack()
        self._streams: list[FileStream] = []
        """Of the shard in the making: ids, offsets, segments."""
        self._segments_before = 0
        """Segments of the shard that are written already."""
        self.shards: list[int] = []
        """Blocks in each shard."""
        self.segments = 0
        self.tokens = 0
        self.loss_tokens = 0

    @property
    def blocks(self) -> int:
        return sum(self.shards)

    @property
    def packing_efficiency(self) -> float:
        """The share of the blocks' places that hold tokens, 0 to 1, to five digits."""
        return round(self.tokens / (self.blocks * self._block_size), 5) if self.shards else 0.0

    def facts(self) -> dict[str, Any]:
        """What the reader needs to know of this split, and its figures."""
        return {
            "shards": self.shards,
            "blocks": self.blocks,
            "segments": self.segments,
            "columns": self._columns,
            "tokens": self.tokens,
            "learned": self.loss_tokens,
            "fill": self.packing_efficiency,
        }

    def write_blocks(self, blocks: Blocks) -> None:
        """ValueError (a bug) for segments that are empty, too long for their block, or have a prompt and should not."""
        segments, counts = blocks
        begin = first = 0
        while begin < len(counts):
            if not self._streams:
                self._begin_shard()
            end = begin + min(self._at_once, self._per_shard - self.shards[-1], len(counts) - begin)
            last = first + int(counts[begin:end].sum())
            self._write(segments.part(first, last), counts[begin:end])
            if self.shards[-1] == self._per_shard:
                self._end_shard()
            begin, first = end, last

    def _write(self, segments: Segments, counts: "np.ndarray") -> None:
        """Blocks that go into the shard in the making."""
        import numpy as np

        if counts.min() < 1:
            raise ValueError("a block without a segment")
        last_ones = counts.cumsum() - 1
        ends = segments.lengths.cumsum()
        used = np.diff(ends[last_ones], prepend=0)
        if segments.lengths.min() < 1 or used.max() > self._block_size:
            raise ValueError(f"an empty segment, or segments of {used.max()} tokens in a block of {self._block_size}")
        prompts = np.minimum(segments.prompts, segments.lengths)
        if self._columns == 1 and prompts.max() > 1:
            raise ValueError(f"a prompt of {prompts.max()} tokens in a split that was to have none")

        blocks = np.full((len(counts), self._block_size), self._pad_id, self._type)
        blocks[np.arange(self._block_size) < used[:, None]] = segments.ids
        ends -= np.repeat(ends[last_ones] - used, counts)
        # a segment's first token is never predicted
        loss_start = ends - segments.lengths + np.maximum(prompts, 1)
        places = np.stack([loss_start, ends], axis=1) if self._columns == 2 else ends
        ids, offsets, marks = self._streams
        ids.write(blocks.tobytes())
        offsets.write((self._segments_before + last_ones + 1).astype("<u4").tobytes())
        marks.write(places.astype(place_type(self._block_size)).tobytes())

        self._segments_before += len(segments)
        self.shards[-1] += len(counts)
        self.segments += len(segments)
        self.tokens += int(used.sum())
        self.loss_tokens += int((ends - loss_start).sum())

    def _begin_shard(self) -> None:
        name = shard_name(self.split, len(self.shards))
        for kind in ("bin", "offsets.bin", "segments.bin"):
            self._streams.append(self._shard.enter_context(self._out.writer(f"{name}.{kind}")))
        self._streams[1].write(bytes(4))
        self.shards.append(0)
        self._segments_before = 0

    def _end_shard(self) -> None:
        if self._streams:
            self._shard.close()
            self._streams = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: Any) -> None:
        self._shard.__exit__(*failure)


def packed_facts(block_size: int, vocabulary_size: int, pad_id: int, splits: Sequence[PackedWriter]) -> dict[str, Any]:
    """The manifest's facts that make a packed dataset readable. Splits that got no block are left out."""
    return {
        "block_size": block_size,
        "token_type": token_type(vocabulary_size),
        "pad_id": pad_id,
        "splits": {split.split: split.facts() for split in splits if split.shards},
    }
