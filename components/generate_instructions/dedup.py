"""Which questions have been seen: the same one, or one whose ROUGE-L to it is over 0.7, exactly.

ROUGE-L's F-measure of token sequences a and b is 2·LCS / (|a| + |b|), so "over 0.7" says that their insert-delete
distance |a| + |b| − 2·LCS is under 0.3·(|a| + |b|). A Chinese character is a token, and so is a word of another script
(Stanford's rule reads words alone, and finds none in Chinese); instruction and input count together, or else all
translation tasks would be one.

Comparing with 100,000 questions one by one is what makes the plain loop slow. Each question's tokens are hashed into a
bit set (the k-th occurrence of a token is an element of its own), and the number of bits in which two sets differ is
never more than the distance: a scan of XOR and popcount over all rows of comparable length leaves a handful to
RapidFuzz. No true match is lost, so the answer is the plain loop's, at thousands of items a second.
"""

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

import numpy as np
from rapidfuzz.distance import Indel
from rapidfuzz.process import cdist

_TOKEN = re.compile(
    "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af\U00020000-\U000323af]"  # one by one
    "|[^\\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af\U00020000-\U000323af]+"  # by the word
)
_FIRST_WORD = 0x40000
"""Code points from here on belong to no script: words are numbered with them, so that a sequence is a str."""
_WORDS = 0x10FFFF - _FIRST_WORD
NOT_OVER = 3, 10
"""A distance of 3/10 of both lengths together, or more, is no duplicate: a ROUGE-L of 0.7 at most."""


def question(item: Mapping[str, str]) -> str:
    """What two items are compared by."""
    return f"{item['instruction']}\n{item['input']}" if item["input"] else item["instruction"]


class Seen:
    """The questions so far. `duplicate_of` asks, `add` puts one in; both take the text of `question`."""

    def __init__(self) -> None:
        self._words: dict[str, str] = {}
        self._exact: dict[str, int] = {}
        self._bands: dict[int, _Band] = {}

    def __len__(self) -> int:
        return len(self._exact)

    def tokens(self, text: str) -> str:
        """The token sequence, a character a token; of a text without any (marks alone), the text itself."""
        found = _TOKEN.findall(unicodedata.normalize("NFKC", text).lower())
        return "".join([one if _alone(one) else self._numbered(one) for one in found]) or text

    def _numbered(self, word: str) -> str:
        # past the last free code point two words share one: of 850,000 words, that is no matter
        return self._words.setdefault(word, chr(_FIRST_WORD + len(self._words) % _WORDS))

    def add(self, text: str) -> None:
        """Puts a question in; one that is there already, token for token, changes nothing."""
        tokens = self.tokens(text)
        if tokens not in self._exact:
            self._exact[tokens] = len(self._exact)
            band = _band(len(tokens))
            if band not in self._bands:
                self._bands[band] = _Band(_bits(band))
            self._bands[band].add(tokens)

    def duplicate_of(self, text: str) -> str:
        """ "exact" for a question that is there token for token, "near" for a ROUGE-L over 0.7, "" for a new one."""
        tokens = self.tokens(text)
        if tokens in self._exact:
            return "exact"
        length = len(tokens)
        # of all texts, only those can match whose length alone does not make them differ too much: 7/13 to 13/7 of it
        for band in range(_band(length * 7 // 13), _band(length * 13 // 7 + 1) + 1):
            if band in self._bands and self._bands[band].matches(tokens):
                return "near"
        return ""


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
        wanted = bit_set(tokens, self._bits)
        differing = np.zeros(rows, np.int32)
        for word, mine in zip(self._sets, wanted):
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


def _alone(token: str) -> bool:
    """Whether a token stands for itself: a character of a script that is read by the character."""
    return len(token) == 1 and token >= "\u3040"


def _band(length: int) -> int:
    """Bands double from 16 tokens on."""
    return max(0, length.bit_length() - 4)


def _bits(band: int) -> int:
    """Of a band's sets: four bits and more for every token, so that few of them share one; at most 4096."""
    return min(4096, 128 << band) if band else 128
