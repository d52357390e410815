"""Whether a regular expression of somebody else's file matches a name, in a time that is bounded.

Python's own matching goes back and tries again: `(a+)+b` against sixty letters takes longer than anybody waits, and
nothing stops it. The package regex (transformers needs it too) stops at a time limit; what it reads otherwise than `re`
is refused.
"""

import math
import re
import time
from collections.abc import Callable

from zhllama.errors import InputError

LONGEST = 10_000
"""Characters of an expression."""
_MOST_REPEATS = 1000
"""What `{1000}` may come to, one within another: regex writes them out (0.7 GB for a million)."""
_OTHERWISE = re.compile(r"\{(?![\d,])|\[\[?:")
"""Approximate matching and POSIX classes, in regex alone."""

Match = Callable[[str], bool]


def whole_match(pattern: str, left: list[float], where: str) -> Match:
    """As re.fullmatch. ValueError for what is no regular expression, or more than is done here. left: the seconds that
    all of its user's patterns may take together, counted down here; InputError, which begins with `where`, when they
    are over."""
    import regex

    if len(pattern) > LONGEST:
        raise ValueError(f"a pattern of {len(pattern):,} characters")
    if math.prod(max(1, int(count)) for count in re.findall(r"\{(\d{1,9})", pattern)) > _MOST_REPEATS:
        raise ValueError(f"the pattern {pattern[:80]!r} repeats too often")
    if _OTHERWISE.search(pattern):
        raise ValueError(f"the pattern {pattern[:80]!r} has braces without a number, or a POSIX class")
    try:
        re.compile(pattern)
        compiled = regex.compile(pattern)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern[:80]!r} is no regular expression ({error})") from error

    def match(name: str) -> bool:
        began = time.thread_time()
        try:
            found = compiled.fullmatch(name, timeout=max(left[0], 0.001)) is not None
        except TimeoutError:
            found, left[0] = False, 0.0
        left[0] -= time.thread_time() - began
        if left[0] < 0:
            raise InputError(f"{where}: the pattern {pattern[:80]!r} takes too long; give names in its place")
        return found

    return match
