"""Which questions have been seen: the same one, or one whose ROUGE-L to it is over 0.7, exactly.

ROUGE-L's F-measure of token sequences a and b is 2·LCS / (|a| + |b|), so "over 0.7" says that their insert-delete
distance |a| + |b| − 2·LCS is under 0.3·(|a| + |b|). A Chinese character is a token, and so is a word of another
script. Each question's tokens are hashed into a bit set (the k-th occurrence of a token is an element of its own); two
sets differ in no more bits than the distance: XOR and popcount over all rows of comparable length leave a handful to
RapidFuzz. The answer is the plain loop's, at thousands of items a second.
"""

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

import numpy as np
from rapidfuzz.distance import Indel
from rapidfuzz.process import cdist

from zhllama.tokenizer.prompt import question_of

_SIGNS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af\U00020000-\U000323af"
_TOKEN = re.compile(f"[{_SIGNS}]|[^\\W_{_SIGNS}]+")  # one by one, and by the word
_FIRST_WORD = 0x40000
"""Code points from here on belong to no script: words are numbered with them, so that a sequence is a str."""
_WORDS = 0x10FFFF - _FIRST_WORD
NOT_OVER = 3, 10
"""A distance of 3/10 of both lengths together, or more, is no duplicate: a ROUGE-L of 0.7 at most."""


def question(item: Mapping[str, Any]) -> str:
    """What two items are compared by: with the input, or else all translation tasks would be one; of a conversation
    every question, or else all that end with the same thanks would be."""
    return "\n".join([*(asked for asked, _ in item.get("history", ())), question_of(item)])


class Seen:
    """The questions so far. `duplicate_of` asks, `add` puts one in; both take the text of `question`."""

    def __init__(self) -> None:
        self._words: dict[str, str] = {}
        self._exact: set[str] = set()
        self._bands: dict[int, _Band] = {}

    def tokens(self, text: str) -> str:
        """The token sequence, a character a token; of a text without any (marks alone), the text itself."""
        found = _TOKEN.findall(unicodedata.normalize("NFKC", text).lower())
        for at, one in enumerate(found):
            if len(one) > 1 or one < "\u3040":
                # past the last free code point two words share one: of 850,000 words, that is no matter
                found[at] = self._words.setdefault(one, chr(_FIRST_WORD + len(self._words) % _WORDS))
        return "".join(found) or text

    def add(self, text: str) -> None:
        """Puts a question in; one that is there already, token for token, changes nothing."""
        tokens = self.tokens(text)
        if tokens not in self._exact:
            self._exact.add(tokens)
            band = _band(len(tokens))
            if band not in self._bands:
                # four bits and more for every token, so that few of them share one
                self._bands[band] = _Band(min(4096, 128 << band))
            self._bands[band].add(tokens)

    def duplicate_of(self, text: str) -> str:
        """ "exact" for a question that is there token for token, "near" for a ROUGE-L over 0.7, "" for a new one."""
        tokens = self.tokens(text)
        if tokens in self._exact:
            return "exact"
        # only texts can match whose length alone does not make them differ too much: 7/13 to 13/7 of it
        bands = range(_band(len(tokens) * 7 // 13), _band(len(tokens) * 13 // 7 + 1) + 1)
        return "near" if any(band in self._bands and self._bands[band].matches(tokens) for band in bands) else ""


class _Band:
    """Questions of about one length: their tokens, and a matrix of bit sets, a row each."""

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self._texts: list[str] = []
        self._lengths = np.zeros(64, np.int32)
        self._sets = np.zeros((bits // 64, 64), np.uint64)  # (words, rows): a word of all rows is contiguous

    def add(self, tokens: str) -> None:
        row = len(self._texts)
        if row == len(self._lengths):
            self._lengths = np.concatenate([self._lengths, np.zeros_like(self._lengths)])
            self._sets = np.concatenate([self._sets, np.zeros_like(self._sets)], axis=1)
        self._texts.append(tokens)
        self._lengths[row] = len(tokens)
        self._sets[:, row] = bit_set(tokens, self._bits)

    def matches(self, tokens: str) -> bool:
        """Whether a question here has a ROUGE-L over 0.7 to these tokens."""
        rows = len(self._texts)
        differing = np.zeros(rows, np.int32)
        for word, mine in zip(self._sets, bit_set(tokens, self._bits)):
            differing += np.bitwise_count(word[:rows] ^ mine)
        near, whole = NOT_OVER
        likely = np.flatnonzero(whole * differing < near * (self._lengths[:rows] + len(tokens)))
        if not len(likely):
            return False
        distances = cdist([tokens], [self._texts[row] for row in likely], scorer=Indel.distance, dtype=np.int32)[0]
        return bool((whole * distances < near * (self._lengths[likely] + len(tokens))).any())


def bit_set(tokens: str, bits: int) -> Any:
    """The tokens as a set of `bits` bits, uint64[bits / 64]. Two sets differ in at most as many bits as the sequences'
    insert-delete distance, since an element that is left out or put in changes one bit at most."""
    seen: dict[str, int] = {}
    found = 0
    for token in tokens:
        seen[token] = occurrence = seen.get(token, 0) + 1
        # Knuth's multiplicative hash, its upper bits: neighbours in Unicode fall far apart
        found |= 1 << (((ord(token) + (occurrence << 21)) * 0x9E3779B97F4A7C15 >> 32) % bits)
    return np.frombuffer(found.to_bytes(bits // 8, "little"), np.uint64)


def _band(length: int) -> int:
    """Bands double from 16 tokens on."""
    return max(0, length.bit_length() - 4)
