"""Kubernetes' quantities as numbers."""

from typing import Any

from zhllama.kubernetes.formats import amount


def quantity(value: Any) -> float | None:
    """A Kubernetes quantity as a number, None for what is none: `500m`, `64Gi`, `1e3`, 8."""
    found = amount(value)
    return None if found is None else float(found)
