"""JSON objects of other programs' files: one reader, which trusts nothing of them."""

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zhllama.artifacts.reader import Artifact

LARGEST = 64 * 2**20
"""Bytes. The index of a model with 10,000 tensors has one megabyte."""


def read_object(artifact: "Artifact", name: str) -> dict[str, Any]:
    """The object in a file of an artifact. ValueError for what object_of refuses, and for a file that is too large."""
    if (size := artifact.file(name).size) > LARGEST:
        raise ValueError(f"it has {size:,} bytes, and {LARGEST:,} are read at most")
    return object_of(artifact.read(name))


def object_of(content: bytes | str) -> dict[str, Any]:
    """ValueError for what is no JSON, no object, names a key twice (which would count?), or is nested without end."""
    try:
        value = json.loads(content, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__} stands where an object is needed")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it has {twice!r} twice")
    return found
