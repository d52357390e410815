"""The packed dataset: blocks of token ids, all of one length, and where the documents in each block lie.

Two bytes a token while the vocabulary fits 16 bits (four beyond that), against 36 for the same text tokenised into
Arrow lists. A block is found by arithmetic, so one is read by range from S3 or memory-mapped from a folder; nothing is
decoded. A shard is at most 1 GB and is three files, little-endian:

    train-00000.bin            blocks × block_size ids, u16 or u32
    train-00000.offsets.bin    u32 × (blocks + 1): block i has the segments offsets[i] to offsets[i + 1]
    train-00000.segments.bin   of each segment, where it ends in its block, and, where there are prompts, from where it
                               is learned: (end) or (learned_from, end), u16, or u32 for longer blocks

A segment is a document or a piece of one; it begins where the one before it ends. Attention and positions need not
cross its borders. Its tokens from `learned_from` to `end` are predicted; the first one never is, since nothing of its
document stands before it. What follows the last segment of a block is padding. For reviews of 51 tokens on average
that is 2.04 bytes a token. Splits: `train`, and `validation` unless nothing was held out.
"""

import bisect
import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from zhllama.artifacts.cache import materialize
from zhllama.artifacts.reader import Artifact
from zhllama.artifacts.writer import ArtifactWriter, FileStream
from zhllama.errors import InputError

if TYPE_CHECKING:
    import numpy as np

KIND = "packed-dataset"
TRAIN = "train"
VALIDATION = "validation"
HELD_OUT_TEXT = "held-out.jsonl"
HELD_OUT_INSTRUCTIONS = "held-out.json"
"""The validation documents as they were, for `evaluate`: `{"text"}` lines, or an Alpaca list."""

MAX_SHARD = 10**9
IGNORED = -100
"""The label of a token that is not predicted, torch's convention."""
_AT_ONCE = 2**20
"""Bytes of blocks that are laid out together."""


class Segment(NamedTuple):
    """A document, or a piece of one, as it goes into a block: its ids, and how many of them are prompt."""

    ids: "np.ndarray"
    prompt: int = 0


@dataclass(frozen=True)
class Segments:
    """Many segments in three arrays, since work on arrays costs a tenth of work on one segment after another."""

    ids: "np.ndarray"
    """[tokens]: the ids of all, one segment after another."""
    lengths: "np.ndarray"
    """int64 [segments]: how many ids each has."""
    prompts: "np.ndarray"
    """int64 [segments]: how many of these are prompt."""

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> Self:
        """These segments, at least one, in arrays."""
        import numpy as np

        lengths = np.array([len(ids) for ids, _ in segments], np.int64)
        prompts = np.array([prompt for _, prompt in segments], np.int64)
        return cls(np.concatenate([ids for ids, _ in segments]), lengths, prompts)

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

    @classmethod
    def of(cls, blocks: Sequence[Sequence[Segment]]) -> Self:
        """These blocks, of one segment at least, in arrays."""
        import numpy as np

        segments = Segments.of([segment for block in blocks for segment in block])
        return cls(segments, np.array([len(block) for block in blocks], np.int64))


def spans(starts: "np.ndarray", lengths: "np.ndarray") -> "np.ndarray":
    """The numbers from each start on, as many as its length says, one span after another: int64 [sum of lengths]."""
    import numpy as np

    ends = lengths.cumsum()
    numbers = np.arange(ends[-1] if len(ends) else 0)
    numbers += np.repeat(starts - (ends - lengths), lengths)
    return numbers


def token_type(vocabulary_size: int) -> str:
    """numpy's name of the ids' type in a file: `<u2` up to 65,536 pieces, else `<u4`."""
    return "<u2" if vocabulary_size <= 2**16 else "<u4"


def _place_type(block_size: int) -> str:
    return "<u2" if block_size < 2**16 else "<u4"


def _shard(split: str, number: int) -> str:
    return f"{split}-{number:05d}"


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
        self.learned = 0

    @property
    def blocks(self) -> int:
        return sum(self.shards)

    @property
    def fill(self) -> float:
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
            "learned": self.learned,
            "fill": self.fill,
        }

    def write(self, segments: Sequence[Segment]) -> None:
        """One block; see write_blocks."""
        if not segments:
            raise ValueError("a block without a segment")
        self.write_blocks(Blocks.of([segments]))

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
        learned_from = ends - segments.lengths + np.maximum(prompts, 1)
        places = np.stack([learned_from, ends], axis=1) if self._columns == 2 else ends
        ids, offsets, marks = self._streams
        ids.write(blocks.tobytes())
        offsets.write((self._segments_before + last_ones + 1).astype("<u4").tobytes())
        marks.write(places.astype(_place_type(self._block_size)).tobytes())

        self._segments_before += len(segments)
        self.shards[-1] += len(counts)
        self.segments += len(segments)
        self.tokens += int(used.sum())
        self.learned += int((ends - learned_from).sum())

    def _begin_shard(self) -> None:
        name = _shard(self.split, len(self.shards))
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._shard.__exit__(kind, error, trace)
            return
        try:
            self._end_shard()
        except BaseException as fault:
            self._shard.__exit__(type(fault), fault, fault.__traceback__)
            raise


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
        return _shard(self.split, number), index - (self._ends[number - 1] if number else 0)

    def tokens(self, index: int) -> "np.ndarray":
        """The ids of a block as they are stored, [block_size]."""
        name, at = self._locate(index)
        ids: np.ndarray = self._map(f"{name}.bin", self._token_type)[at * self.block_size : (at + 1) * self.block_size]
        return ids

    def segments(self, index: int) -> "np.ndarray":
        """The places of a block's segments: int64 [segments, 3], columns start, learned_from, end."""
        import numpy as np

        name, at = self._locate(index)
        first, end = self._map(f"{name}.offsets.bin", "<u4")[at : at + 2].tolist()
        places = self._map(f"{name}.segments.bin", _place_type(self.block_size))
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
        for start, learned_from, end in self.segments(index).tolist():
            labels[learned_from:end] = input_ids[learned_from:end]
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


def packed_facts(block_size: int, vocabulary_size: int, pad_id: int, splits: Sequence[PackedWriter]) -> dict[str, Any]:
    """The manifest's facts that make a packed dataset readable. Splits that got no block are left out."""
    return {
        "block_size": block_size,
        "token_type": token_type(vocabulary_size),
        "pad_id": pad_id,
        "splits": {split.split: split.facts() for split in splits if split.shards},
    }
