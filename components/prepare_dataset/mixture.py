"""Several sources as one stream, and which side of the split an example is on.

Unweighted sources are read one after another, whole. Weighted ones are interleaved so that at every point the tokens
taken stand in the ratio of the weights; the stream ends with the first source that is used up, so that nothing is
repeated and the ratio holds. No chance is involved.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from components.prepare_dataset.examples import Examples

TOGETHER = 500
"""Examples of a mixture that are passed on together."""


@dataclass
class Source:
    """A stream of examples with its weight, if any is given, and what was taken of it."""

    examples: Iterator[Examples]
    weight: float | None
    taken: int = 0
    tokens: int = 0
    used_up: bool = False
    _read: list[Examples] = field(default_factory=list, repr=False)
    """The batch that is being taken, what is left of it; or nothing."""

    @property
    def behind(self) -> float:
        """Tokens taken by weight: the source where it is least is the next one to take from."""
        return self.tokens / (self.weight or 1)

    def take(self, until: float, inclusive: bool) -> Examples | None:
        """The next example, and more of its batch while `behind` is below `until` before each (or, if `inclusive`,
        is no more than it). None when there is nothing left."""
        batch = self._read.pop() if self._read else next(self.examples, None)
        if batch is None:
            self.used_up = True
            return None
        behind = (self.tokens + batch.segments.lengths.cumsum()) / (self.weight or 1)
        count = min(int(behind.searchsorted(until, "right" if inclusive else "left")) + 1, len(batch))
        if count < len(batch):
            self._read.append(batch.part(count, len(batch)))
            batch = batch.part(0, count)
        self.taken += count
        self.tokens += len(batch.segments.ids)
        return batch


def mixed(sources: Sequence[Source]) -> Iterator[Examples]:
    """The examples of all sources, in the ratio of their weights."""
    if all(source.weight is None for source in sources):
        for source in sources:
            while (batch := source.take(math.inf, inclusive=True)) is not None:
                yield batch
        return
    together: list[Examples] = []
    while (batch := _next(sources)) is not None:
        together.append(batch)
        if sum(map(len, together)) >= TOGETHER:
            yield Examples.joined(together)
            together = []
    if together:
        yield Examples.joined(together)


def _next(sources: Sequence[Source]) -> Examples | None:
    """Some examples of the source that is behind, as many as it has to give before another one is."""
    (_, number), (until, other), *_ = (*sorted((one.behind, at) for at, one in enumerate(sources)), (math.inf, -1))
    return sources[number].take(until, inclusive=number < other)


def held_out(identities: Sequence[bytes], fraction: float, seed: int) -> np.ndarray:
    """Whether each content belongs to the validation split, bool [contents]: the same content always does, in any
    corpus and order."""
    # a hash that has taken the seed already: half of what a short text's hash costs
    keyed = hashlib.blake2b(digest_size=8, key=str(seed).encode())

    def drawn(identity: bytes) -> bytes:
        taken = keyed.copy()
        taken.update(identity)
        return taken.digest()

    numbers = np.frombuffer(b"".join(map(drawn, identities)), "<u8")
    # as whole numbers, since 64 bits are more than a float has
    limit = math.ceil(fraction * 2**64)
    return numbers <= np.uint64(limit - 1) if limit else np.zeros(len(numbers), bool)
