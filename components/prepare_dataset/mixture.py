"""Several sources as one stream, and which side of the split an example is on.

Unweighted sources are read one after another, whole. Weighted ones are interleaved so that at every point the tokens
taken stand in the ratio of the weights; the stream ends with the first source that is used up, so that nothing is
repeated and the ratio holds. No chance is involved.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from components.prepare_dataset.examples import Example


@dataclass
class Source:
    """A stream of examples with its weight, and what was taken of it."""

    examples: Iterator[Example]
    weight: float
    taken: int = 0
    tokens: int = 0
    used_up: bool = False


def mixed(sources: Sequence[Source]) -> Iterator[Example]:
    """The examples of all sources, in the ratio of their weights."""
    if all(source.weight == 1 for source in sources):
        for source in sources:
            for example in source.examples:
                source.taken += 1
                source.tokens += len(example.segment.ids)
                yield example
            source.used_up = True
        return
    while True:
        source = min(sources, key=lambda source: source.tokens / source.weight)
        found = next(source.examples, None)
        if found is None:
            source.used_up = True
            return
        source.taken += 1
        source.tokens += len(found.segment.ids)
        yield found


def is_held_out(identity: bytes, fraction: float, seed: int) -> bool:
    """Whether this content belongs to the validation split: the same content always does, in any corpus and order."""
    drawn = _keyed(seed).copy()
    drawn.update(identity)
    return int.from_bytes(drawn.digest(), "little") < fraction * 2**64


@cache
def _keyed(seed: int) -> "hashlib.blake2b":
    """A hash that has taken the seed already: half of what a short text's hash costs."""
    return hashlib.blake2b(digest_size=8, key=str(seed).encode())
