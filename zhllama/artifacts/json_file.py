"""JSON of other programs (files, answers of servers, lines of data): one reader, which trusts nothing of it."""

import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zhllama.artifacts.reader import Artifact

LARGEST = 64 * 2**20
"""Bytes. The index of a model with 10,000 tensors has one megabyte."""
DEEPEST = 100
"""Objects and lists in one another: what is read is written again, by programs that call themselves for each."""
_DECODER = json.JSONDecoder()
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""Where half a surrogate pair may be, or a whole one."""


class HalfCharacter(ValueError):
    """Half of a surrogate pair stands alone: JSON, but no text."""


def read_object(artifact: "Artifact", name: str) -> dict[str, Any]:
    """The object in a file of an artifact. ValueError for what object_of refuses, and for a file that is too large."""
    if (size := artifact.file(name).size) > LARGEST:
        raise ValueError(f"it has {size:,} bytes, and {LARGEST:,} are read at most")
    return object_of(artifact.read(name))


def object_of(content: bytes | str) -> dict[str, Any]:
    """ValueError for what value_of refuses, for what is no object, or names a key twice."""
    value = value_of(content, STRICT)
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__} stands where an object is needed")
    return value


def value_of(content: bytes | str, decoder: json.JSONDecoder = _DECODER) -> Any:
    """ValueError for what is no JSON, is not the encoding that it seems to have, is nested without end, or holds half a
    surrogate pair, which no file can."""
    try:
        text = content if isinstance(content, str) else content.decode(json.detect_encoding(content))
        value = decoder.decode(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError as error:
        if found := stand_in(content):
            raise ValueError(found) from error
        raise
    return whole(value, text)


def whole(value: Any, text: str) -> Any:
    """A value that was read from a text; ValueError when it is nested too deeply, or holds half a surrogate pair."""
    if text.count("[") + text.count("{") > DEEPEST:
        level = [value]
        for _ in range(DEEPEST):
            holding = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list))
            level = [member for members in holding for member in members]
        if level:
            raise ValueError("it is nested too deeply")
    if _HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise HalfCharacter("it has half of a surrogate pair") from error
    return value


def said_of(error: ValueError) -> str:
    """What is wrong with a line or an item, after its name."""
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 ({error.reason})"
    return "has half of a surrogate pair" if isinstance(error, HalfCharacter) else f"is not JSON ({error})"


def stand_in(content: bytes | str) -> str:
    """What lies in the place of a file, as a clone without LFS and servers leave it; empty for anything else."""
    head = content[:1024]
    head = (head if isinstance(head, str) else head.decode(errors="replace")).lstrip("\ufeff \t\r\n")
    if head.startswith("version https://git-lfs"):
        return "it is a git-lfs pointer in place of the file: git lfs pull brings that"
    if head.startswith("<"):
        return f"it is a page (HTML or XML) in place of the file, as servers answer: {head[:40]!r}"
    return ""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it has {twice!r} twice")
    return found


STRICT = json.JSONDecoder(object_pairs_hook=_once)
"""Takes no object that has a key twice: which would count?"""
