"""Answers of real servers, recorded; tests hold what we believe against them. README.md says how they were made."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


@functools.cache
def scenario(name: str) -> dict[str, Any]:
    """A recorded course of a job: what was asked, and what a watch saw of it, in seconds since the first request."""
    found: dict[str, Any] = json.loads((FOLDER / "scenarios" / f"{name}.json").read_text())
    return found


@functools.cache
def exchanges() -> dict[str, dict[str, Any]]:
    """What a real API server was asked, and what it answered, by what it is about: `conflict/exists-pytorchjob`."""
    files = sorted((FOLDER / "responses").glob("*.json"))
    return {one["id"]: one for file in files for one in json.loads(file.read_text())["exchanges"]}


def answered(name: str) -> dict[str, Any]:
    """The answer of a recorded exchange: `status`, and `body` (JSON) or `text`."""
    found: dict[str, Any] = exchanges()[name]["response"]
    return found


class Replay:
    """The API server as a client saw it while a recording was made, moment by moment."""

    def __init__(self, name: str) -> None:
        self.events = scenario(name)["events"]
        self.job: dict[str, Any] | None = None
        self.pods: dict[str, dict[str, Any]] = {}
        self.warnings: list[str] = []

    def moments(self) -> Iterator[float]:
        """Seconds; after each the objects are as they were then."""
        for event in self.events:
            thing = event.get("object") or {}
            kind, name = thing.get("kind"), (thing.get("metadata") or {}).get("name", "")
            if kind == "PyTorchJob":
                self.job = None if event["type"] == "DELETED" else thing
            elif kind == "Pod" and event["type"] == "DELETED":
                self.pods.pop(name, None)
            elif kind == "Pod":
                self.pods[name] = thing
            elif kind == "Event" and thing.get("type") == "Warning":
                self.warnings.append(f"{thing.get('reason', '')}: {thing.get('message', '')}".strip())
            else:
                continue
            yield float(event["t"])
