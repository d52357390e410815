"""What runs inside a program's own environment: reads what is asked, tries things, writes what it saw as JSON."""

import json
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

asked: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
LINES: list[str] = asked["lines"]
CHATS: list[list[dict[str, str]]] = asked["chats"]
ANSWER: int = asked["answer"]
HEAD: int = asked["head"]
OUT = Path(asked["out"])
seen: list[dict[str, Any]] = []


def texts(of: str) -> list[list[int]]:
    """The ids of the lines and the chats of a model, as its makers say them: what logits are asked for."""
    return [*asked["said"][of]["ids"], *asked["said"][of]["chats"]]


def probe(of: str) -> list[str]:
    """The many lines of which a byte-level model's ids are asked for; none of another's."""
    return list(asked["probe"].get(of, ()))


def attempt(what: str, try_it: Callable[..., dict[str, Any]], of: str, *more: Any) -> None:
    """One thing tried on what is called `of`: what `try_it(of, *more)` returned, arrays as files, or how it failed.

    Returned are some of `ids`, `probe`, `chats` (lists of ids); of each of `texts`, `logits` (positions × words) or
    `next` (log probabilities after its end); of a greedy answer to each of CHATS, `answers` (ids), `spoken` (text),
    `chosen` (log probabilities of what was said); `likelihood` (a list of one list: of lines after their first HEAD
    signs, where none is white space); `precision`; of a merge `tensors` (how many are ours to the bit, how many there
    are, the greatest difference as a share of its tensor's greatest weight); `saved` (a folder), `kind` ("model",
    "adapter"), `base` (what an adapter is for).
    """
    try:
        found = try_it(of, *more)
        for name in ("logits", "next", "chosen", "likelihood"):
            if name in found:
                path = OUT / f"{len(seen)}-{name}.npz"
                np.savez(path, *found[name])
                found[name] = str(path)
    except Exception as error:  # noqa: BLE001 - whatever another program does is what is looked at
        traceback.print_exc()
        found = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    seen.append({"what": what, "of": of, **found})


def finish(*packages: str) -> None:
    versions = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    (OUT / "seen.json").write_text(json.dumps({"versions": versions, "seen": seen}), encoding="utf-8")
