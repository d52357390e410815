"""Spans of numbers, as one array."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def spans(starts: "np.ndarray", lengths: "np.ndarray") -> "np.ndarray":
    """The numbers from each start on, as many as its length says, one span after another: int64 [sum of lengths]."""
    import numpy as np

    ends = lengths.cumsum()
    numbers = np.arange(ends[-1] if len(ends) else 0)
    numbers += np.repeat(starts - (ends - lengths), lengths)
    return numbers
