"""SentencePiece's ids of many texts at once: cut where no piece can lie, each different segment is encoded once.

Why the ids are SentencePiece's: its BPE merges two neighbours wherever that is a piece, the best score first, the
leftmost among equals. Where no piece has the characters a and b side by side, nothing is ever merged across them, so a
text's ids are its segments', one after another. That holds where the normaliser changes nothing but spaces (to ▁) and
the mark before a text, and a character without a piece becomes its bytes; other models are not cut at all (`fits`).

Chinese comes in segments of 1.6 characters, nine in ten of them seen in the same megabyte before; Arrow's dictionary
finds these. All this takes less than half of SentencePiece's time; `make bench ONLY=prepare_dataset` prints both.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from zhllama.tokenizer.sentencepiece_model import BPE, BYTE, CONTROL, NORMAL, UNKNOWN
from zhllama.tokenizer.spans import spans

KNOWN = 2**17
"""Segments that are kept; when there are more, all are forgotten."""
KNOWN_BYTES = 2**23
"""Likewise, of their characters, four bytes each."""
_TOGETHER = 100
"""Segments that are encoded as one text: one alone costs more for the call than for its encoding, and thousands more
for the long list of merges."""
_SPACE = "▁"
_BREAK = "\n"
"""Stands between texts, and between segments that are encoded together: a character that is a segment of its own."""
TABLE_BITS = 20


@dataclass
class _Known:
    """Segments with their ids. The arrays are never changed, only replaced by longer ones."""

    ids: np.ndarray
    """int32: of all, one after another, and something between them."""
    firsts: np.ndarray
    """int64 [segments]: where its own begin."""
    counts: np.ndarray
    """int64 [segments]: how many they are."""
    numbers: dict[bytes, int]
    """Segment, as UTF-32 → its number."""
    bytes: int = 0


class SegmentEncoder:
    """Encodes as the processor does, many texts at a time. `fits` says for which models."""

    def __init__(self, processor: Any, proto: Any) -> None:
        self._processor = processor
        self._bos, self._eos = processor.bos_id(), processor.eos_id()
        *prefix, self._break_id = processor.encode(_BREAK)
        self._skipped = len(prefix) + 1
        """Ids of the mark before a text, and of a break that stands there."""
        self._known = self._nothing()
        self._lock = threading.Lock()
        """Held while the known segments are looked up and added to."""
        pieces = (piece.piece for piece in proto.pieces if piece.type == NORMAL)
        codes = codes_of(_BREAK.join(piece for piece in pieces if len(piece) > 1))
        left, right = codes[:-1], codes[1:]
        inside = (left != ord(_BREAK)) & (right != ord(_BREAK))
        self._joined = np.zeros(1 << TABLE_BITS, bool)
        """By the hash of two characters, whether a piece has them side by side. Where two pairs share a hash, a place
        is not cut that could be, which changes no ids."""
        self._joined[pair_hashes(codes[:-1], codes[1:])[inside]] = True

    @staticmethod
    def fits(proto: Any) -> bool:
        """Whether the texts of this model may be cut (see above), and a line break is a segment of its own."""
        trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
        types = [piece.type for piece in proto.pieces]
        return (
            trainer.model_type == BPE
            and trainer.byte_fallback
            and not trainer.treat_whitespace_as_suffix
            and not normalizer.precompiled_charsmap
            and normalizer.add_dummy_prefix
            and not normalizer.remove_extra_whitespaces
            and normalizer.escape_whitespaces
            and set(types) <= {NORMAL, UNKNOWN, CONTROL, BYTE}
            and types.count(BYTE) == 256
            and not any(_BREAK in piece.piece for piece in proto.pieces)
        )

    def encode(self, texts: Sequence[str], begin: bool, end: bool) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts one after another, int32, and how many each has, int64; with `begin` BOS stands before
        each, with `end` EOS after it."""
        if not texts:
            return np.zeros(0, np.int32), np.zeros(0, np.int64)
        # before each text a break and the mark, and a break behind the last: BOS and EOS will stand in their places
        joined = f"{_BREAK}{_SPACE}".join(["", *texts]) + _BREAK
        codes = codes_of(joined.replace(" ", _SPACE))
        sizes = np.fromiter(map(len, texts), np.int64, len(texts))
        breaks = np.concatenate([[0], (sizes + 2).cumsum()])
        begins = np.empty(len(codes), bool)
        begins[0] = True
        np.logical_not(self._joined[pair_hashes(codes[:-1], codes[1:])], out=begins[1:])
        # whatever the table says: a break is a segment of its own
        broken = codes == ord(_BREAK)
        begins |= broken
        begins[1:] |= broken[:-1]
        starts = np.flatnonzero(begins)

        entries, segments = different(codes, starts)
        with self._lock:
            known = self._known
            if new := [segment for segment in segments if segment not in known.numbers]:
                known = self._known = self._and_new(known, new)
            numbers = np.fromiter(map(known.numbers.__getitem__, segments), np.int64, len(segments))
            if len(known.numbers) > KNOWN or known.bytes > KNOWN_BYTES:
                self._known = self._nothing()
        entries = numbers[entries]
        # four entries more: the break before the first text, between two, and behind the last; and a text without ids
        count = len(known.counts)
        specials = np.array([self._eos] * end + [self._bos] * begin, np.int32)
        firsts = np.concatenate([known.firsts, len(known.ids) + np.array([end, 0, 0, 0])])
        counts = np.concatenate([known.counts, [begin, end + begin, end, 0]])
        ids = np.concatenate([known.ids, specials])
        at = starts.searchsorted(breaks)
        entries[at] = count + 1
        entries[at[0]] = count
        entries[at[-1]] = count + 2
        entries[at[:-1][sizes == 0] + 1] = count + 3

        counts = counts[entries]
        ends = counts.cumsum()[at[1:]]
        ends[:-1] -= begin
        return ids[spans(firsts[entries], counts)], np.diff(ends, prepend=0)

    def _nothing(self) -> _Known:
        """What is known at first: the break."""
        ids = np.array([self._break_id], np.int32)
        return _Known(ids, np.array([0]), np.array([1]), {_BREAK.encode("utf-32-le"): 0})

    def _and_new(self, known: _Known, segments: list[bytes]) -> _Known:
        parted = _BREAK.encode("utf-32-le")
        texts = [
            b"".join([parted, parted.join(segments[at : at + _TOGETHER]), parted]).decode("utf-32-le")
            for at in range(0, len(segments), _TOGETHER)
        ]
        found = self._processor.encode(texts, out_type="numpy", num_threads=1)
        ids = np.concatenate([some[self._skipped :] for some in found])
        ends = np.flatnonzero(ids == self._break_id)
        if len(ends) != len(segments):
            raise RuntimeError(f"{len(segments)} segments were encoded as {len(ends)}")
        counts = np.diff(ends, prepend=-1) - 1
        known.numbers.update(zip(segments, range(len(known.numbers), len(known.numbers) + len(segments)), strict=True))
        return _Known(
            np.concatenate([known.ids, ids]),
            np.concatenate([known.firsts, len(known.ids) + ends - counts]),
            np.concatenate([known.counts, counts]),
            known.numbers,
            known.bytes + sum(map(len, segments)),
        )


def codes_of(text: str) -> np.ndarray:
    """The code points, uint32 [characters]."""
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def pair_hashes(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Of each two characters, a number below 2**TABLE_BITS: multiplied by odd numbers, the highest bits."""
    hashes = left * np.uint32(0x9E3779B1)
    hashes += right * np.uint32(0x85EBCA77)
    hashes >>= np.uint32(32 - TABLE_BITS)
    return hashes


def different(codes: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, list[bytes]]:
    """The segments that begin at `starts`, each different one once, as UTF-32; and of each segment the number of its
    own among these."""
    offsets = np.append(starts, len(codes)) * codes.itemsize
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(codes)]
    found = pa.Array.from_buffers(pa.large_binary(), len(starts), buffers).dictionary_encode()
    _, offsets, content = found.dictionary.buffers()
    edges = np.frombuffer(offsets, np.int64)[: len(found.dictionary) + 1].tolist()
    content = content.to_pybytes()
    # (its to_numpy() would import pandas)
    numbers = np.frombuffer(found.indices.buffers()[1], np.int32)[: len(starts)]
    return numbers, [content[one:other] for one, other in pairwise(edges)]
