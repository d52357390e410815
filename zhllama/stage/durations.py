"""Durations as options take them: 90s, 10m, 12h, 1.5d, 2w."""

import re
from datetime import timedelta

from zhllama.errors import InputError

_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhdw])", re.ASCII)
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def read_duration(text: str, option: str) -> timedelta:
    """InputError for anything else."""
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise InputError(f"{option} {text}: write a number and a unit: 90s, 10m, 12h, 7d or 2w")
    try:
        return timedelta(**{_UNITS[found[2]]: float(found[1])})
    except OverflowError as error:
        raise InputError(f"{option} {text}: longer than the 2.7 million years that can be told; write less") from error
