"""YAML of others: one reader, which trusts nothing of it.

PyYAML ends in errors of every kind where a tag does not fit its value (`!!int x`, a date of a month 13), and aliases
make of forty lines 2**40 values, which it holds and nobody can walk through.
"""

import re
from collections.abc import Iterable
from typing import Any

DEEPEST = 100
"""Mappings and lists in one another."""
MOST = 1_000_000
"""Values, those that aliases stand for each time."""
LONGEST_NUMBER = 1000
"""Characters. Hexadecimal digits become numbers that cannot be written again; sixties (`1:30:00`) take for ever."""
_WHOLE_NUMBER = re.compile(r"[-+]?(0[bx])?[0-9a-fA-F_:]+")
_WRONG = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
"""PyYAML's errors beside its YAMLError."""


def documents_of(content: bytes | str, aliases: bool = True) -> list[Any]:
    """Texts, numbers, dates, lists and mappings. ValueError, of one line, for what is no YAML, is nested too deeply, or
    is more than can be read. aliases: whether it may have some."""
    import yaml

    # libyaml, where PyYAML has it: ten times as fast
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _require_bounded(yaml.parse(content, loader), aliases)
        return list(yaml.load_all(content, loader))
    except (yaml.YAMLError, *_WRONG) as error:
        said = str(error) if isinstance(error, yaml.YAMLError | ValueError) else "a tag does not fit its value"
        raise ValueError(" ".join(said.split())[:300]) from error


def _require_bounded(events: Iterable[Any], aliases: bool) -> None:
    import yaml

    sizes: dict[str, int] = {}
    around: list[tuple[str | None, int]] = [(None, 0)]
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            around.append((event.anchor, 1))
            if len(around) > DEEPEST:
                raise ValueError("it is nested too deeply")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, count = around.pop()
        elif isinstance(event, yaml.AliasEvent):
            if not aliases:
                raise ValueError(f"it uses YAML's aliases; write out what *{event.anchor} is")
            if event.anchor not in sizes:
                raise ValueError(f"*{event.anchor} stands for nothing, or for what it is in")
            anchor, count = None, sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            anchor, count = event.anchor, 1
            whole = event.implicit[0] or (event.tag or "").endswith(":int")
            if whole and len(event.value) > LONGEST_NUMBER and _WHOLE_NUMBER.fullmatch(event.value):
                raise ValueError(f"a number has more than {LONGEST_NUMBER:,} characters")
        else:
            continue
        if anchor:
            sizes[anchor] = count
        holder, before = around[-1]
        around[-1] = holder, before + count
        if before + count > MOST:
            raise ValueError(f"it holds more than {MOST:,} values")
