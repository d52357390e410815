"""The packed dataset: blocks of token ids, all of one length, and where the documents in each block lie.

Two bytes a token while the vocabulary fits 16 bits (four beyond that), against 36 for the same text tokenised into
Arrow lists. A block is found by arithmetic, so one is read by range from S3 or memory-mapped from a folder; nothing is
decoded. A shard is at most 1 GB and is three files, little-endian:

    train-00000.bin            blocks × block_size ids, u16 or u32
    train-00000.offsets.bin    u32 × (blocks + 1): block i has the segments offsets[i] to offsets[i + 1]
    train-00000.segments.bin   of each segment, where it ends in its block, and, where there are prompts, from where it
                               is learned: (end) or (loss_start, end), u16, or u32 for longer blocks

A segment is a document or a piece of one, or a turn of a conversation (a question with its answer); it begins where the
one before it ends. Attention and positions need not cross the borders of documents: a turn that goes on from the one
before it has its two places swapped, (end, loss_start), which nothing else can be, so that what holds no such turn is
the same as ever. Its tokens from `loss_start` to `end` are predicted; a document's first one never is, since nothing of
it stands before it. What follows the last segment of a block is padding. For reviews of 51 tokens on average
that is 2.04 bytes a token. Splits: `train`, and `validation` unless nothing was held out.
"""

import bisect
import itertools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zhllama.artifacts.cache import materialize
from zhllama.artifacts.reader import Artifact
from zhllama.data.segments import Blocks, Segments
from zhllama.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from zhllama.artifacts.writer import ArtifactWriter, FileStream

KIND = "packed-dataset"
TRAIN = "train"
VALIDATION = "validation"
HELD_OUT_TEXT = "held-out.jsonl"
HELD_OUT_INSTRUCTIONS = "held-out.json"
"""The validation documents as they were, for `evaluate`: `{"text"}` lines, or an Alpaca list."""
IGNORED = -100
"""The label of a token that is not predicted, torch's convention."""
TURNS = 3
"""As `columns` of a split: two, and turns that go on."""
MAX_SHARD = 10**9
_AT_ONCE = 2**20
"""Bytes of blocks that are laid out together."""


def token_type(vocabulary_size: int) -> str:
    """numpy's name of the ids' type in a file: `<u2` up to 65,536 pieces, else `<u4`."""
    return "<u2" if vocabulary_size <= 2**16 else "<u4"


def place_type(block_size: int) -> str:
    return "<u2" if block_size < 2**16 else "<u4"


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}"


class PackedWriter(ExitStack):
    """Writes one split: `with PackedWriter(out, TRAIN, 512, encoder.size, pad) as split: split.write_blocks(…)`, with
    1 MB of memory for blocks beyond those it is given, however much is written."""

    def __init__(
        self, out: "ArtifactWriter", split: str, block_size: int, vocabulary_size: int, pad: int, prompts: bool = True
    ) -> None:
        """`prompts`: whether any segment has one; else two bytes a segment are saved."""
        super().__init__()
        self._out, self.split, self._block_size, self._pad_id = out, split, block_size, pad
        self._columns = 2 if prompts else 1
        self._type = token_type(vocabulary_size)
        block_bytes = block_size * int(self._type[-1])
        self._per_shard = max(1, MAX_SHARD // block_bytes)
        self._at_once = max(1, _AT_ONCE // block_bytes)
        self._streams: list[FileStream] = []  # of the shard in the making, closed by the stack: ids, offsets, segments
        self._rows_before = 0  # of the shard's segments.bin, written already
        self.shards: list[int] = []  # blocks in each
        self.segments = self.turns = self.tokens = self.loss_tokens = 0

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
            # releases that know no turns refuse a third kind before a training starts
            **({"columns": TURNS, "turns": self.turns} if self.turns else {"columns": self._columns}),
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
                name = shard_name(self.split, len(self.shards))
                for kind in ("bin", "offsets.bin", "segments.bin"):
                    self._streams.append(self.enter_context(self._out.writer(f"{name}.{kind}")))
                self._streams[1].write(bytes(4))
                self.shards.append(0)
                self._rows_before = 0
            end = begin + min(self._at_once, self._per_shard - self.shards[-1], len(counts) - begin)
            last = first + int(counts[begin:end].sum())
            self._write(segments.part(first, last), counts[begin:end])
            if self.shards[-1] == self._per_shard:
                self.close()
                self._streams = []
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
        starts, stops, owners = segments.runs()
        goes_on = np.diff(owners, prepend=-1) == 0
        if self._columns == 1 and (longest := min(segments.prompts.max(), segments.lengths.max())) > 1:
            raise ValueError(f"a prompt of {longest} tokens in a split that was to have none")

        blocks = np.full((len(counts), self._block_size), self._pad_id, self._type)
        blocks[np.arange(self._block_size) < used[:, None]] = segments.ids
        # of each run, where its block begins among all ids
        block_of = np.repeat(np.arange(len(counts)), counts)[owners]
        before = (ends[last_ones] - used)[block_of]
        loss_start, stops = starts - before, stops - before
        places = np.stack([loss_start, stops], axis=1) if self._columns == 2 else stops
        if goes_on.any():
            places[goes_on] = places[goes_on, ::-1]
        last_rows = np.bincount(block_of, minlength=len(counts)).cumsum()
        ids, offsets, marks = self._streams
        ids.write(blocks.tobytes())
        offsets.write((self._rows_before + last_rows).astype("<u4").tobytes())
        marks.write(places.astype(place_type(self._block_size)).tobytes())

        self._rows_before += len(owners)
        self.shards[-1] += len(counts)
        self.segments += len(segments)
        self.turns += int(goes_on.sum())
        self.tokens += int(used.sum())
        self.loss_tokens += int((stops - loss_start).sum())


def packed_facts(block_size: int, vocabulary_size: int, pad_id: int, splits: Sequence[PackedWriter]) -> dict[str, Any]:
    """The manifest's facts that make a packed dataset readable. Splits that got no block are left out."""
    return {
        "block_size": block_size,
        "token_type": token_type(vocabulary_size),
        "pad_id": pad_id,
        "splits": {split.split: split.facts() for split in splits if split.shards},
    }


def _wrong_facts(facts: Mapping[str, Any], split: Any) -> str:
    """Which of the facts cannot be, "" for none."""
    shards = split.get("shards") if isinstance(split, dict) else None
    good = {
        "block_size": type(facts.get("block_size")) is int and 0 < facts["block_size"] < 2**31,
        "token_type": facts.get("token_type") in ("<u2", "<u4"),
        "columns": isinstance(split, dict) and type(split.get("columns")) is int and split["columns"] in (1, 2, TURNS),
        "shards": isinstance(shards, list) and shards != [] and all(type(one) is int and one > 0 for one in shards),
    }
    return " and ".join(name for name, one in good.items() if not one)


class PackedDataset:
    """One split, readable by index, memory-mapped: a sequence that torch's DataLoader takes as it is. The files are
    fetched whole, once, and verified; with `by_range` nothing is fetched but what is asked for (to look at a block of a
    large dataset in S3).

    An item is a dictionary of int64 arrays of shape [block_size]: `input_ids`; `labels`, -100 over prompts, padding
    and each segment's first token (so that after the model's shift nothing is predicted across a border);
    `position_ids`, which begin at 0 in each segment and again in the padding.
    """

    def __init__(
        self, artifact: Artifact, split: str = TRAIN, option: str = "--dataset", by_range: bool = False
    ) -> None:
        artifact.require_kind(KIND, option=option)
        facts, self._where = artifact.manifest.facts, f"{option} {artifact.root}"
        splits = facts.get("splits")
        if not isinstance(splits, dict):
            raise InputError(f"{self._where}: not a packed dataset; give what prepare_dataset wrote")
        if split not in splits:
            mend = "prepare it with --validation-fraction or --validation"
            raise InputError(f"{self._where}: it has no {split} split; {mend}")
        self.split = split
        self.facts: dict[str, Any] = splits[split]
        if isinstance(self.facts, dict) and "columns" not in self.facts:
            raise InputError(f"{self._where}: an older version of zhllama wrote it; run prepare_dataset again")
        if wrong := _wrong_facts(facts, self.facts):
            raise self._damaged(f"its manifest's {wrong}")
        self.block_size: int = facts["block_size"]
        self._turns = self.facts["columns"] == TURNS
        self._columns: int = 2 if self._turns else self.facts["columns"]
        self._token_type: str = facts["token_type"]
        self._ends = list(itertools.accumulate(self.facts["shards"]))
        vocabulary = artifact.manifest.vocabulary
        self._pieces = vocabulary.size if vocabulary is not None else 2**31
        place = self._columns * int(place_type(self.block_size)[-1])
        self._segments: dict[str, int] = {}
        """By shard."""
        for number, blocks in enumerate(self.facts["shards"]):
            name = shard_name(split, number)
            sizes = [artifact.file(f"{name}.{kind}").size for kind in ("bin", "offsets.bin", "segments.bin")]
            wanted = [blocks * self.block_size * int(self._token_type[-1]), 4 * (blocks + 1)]
            if sizes[:2] != wanted or sizes[2] % place:
                raise self._damaged(f"{name}: its files are not of {blocks} blocks")
            self._segments[name] = sizes[2] // place
        self._source: Path | Artifact = artifact if by_range else materialize(artifact)
        self._open: dict[str, Any] = {}

    def _damaged(self, what: str) -> InputError:
        return InputError(f"{self._where}: {what}; it is damaged: run prepare_dataset again")

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
        found = self._numbers(f"{name}.bin", self._token_type, at * self.block_size, (at + 1) * self.block_size)
        if found.max() >= self._pieces:
            raise self._damaged(f"block {index} of {self.split} holds an id beyond its {self._pieces:,} pieces")
        return found

    def segments(self, index: int) -> "np.ndarray":
        """The places of a block's segments: int64 [segments, 3], columns start, loss_start, end."""
        return self.turns(index)[0]

    def turns(self, index: int) -> tuple["np.ndarray", "np.ndarray"]:
        """As `segments`, and of each, bool [segments], whether it goes on from the one before it."""
        import numpy as np

        name, at = self._locate(index)
        begin, end = self._numbers(f"{name}.offsets.bin", "<u4", at, at + 2).tolist()
        if not begin < end <= self._segments[name]:
            raise self._damaged(f"block {index} of {self.split} has the segments {begin} to {end}")
        kind, first, last = place_type(self.block_size), self._columns * begin, self._columns * end
        places = self._numbers(f"{name}.segments.bin", kind, first, last)
        rows = places.astype("int64").reshape(-1, self._columns)
        goes_on = rows[:, 0] > rows[:, -1] if self._turns else np.zeros(len(rows), bool)
        rows[goes_on] = rows[goes_on, ::-1]
        ends = rows[:, -1]
        found = np.zeros((len(rows), 3), np.int64)
        found[1:, 0] = ends[:-1]
        found[:, 1] = rows[:, 0] if self._columns == 2 else found[:, 0] + 1
        found[:, 2] = ends
        if (np.diff(found, axis=1) < (1, 0)).any() or ends[-1] > self.block_size or goes_on[0]:
            raise self._damaged(f"block {index} of {self.split}: its segments do not follow one another")
        return found, goes_on

    def __getitem__(self, index: int) -> dict[str, "np.ndarray"]:
        import numpy as np

        if index < 0:
            index += len(self)
        input_ids = self.tokens(index).astype(np.int64)
        labels = np.full(self.block_size, IGNORED, np.int64)
        position_ids = np.arange(self.block_size, dtype=np.int64)
        begin = end = 0
        segments, goes_on = self.turns(index)
        for (start, loss_start, end), further in zip(segments.tolist(), goes_on.tolist(), strict=True):
            labels[loss_start:end] = input_ids[loss_start:end]
            begin = begin if further else start
            position_ids[start:end] -= begin
        position_ids[end:] -= end
        return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
