"""Answers of real servers, recorded; tests hold what we believe against them. README.md says how they were made."""

import copy
import functools
import gzip
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


@functools.cache
def scenario(name: str) -> dict[str, Any]:
    """A recorded course of a job: what was asked, and what a watch saw of it, in seconds since the first request."""
    path = FOLDER / "scenarios" / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else _more_scenarios()[name]
    return found


def scenarios() -> list[str]:
    """The names of all."""
    return sorted([path.stem for path in (FOLDER / "scenarios").glob("*.json")] + list(_more_scenarios()))


@functools.cache
def _more_scenarios() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(gzip.decompress((FOLDER / "scenarios/more.json.gz").read_bytes()))
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


@functools.cache
def crds(kind: str = "") -> Path:
    """A folder with the definitions of custom resources that the recording server had, or with one kind's alone: all
    take seconds to read."""
    folder = Path(tempfile.mkdtemp(prefix="zhllama-crds-"))
    for path in (FOLDER / "crds").glob(f"*_{kind.lower()}s.yaml.gz" if kind else "*.gz"):
        (folder / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    return folder


@functools.cache
def verdicts() -> dict[str, dict[str, Any]]:
    """Objects that were posted, each with the server's verdict, by what they are about; `text`: as posted."""
    entries = json.loads(gzip.decompress((FOLDER / "admission.json.gz").read_bytes()))["entries"]
    found = {one["id"]: one for one in entries}
    for one in entries:
        if "object_from" in one:
            one["object"] = _patched(found[one["object_from"]]["object"], one["object_patch"])
        one.setdefault("text", json.dumps(one.get("object"), ensure_ascii=False))
    return found


def _patched(value: Any, patch: list[dict[str, Any]]) -> Any:
    """As RFC 6902 says: add, remove, replace."""
    made = copy.deepcopy(value)
    for step in patch:
        *way, last = [part.replace("~1", "/").replace("~0", "~") for part in step["path"].split("/")[1:]]
        at = made
        for part in way:
            at = at[int(part)] if isinstance(at, list) else at[part]
        key: Any = last
        if isinstance(at, list):
            key = len(at) if last == "-" else int(last)
        if step["op"] == "remove":
            del at[key]
        elif step["op"] == "add" and isinstance(at, list):
            at.insert(key, step["value"])
        else:
            at[key] = step["value"]
    return made


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
