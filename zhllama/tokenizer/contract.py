"""The vocabulary contract: what two artifacts must agree on before a weight is loaded.

The ordered pieces (digests of the first 32,000, 49,953, 49,954 …, so that *extends* can be told from *foreign*), the
special ids, tying, padding and dtype. It travels in every manifest. A byte-level vocabulary's digest is of its merges
and rules as well: with the same pieces and other merges, a text has other ids.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Relation(Enum):
    EQUAL = "equal"
    EXTENDS = "extends"
    SHRINKS = "shrinks"
    FOREIGN = "foreign"


@dataclass(frozen=True)
class Vocabulary:
    """The contract. `prefixes`: a number of pieces (as text, for JSON) → the digest of that many."""

    size: int
    digest: str
    bos: int | None
    """What a text begins with; None where that is nothing."""
    eos: int
    pad: int | None
    prefixes: Mapping[str, str] = field(default_factory=dict)
    padding_multiple: int = 1
    tied: bool | None = None
    dtype: str | None = None

    @property
    def rows(self) -> int:
        """Rows of the embedding: the pieces, rounded up to the padding multiple."""
        return -(-self.size // self.padding_multiple) * self.padding_multiple

    def relation_to(self, other: "Vocabulary") -> Relation:
        """How this vocabulary stands to `other`: it *extends* other when other's pieces are its first ones."""
        if (self.size, self.digest) == (other.size, other.digest):
            return Relation.EQUAL if (self.bos, self.eos) == (other.bos, other.eos) else Relation.FOREIGN
        # what is appended may be the new EOS (ChatML's <|im_end|>); among the pieces of both it must be the same
        most = min(self.size, other.size)
        named = ((self.bos, other.bos), (self.eos, other.eos))
        if any(one != two and all(index is None or index < most for index in (one, two)) for one, two in named):
            return Relation.FOREIGN
        if self.prefixes.get(str(other.size)) == other.digest:
            return Relation.EXTENDS
        if other.prefixes.get(str(self.size)) == self.digest:
            return Relation.SHRINKS
        return Relation.FOREIGN

    def __str__(self) -> str:
        return f"{self.size} pieces ({self.digest[:8]})"


def padding_multiple(pieces: int, rows: int) -> int:
    """The smallest power of two that rounds `pieces` up to `rows`; `rows` itself where none does."""
    powers = (1 << power for power in range(rows.bit_length()))
    return next((multiple for multiple in powers if -(-pieces // multiple) * multiple == rows), rows)
