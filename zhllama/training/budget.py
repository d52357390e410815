"""How much of what a model knew a training may cost, and what keeps it there: more replay first, a lower rate next.

The figure is the loss of held-out replay text, and what counts is its distance from the base's as a share of the
budget (1: all of it is spent). With tokens and bytes the same each time, that is the distance in bits per byte too. The
control is proportional, quick to act and slow to let go: a decision follows from the figure, the one before it and the
decision before, which is all that a checkpoint has to carry of it.

    spent            0        ¼        ¾        1
    share of replay  ¼ given  given    0.9      0.9
    learning rate    whole    whole    whole    a tenth

Between these it is linear. A figure that rises is taken for what it will be at the next measurement, if it goes on so.
From one measurement to the next the share falls to no less than 0.7 of itself, and the rate no more than doubles.
"""

import itertools
from dataclasses import asdict, dataclass
from typing import Any

MOST = 0.9
"""Of a step's learned tokens, at most so many are replayed, unless more was asked for from the beginning."""
LEAST = 0.25
"""And of the share that was asked for at least so much, while nothing is lost."""
SLOWEST = 0.1
"""What is left of the learning rate when all of the budget is spent."""
LETS_GO, RECOVERS = 0.7, 2.0


@dataclass(frozen=True)
class Decision:
    """What holds until the next measurement."""

    share: float
    """Of a step's learned tokens that are replayed."""
    rate: float = 1.0
    """What the learning rate is multiplied by."""
    spent: float = 0.0
    """Of the budget: 1 when the figure is `budget` above the base's; below 0 where it is better than that."""


class Budget:
    """Decides at each measurement. `budget`: relative, 0.03 is 3%; 0: nothing is decided, the share stays. `base`: the
    base's figure, where an earlier training measured it; else the first one given is."""

    def __init__(self, budget: float, share: float, base: float | None = None) -> None:
        self._budget, self._share = budget, share
        self.base = base
        self._before: float | None = None
        self.decision = Decision(share)

    def measured(self, loss: float) -> Decision:
        """Takes a loss of held-out replay text, in any unit that is the same each time; above 0."""
        if self.base is None:
            self.base = loss
        if self._budget:
            spent = (loss / self.base - 1) / self._budget
            expected = spent if self._before is None else max(spent, 2 * spent - self._before)
            begins = self._before is None and spent == 0
            self.decision = Decision(self._share) if begins else decide(self._share, expected, spent, self.decision)
            self._before = spent
        return self.decision

    def state(self) -> dict[str, Any]:
        """For a checkpoint: as JSON."""
        return {"base": self.base, "before": self._before, "decision": asdict(self.decision)}

    def restore(self, state: dict[str, Any]) -> None:
        self.base, self._before = state["base"], state["before"]
        self.decision = Decision(**state["decision"])


def decide(share: float, expected: float, spent: float, before: Decision) -> Decision:
    """From the share that was asked for, what of the budget is and what will be spent at the next measurement, and what
    has held until now."""
    most = max(share, MOST)
    replayed = _line(expected, (0.0, LEAST * share), (0.25, share), (0.75, most))
    rate = _line(expected, (0.75, 1.0), (1.0, SLOWEST))
    return Decision(max(replayed, LETS_GO * before.share), min(rate, RECOVERS * before.rate), spent)


def _line(at: float, *knots: tuple[float, float]) -> float:
    """The value at a place of a line through knots, level before the first and after the last."""
    if at <= knots[0][0]:
        return knots[0][1]
    for (left, low), (right, high) in itertools.pairwise(knots):
        if at <= right:
            # so that it ends in `high` to the last bit
            part = (at - left) / (right - left)
            return low * (1 - part) + high * part
    return knots[-1][1]
