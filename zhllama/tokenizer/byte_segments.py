"""A byte-level tokenizer's ids of many texts at once: cut where nothing is merged, each different segment encoded once.

Why the ids are the tokenizer's: the known expressions look at no more than what they match and the character behind
it, so a text cut at a place where each of them ends a pretoken in any case (before a space behind a letter, say) is its
parts, one after another. Inside a pretoken, between two characters that no piece has side by side, nothing is ever
merged. Only characters that were letters, or punctuation, in Unicode 3.2 and are still count, as they are such to every
library; a text that the normaliser may change, or that holds an added token, is encoded whole, and so are all texts of
a tokenizer with other expressions. Pretokens of Chinese are whole clauses, each of them new; these segments are words,
and nine in ten were seen before: `make bench ONLY=prepare_dataset` prints the speed beside `tokenizers`' own.
"""

import re
import threading
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from zhllama.tokenizer.byte_alphabet import spelt
from zhllama.tokenizer.byte_level_rules import GPT2, LLAMA3, QWEN2, Rules
from zhllama.tokenizer.byte_merges import ByteMerges
from zhllama.tokenizer.segments import KNOWN, KNOWN_BYTES, TABLE_BITS, codes_of, different, pair_hashes
from zhllama.tokenizer.spans import spans

_LETTER, _UNCASED, _POINT, _DIGIT = 1, 2, 4, 8
"""What a character surely is: a letter; one that no expression tells from another; punctuation or a symbol."""
_FIRST, _LAST = 16, 32
"""Of a piece that merges do not make."""
_SURE = 15
_PART = 0x200000
"""Above all characters: a byte at the edge of a piece that begins or ends within a character."""


@cache
def _kinds() -> np.ndarray:
    """uint8 [code points]."""
    old = unicodedata.ucd_3_2_0
    kinds = np.zeros(0x110000, np.uint8)
    for code in range(0x10000):
        char = chr(code)
        was, now = old.category(char)[0], unicodedata.category(char)
        if was != now[0] or was not in "LPS" or unicodedata.decomposition(char)[:1] not in ("", "<") or char == "'":
            continue
        # vowels of Hangul join the consonant before them in NFC
        if was == "L":
            kinds[code] = _LETTER | (_UNCASED if now == "Lo" and code >= 0x250 and not 0x1100 <= code < 0x1200 else 0)
        else:
            kinds[code] = _POINT
    kinds[ord("0") : ord("9") + 1] = _DIGIT
    return kinds


class ByteSegments:
    """Encodes as the tokenizer does, many texts at a time. `ordinary`: the bytes of each piece that merges make;
    `added`: the tokens that are read as themselves in any text."""

    def __init__(
        self, tokenizer: Any, rules: Rules, ordinary: Sequence[bytes], added: Sequence[str], merges: ByteMerges
    ) -> None:
        self._tokenizer, self._nfc, self._merges = tokenizer, rules.nfc, merges
        expressions = rules.expressions
        self._cuts = len(expressions) == 1 and expressions[0] in (GPT2, LLAMA3, QWEN2)
        self._added = re.compile("|".join(map(re.escape, added))) if added else None
        self._lock = threading.Lock()
        """Held while the known segments are looked up and added to."""
        self._forget()
        self._unmade: set[bytes] = set()
        self._taken = False
        """Whether one mark before letters is within their pretoken."""
        if not self._cuts:
            return
        texts = [content.decode(errors="surrogateescape") for content in ordinary if not content.isascii()]
        several = "\n".join(text for text in texts if len(text) > 1)
        codes = np.frombuffer(several.encode("utf-32-le", "surrogatepass"), "<u4")
        partial = (codes >= 0xDC80) & (codes < 0xDD00)
        codes = np.where(partial, codes + np.uint32(_PART - 0xDC00), codes).astype(np.uint32)
        left, right = codes[:-1], codes[1:]
        # a byte that goes on with a character begins none
        inside = (left != ord("\n")) & (right != ord("\n")) & ((right < _PART + 0x80) | (right >= _PART + 0xC0))
        self._joined = np.zeros(1 << TABLE_BITS, bool)
        """By the hash of two characters (or the edges of such), whether a piece has them side by side."""
        self._joined[pair_hashes(left, right)[inside]] = True
        self._kinds = _kinds()
        self._taken = expressions[0] != GPT2
        if rules.whole:
            self._unmade = self._not_made(texts)

    def _not_made(self, texts: Sequence[str]) -> set[bytes]:
        """The pieces that merges do not make, as segments are spelt: they are whole pretokens or none. So that no
        segment is taken for one, none is cut within a pretoken before their first character or behind their last."""
        model, edge = self._tokenizer.model, _UNCASED | _POINT
        self._kinds = self._kinds.copy()
        known, found = self._kinds.copy(), set()
        near = [text for text in texts if (known[ord(text[0])] | known[ord(text[-1])]) & edge]
        model.ignore_merges = False
        try:
            for text in near:
                if any("\udc80" <= char < "\udd00" for char in text):
                    continue
                if len(model.tokenize(spelt(text.encode()))) > 1:
                    self._kinds[ord(text[0])] |= _FIRST
                    self._kinds[ord(text[-1])] |= _LAST
                    found.add(text.encode("utf-32-le"))
        finally:
            model.ignore_merges = True
        return found

    def _forget(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._bytes = 0
        self._ids = np.zeros(0, np.int32)
        self._firsts = self._counts = np.zeros(0, np.int64)

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts one after another, int32, and how many each has, int64."""
        sizes = np.fromiter(map(len, texts), np.int64, len(texts))
        joined = "".join(texts)
        if not joined:
            return np.zeros(0, np.int32), np.zeros(len(texts), np.int64)
        codes, ends = codes_of(joined), sizes.cumsum()
        begins = self._begins(codes) if self._cuts else np.zeros(len(codes), bool)
        for whole in self._whole(texts, joined):
            begins[ends[whole] - sizes[whole] : ends[whole]] = False
        begins[(ends - sizes)[sizes > 0]] = True
        starts = np.flatnonzero(begins)
        entries, segments = different(codes, starts)
        with self._lock:
            if new := [segment for segment in segments if segment not in self._numbers]:
                self._learn(new)
            numbers = np.fromiter(map(self._numbers.__getitem__, segments), np.int64, len(segments))
            ids, firsts, counts = self._ids, self._firsts, self._counts
            if len(self._numbers) > KNOWN or self._bytes > KNOWN_BYTES:
                self._forget()
        entries = numbers[entries]
        counts = counts[entries]
        before = np.concatenate([[0], counts.cumsum()])
        return ids[spans(firsts[entries], counts)], np.diff(before[starts.searchsorted(ends)], prepend=0)

    def _whole(self, texts: Sequence[str], joined: str) -> list[int]:
        """The texts that are not cut."""
        if not self._cuts:
            return []
        found: set[int] = set()
        if self._added is not None and self._added.search(joined):
            found |= {number for number, text in enumerate(texts) if self._added.search(text)}
        if self._nfc and not unicodedata.is_normalized("NFC", joined):
            found |= {number for number, text in enumerate(texts) if not unicodedata.is_normalized("NFC", text)}
        return sorted(found)

    def _begins(self, codes: np.ndarray) -> np.ndarray:
        """bool [characters]: whether a segment begins there."""
        kinds = self._kinds[codes]
        some = (kinds & _SURE) != 0
        a, b = kinds[:-1], kinds[1:]
        begins = np.zeros(len(codes), bool)
        cut = begins[1:]
        space, line = codes == ord(" "), codes == ord("\n")
        cut |= some[:-1] & space[1:]
        cut |= ((a & (_LETTER | _DIGIT)) != 0) & line[1:]
        cut |= ((a & _LETTER) != 0) & ((b & _POINT) != 0)
        cut[1:] |= some[:-2] & line[1:-1] & some[2:]
        # inside a pretoken, or perhaps
        within = ((a & (_UNCASED | _POINT)) != 0) & ((b & _UNCASED) != 0) & ((a & _LAST) == 0) & ((b & _FIRST) == 0)
        at = np.flatnonzero(within)
        left, right = codes[at], codes[at + 1]
        joined = np.zeros(len(at), bool)
        for one in (left, _edge(left, last=True)):
            for other in (right, _edge(right, last=False)):
                joined |= self._joined[pair_hashes(one, other)]
        cut[at] |= ~joined
        return begins

    def _learn(self, segments: list[bytes]) -> None:
        ids, counts = self._encoded(segments)
        known, begin = len(self._numbers), len(self._ids)
        self._numbers.update(zip(segments, range(known, known + len(segments)), strict=True))
        self._bytes += sum(map(len, segments))
        self._ids = np.concatenate([self._ids, ids])
        self._firsts = np.concatenate([self._firsts, begin + counts.cumsum() - counts])
        self._counts = np.concatenate([self._counts, counts])

    def _encoded(self, segments: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Letters (and a mark before them) are within one pretoken, and merged here; the library does all else."""
        sizes = np.fromiter(map(len, segments), np.int64, len(segments)) >> 2
        codes = np.frombuffer(b"".join(segments), "<u4")
        kinds = self._kinds[codes] if self._cuts else np.zeros(len(codes), np.uint8)
        starts = sizes.cumsum() - sizes
        letter = (kinds & _UNCASED) != 0
        if self._taken:
            marks = starts[sizes > 1]
            letter[marks] |= (kinds[marks] & _POINT) != 0
        plain = np.logical_and.reduceat(letter, starts)
        if self._unmade:
            plain &= ~np.fromiter(map(self._unmade.__contains__, segments), bool, len(segments))
        chosen = codes[plain.repeat(sizes)]
        content = np.frombuffer(chosen.tobytes().decode("utf-32-le").encode(), np.uint8)
        if not self._merges.knows(content).all():
            plain[:], chosen, content = False, codes[:0], content[:0]
        wide = 1 + (chosen >= 0x80).astype(np.int64) + (chosen >= 0x800)
        owners = np.arange(plain.sum()).repeat(sizes[plain])
        mine, lengths = self._merges.encode(content, np.bincount(owners, wide, plain.sum()).astype(np.int64))
        texts = [segments[at].decode("utf-32-le") for at in np.flatnonzero(~plain)]
        found = [one.ids for one in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        counts = np.zeros(len(segments), np.int64)
        counts[plain], counts[~plain] = lengths, [len(one) for one in found]
        ids = np.zeros(counts.sum(), np.int32)
        ours = plain.repeat(counts)
        ids[ours], ids[~ours] = mine, [index for one in found for index in one]
        return ids, counts


def _edge(codes: np.ndarray, last: bool) -> np.ndarray:
    """The first or last byte of each character's UTF-8, as the table has it."""
    if last:
        found = np.where(codes < 0x80, codes, 0x80 | (codes & 0x3F))
    else:
        lengths = [codes < 0x80, codes < 0x800, codes < 0x10000]
        found = np.select(lengths, [codes, 0xC0 | (codes >> 6), 0xE0 | (codes >> 12)], 0xF0 | (codes >> 18))
    return (found + _PART).astype(np.uint32)
