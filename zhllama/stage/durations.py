"""Durations as options take them: 90s, 10m, 12h, 1.5d, 2w."""

import re
from contextlib import suppress
from datetime import timedelta

from zhllama.errors import InputError

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def read_duration(text: str, option: str) -> timedelta:
    """InputError for anything else, and for what is longer than a timedelta can be (2.7 million years)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text.strip(), re.ASCII)
    with suppress(OverflowError):
        if found:
            return timedelta(**{_UNITS[found[2]]: float(found[1])})
    raise InputError(f"{option} {text}: write a number and a unit: 90s, 10m, 12h, 7d or 2w")
