"""Goldens: what the program does today, kept as files that a change is held against.

`UPDATE_GOLDENS=1 pytest PATH` writes them again (in one process: no xdist); look at the diff before you commit it.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GOLDENS = Path(__file__).parent / "goldens"
MOST_LINES = 40
"""Of a difference that are shown."""


def updating() -> bool:
    return bool(os.environ.get("UPDATE_GOLDENS"))


def lines_of(value: Any, place: str = "") -> Iterator[str]:
    """`train_lora/image: zhllama-launch-training`, a line for each text and number; a list's have one place."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from lines_of(inner, f"{place}/{name}" if place else str(name))
    elif isinstance(value, list) and value:
        for inner in value:
            yield from lines_of(inner, place)
    else:
        yield f"{place}: {json.dumps(value, ensure_ascii=False)}"


def difference(golden: Any, found: Any) -> str:
    """Empty where the two are equal; else what is gone (-) and what is new (+)."""
    if golden == found:
        return ""
    before, after = list(lines_of(golden)), list(lines_of(found))
    gone, new = Counter(before) - Counter(after), Counter(after) - Counter(before)
    said = [f"- {line}" for line in gone.elements()] + [f"+ {line}" for line in new.elements()]
    if not said:
        return "the same lines in another order: " + next(
            f"{one!r} where {other!r} was" for other, one in zip(before, after, strict=True) if one != other
        )
    # by place, so that what was and what is stand together
    said.sort(key=lambda line: line[2:].partition(":")[0])
    return "\n".join(said[:MOST_LINES] + [f"… {len(said) - MOST_LINES} lines more"] * (len(said) > MOST_LINES))


def as_json(value: Any) -> Any:
    """As it comes back from a file."""
    return json.loads(json.dumps(value))


def check(file: Path, key: str, found: Any) -> None:
    """Fails when `found` is not what the golden file holds under the key."""
    held = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if updating():
        held[key] = found
        file.write_text(json.dumps(held, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
        return
    assert key in held, f"{file.name} has no {key!r}: UPDATE_GOLDENS=1 writes it"
    said = difference(held[key], as_json(found))
    assert not said, f"{key} is not as in {file.name} (UPDATE_GOLDENS=1 writes it again):\n{said}"
