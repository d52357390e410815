"""What every tokenizer is to the rest of the program, SentencePiece's (sentencepiece_encoder.py) or a byte-level one
(byte_level.py): ids as training has them, the special ones put in by id, so that `</s>` in a user's text stays text.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from zhllama.tokenizer.contract import Vocabulary

if TYPE_CHECKING:
    import numpy as np

RECIPE_SIZES = (32_000, 49_953, 49_954)
"""LLaMA, Chinese-LLaMA, Chinese-Alpaca: sizes whose prefix digest a SentencePiece model's contract records."""


class Encoder(ABC):
    """Encodes by the ids used in training."""

    size: int
    bos: int | None
    """What a text begins with; None where that is nothing, whatever the files call BOS."""
    eos: int
    unknown: int
    """−1 where nothing is."""

    @property
    @abstractmethod
    def pieces(self) -> list[str]:
        """As the tokenizer's file has them."""

    @property
    @abstractmethod
    def texts(self) -> list[str]:
        """The ordinary pieces that are whole characters, as a text has them."""

    @property
    @abstractmethod
    def fragments(self) -> frozenset[int]:
        """The ordinary pieces that are none: bytes."""

    @property
    @abstractmethod
    def pad(self) -> int | None:
        """The id of the padding piece; None without one. A piece that is padding beside being EOS, BOS or the unknown
        one is none: what is padded with it could not be told from what is meant."""

    @property
    @abstractmethod
    def named(self) -> Mapping[str, int]:
        """bos, eos, pad, unk → id, as the files of a model name them for other programs, as far as they are there."""

    @property
    @abstractmethod
    def special(self) -> Mapping[str, int]:
        """The pieces that engines read in a text as themselves and write by name, and training never makes of text."""

    @property
    def named_pad(self) -> int | None:
        """The padding that the files name: `pad`, else the piece that is it as well."""
        return self.named.get("pad")

    @property
    def begin(self) -> list[int]:
        """The ids before a text: BOS, or none."""
        return [] if self.bos is None else [self.bos]

    @property
    def context(self) -> list[int]:
        """What stands before a text whose first id is foretold too: BOS; EOS, which stands between documents wherever
        a model without BOS was trained."""
        return self.begin or [self.eos]

    def is_special(self, index: int) -> bool:
        """Whether an id is of a special piece that is neither padding nor the unknown one."""
        return index in self._special_ids

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.special.values()) - {self.named_pad, self.named.get("unk")}

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids without BOS or EOS."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As encode, many at a time."""

    @abstractmethod
    def encode_flat(
        self, texts: Sequence[str], begin: bool = False, end: bool = False
    ) -> tuple["np.ndarray", "np.ndarray"]:
        """As encode_batch, the ids of all texts one after another, int32, and how many each has, int64; with `begin`
        BOS, if there is one, stands before each, with `end` EOS after it."""

    @abstractmethod
    def unknown_bytes(self, texts: Sequence[str]) -> list[int]:
        """How many bytes of UTF-8 of each text are unknown to it."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special ones."""

    @abstractmethod
    def written(self, ids: Sequence[int]) -> str:
        """The text of ids as engines write it, special pieces among it. All of them are pieces."""

    @abstractmethod
    def files(self, max_length: int = 2048, template: Any = None) -> dict[str, bytes]:
        """Name → content of the tokenizer files of a model folder, with this chat template: AutoTokenizer then gives
        these ids. InputError for a tokenizer that no such files can be made of."""

    @abstractmethod
    def without_last(self) -> Self:
        """The same without its last piece, a padding that has no row."""

    @abstractmethod
    def digests(self, sizes: Iterable[int]) -> dict[int, str]:
        """Number of pieces → the digest of that many."""

    def differing(self, texts: Sequence[str], found: Iterable[Sequence[int]]) -> int:
        """How many texts another tokenizer has `found` other ids for than BOS and these."""
        wanted = self.encode_batch(texts)
        return sum(list(ids) != [*self.begin, *right] for ids, right in zip(found, wanted, strict=True))

    def vocabulary(self, also_at: Iterable[int] = (), **facts: Any) -> Vocabulary:
        """The contract of this tokenizer; `also_at`: more sizes whose prefix digest is recorded (the base's)."""
        found = self.digests({size for size in also_at if size < self.size} | {self.size})
        prefixes = {str(size): found[size] for size in sorted(found) if size < self.size}
        return Vocabulary(self.size, found[self.size], self.bos, self.eos, self.pad, prefixes, **facts)


def digests_of(pieces: Sequence[str], sizes: Iterable[int]) -> dict[int, str]:
    """Number of pieces → the SHA-256 of that many, each with its length before it."""
    wanted, running, found = set(sizes), hashlib.sha256(), {}
    for index in range(len(pieces) + 1):
        if index in wanted:
            found[index] = running.hexdigest()
        if index < len(pieces):
            text = pieces[index].encode()
            running.update(len(text).to_bytes(4, "little") + text)
    return found
