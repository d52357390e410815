"""Whether a regular expression of somebody else's file matches a name, in a time that is bounded.

Python's own matching goes back and tries again: `(a+)+b` against sixty letters takes longer than anybody waits. Here
every part of the expression is asked once for each place in the name where it may begin: (parts x places) steps, and
the answer is `re`'s. What would need more (references to what was matched, looking back) is refused.
"""

import importlib
import re
import time
from collections.abc import Callable, Iterable
from typing import Any

from zhllama.errors import InputError

LONGEST = 10_000
"""Characters of an expression."""
_PARSER: Any = importlib.import_module("re._parser")
_CATEGORIES = {"DIGIT": r"\d", "SPACE": r"\s", "WORD": r"\w", "NOT_DIGIT": r"\D", "NOT_SPACE": r"\S", "NOT_WORD": r"\W"}

Match = Callable[[str], bool]


def whole_match(pattern: str, left: list[float]) -> Match:
    """As re.fullmatch. ValueError for what is no regular expression, or more than is done here. left: the seconds that
    all of its user's patterns may take together, counted down here; InputError when they are over."""
    if len(pattern) > LONGEST:
        raise ValueError(f"a pattern of {len(pattern):,} characters")
    try:
        parsed = _PARSER.parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern[:80]!r} is no regular expression ({error})") from error
    if parsed.state.flags & ~re.UNICODE:
        raise ValueError(f"{pattern[:80]!r} sets flags")

    def match(name: str) -> bool:
        began = time.thread_time()
        try:
            found = len(name) in _Places(name).after(parsed, 0)
            left[0] -= time.thread_time() - began
        except RecursionError:
            left[0] = -1.0
        if left[0] < 0:
            raise InputError(f"the pattern {pattern[:80]!r} takes too long; give names in its place")
        return found

    _refuse(parsed)
    return match


def _refuse(parts: Iterable[Any]) -> None:
    for operation, given in parts:
        kind = str(operation)
        if kind == "BRANCH":
            for each in given[1]:
                _refuse(each)
        elif kind in ("SUBPATTERN", "MAX_REPEAT", "MIN_REPEAT"):
            _refuse(given[-1])
        elif kind in ("ASSERT", "ASSERT_NOT") and given[0] > 0:
            _refuse(given[1])
        elif kind not in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT"):
            raise ValueError(f"a pattern with {kind.lower()}")


class _Places:
    """Where the parts of an expression may end in a name, by where they begin."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._known: dict[tuple[int, int], frozenset[int]] = {}

    def after(self, parts: Any, begin: int) -> frozenset[int]:
        """Of a sequence of parts."""
        key = id(parts), begin
        if key not in self._known:
            places = frozenset([begin])
            for part in parts:
                places = frozenset().union(*(self._one(part, place) for place in places))
            self._known[key] = places
        return self._known[key]

    def _one(self, part: Any, at: int) -> Iterable[int]:
        kind, given = str(part[0]), part[1]
        if kind == "BRANCH":
            return frozenset().union(*(self.after(each, at) for each in given[1]))
        if kind == "SUBPATTERN":
            return self.after(given[-1], at)
        if kind in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, repeated = given
            return self._repeated(int(least), int(most), repeated, at)
        if kind in ("ASSERT", "ASSERT_NOT"):
            return [at] if bool(self.after(given[1], at)) == (kind == "ASSERT") else []
        if kind == "AT":
            return [at] if self._stands(str(given), at) else []
        return [at + 1] if at < len(self._name) and _fits(kind, given, self._name[at]) else []

    def _repeated(self, least: int, most: int, parts: Any, at: int) -> frozenset[int]:
        key = id(parts), -1 - at  # by the parts alone: a sequence is repeated by one operation
        if key in self._known:
            return self._known[key]
        if len(parts) == 1 and str(parts[0][0]) == "ANY" and "\n" not in self._name:
            return frozenset(range(at + least, min(len(self._name), at + most) + 1))
        places, found, count = frozenset([at]), frozenset[int](), 0
        while places and count <= most:
            if count >= least:
                if places <= found:
                    break
                found |= places
            further = frozenset().union(*(self.after(parts, place) for place in places))
            if further == places:
                # and so it would stay, however often
                found |= places
                break
            places, count = further, count + 1
        self._known[key] = found
        return found

    def _stands(self, where: str, at: int) -> bool:
        if where in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return at == 0
        if where in ("AT_END", "AT_END_STRING"):
            return at == len(self._name) or (where == "AT_END" and self._name[at:] == "\n")
        before, behind = (
            bool(re.fullmatch(r"\w", one)) for one in (self._name[max(0, at - 1) : at], self._name[at : at + 1])
        )
        return (before != behind) == (where == "AT_BOUNDARY")


def _fits(kind: str, given: Any, sign: str) -> bool:
    if kind == "LITERAL":
        return ord(sign) == given
    if kind == "NOT_LITERAL":
        return ord(sign) != given
    if kind == "ANY":
        return sign != "\n"
    inside = False
    for operation, value in given:
        what = str(operation)
        if what == "LITERAL":
            inside |= ord(sign) == value
        elif what == "RANGE":
            inside |= value[0] <= ord(sign) <= value[1]
        elif what == "CATEGORY":
            inside |= re.fullmatch(_CATEGORIES[str(value).removeprefix("CATEGORY_")], sign) is not None
    return inside != (str(given[0][0]) == "NEGATE")
