"""Kubernetes' quantities as numbers."""

import re
from typing import Any

_UNITS = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_UNITS |= {f"{prefix}i": 2.0 ** (10 * power) for power, prefix in enumerate("KMGTP", start=1)}


def quantity(value: Any) -> float | None:
    """A Kubernetes quantity as a number, None for what is none: `500m`, `64Gi`, `1e3`, 8."""
    found = re.fullmatch(r"([0-9.]+(?:[eE][+-]?\d+)?)(m|k|[KMGTP]i?)?", str(value))
    try:
        return float(found[1]) * _UNITS[found[2] or ""] if found else None
    except (ValueError, KeyError):
        return None
