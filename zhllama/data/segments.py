"""Many segments (documents, or pieces of them) in a few arrays: a tenth of the work on one after another.

What is learned of a segment is all behind its prompt, or, of a conversation, what its marks say: several answers, and
where one document of an item ends and the next begins. Marks cost a byte a token, so text and single answers have none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from zhllama.tokenizer.spans import spans

if TYPE_CHECKING:
    import numpy as np

MASKED, LEARNED, BEGINS = range(3)
"""Marks of a token. BEGINS: masked, and the first of a further document."""


@dataclass(frozen=True)
class Segments:
    """In order, one after another."""

    ids: "np.ndarray"
    """[tokens]: the ids of all, one segment after another."""
    lengths: "np.ndarray"
    """int64 [segments]: how many ids each has."""
    prompts: "np.ndarray"
    """int64 [segments]: how many of these, from the first on, are prompt."""
    marks: "np.ndarray | None" = None
    """uint8 [tokens]: the mark of each; None where all behind a prompt is learned."""

    @property
    def marked(self) -> "np.ndarray":
        """The marks, made where there are none."""
        import numpy as np

        if self.marks is not None:
            return self.marks
        places = spans(np.zeros_like(self.lengths), self.lengths)
        return (places >= np.repeat(self.prompts, self.lengths)).astype(np.uint8)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The segments of all parts, at least one, in order."""
        import numpy as np

        if len(parts) == 1:
            return parts[0]
        ids, lengths, prompts = (
            np.concatenate([getattr(part, of) for part in parts]) for of in ("ids", "lengths", "prompts")
        )
        marked = any(part.marks is not None for part in parts)
        return cls(ids, lengths, prompts, np.concatenate([part.marked for part in parts]) if marked else None)

    def __len__(self) -> int:
        return len(self.lengths)

    def part(self, begin: int, end: int) -> Self:
        """The segments from `begin` to `end`, as views."""
        lengths = self.lengths[begin:end]
        first = int(self.lengths[:begin].sum())
        return self.at(slice(first, first + int(lengths.sum())), lengths, self.prompts[begin:end])

    def where(self, kept: "np.ndarray") -> Self:
        """The segments for which `kept` is true."""
        import numpy as np

        # ids by a mask: by places, as `take` has them, many short segments cost up to 16 times as much
        return self.at(np.repeat(kept, self.lengths), self.lengths[kept], self.prompts[kept])

    def take(self, chosen: "np.ndarray") -> Self:
        """The segments of these numbers, in this order."""
        lengths = self.lengths[chosen]
        starts = self.lengths.cumsum() - self.lengths
        return self.at(spans(starts[chosen], lengths), lengths, self.prompts[chosen])

    def at(self, tokens: Any, lengths: "np.ndarray", prompts: "np.ndarray") -> Self:
        """Segments of these of its tokens."""
        return type(self)(self.ids[tokens], lengths, prompts, None if self.marks is None else self.marks[tokens])

    def documents(self) -> Self:
        """Apart where marks say that a further document begins."""
        import numpy as np

        if self.marks is None:
            return self
        begins = np.flatnonzero(self.marks == BEGINS)
        starts = np.union1d(self.lengths.cumsum() - self.lengths, begins)
        lengths = np.diff(starts, append=len(self.ids))
        learned = np.append(np.flatnonzero(self.marks == LEARNED), len(self.ids))
        first = learned[np.searchsorted(learned, starts)]
        return type(self)(self.ids, lengths, np.minimum(first - starts, lengths), self.marks)

    def runs(self) -> tuple["np.ndarray", "np.ndarray", "np.ndarray"]:
        """What is learned: of each run of learned tokens, one at least a segment, int64: where it begins, where it ends
        (of all ids), and its segment. A segment's first token never is, since nothing stands before it. ValueError (a
        bug) for a segment that ends behind its last answer."""
        import numpy as np

        ends = self.lengths.cumsum()
        numbers = np.arange(len(self))
        if self.marks is None:
            prompts = np.minimum(self.prompts, self.lengths)
            return ends - self.lengths + np.maximum(prompts, 1), ends, numbers
        learned = self.marks == LEARNED
        learned[ends - self.lengths] = False
        edges = np.diff(learned.astype(np.int8), prepend=0, append=0)
        starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
        owners = np.searchsorted(ends, starts, side="right")
        # one without anything to learn has an empty run
        empty = np.setdiff1d(numbers, owners)
        owners = np.concatenate([owners, empty])
        order = np.argsort(owners, kind="stable")
        starts, stops = (np.concatenate([of, ends[empty]])[order] for of in (starts, stops))
        owners = owners[order]
        if (stops[np.flatnonzero(np.diff(owners, append=len(self)))] != ends).any():
            raise ValueError("a segment that ends behind its last answer")
        return starts, stops, owners


class Blocks(NamedTuple):
    """Blocks one after another: the first holds the first `counts[0]` of the segments, and so on."""

    segments: Segments
    counts: "np.ndarray"
    """int64 [blocks]: how many segments each has."""
