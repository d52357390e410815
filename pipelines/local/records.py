"""What a step did, kept beside its log, so that a later run can see that there is nothing to do.

A stage skips itself when its work is published, in one or two seconds; fifteen stages that each say so take half a
minute. The record answers in milliseconds, and only when it is sure: same command, same code and packages, same content
behind every address in the command, and the published files still there. Anything else: the stage is asked.
"""

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipelines.local.placeholders import Value
from zhllama import storage
from zhllama.artifacts.manifest import MANIFEST, Manifest, digest_of
from zhllama.errors import InputError

RECORD = "record.json"


@dataclass(frozen=True)
class Record:
    """One finished step."""

    key: str
    inputs: Mapping[str, Value]
    parameters: Mapping[str, Value]
    artifacts: Mapping[str, str]
    metrics: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def reference(self) -> str:
        """The reference that the step wrote; empty when it wrote none."""
        value = self.parameters.get("ref")
        return value if isinstance(value, str) else ""

    def manifest(self) -> Manifest | None:
        """The manifest among the step's output artifacts, as it was copied there."""
        for path in self.artifacts.values():
            found = _manifest_in(path)
            if found is not None and found.reference == self.reference:
                return found
        return None

    def write(self, folder: Path) -> None:
        storage.write_bytes(str(folder / RECORD), (json.dumps(asdict(self), ensure_ascii=False) + "\n").encode())


def _manifest_in(path: str) -> Manifest | None:
    try:
        content = Path(path).read_bytes()
        return Manifest.from_json(content, path) if content[:1] == b"{" else None
    except (OSError, InputError):
        return None


def read_record(folder: Path) -> Record | None:
    """The record of a step; None when there is none (or half of one)."""
    try:
        return Record(**json.loads((folder / RECORD).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def forget(folder: Path) -> None:
    """Makes a step run again: its record and the manifest it published are taken away (its files stay)."""
    record = read_record(folder)
    (folder / RECORD).unlink(missing_ok=True)
    if record is not None and (manifest := record.manifest()) is not None:
        storage.delete(manifest.reference)


def still_there(record: Record) -> bool:
    """Whether what the step published is where it was: same manifest, every file of its size."""
    manifest = record.manifest()
    if manifest is None:
        return False
    try:
        stored = Manifest.from_json(storage.read_bytes(manifest.reference), manifest.reference)
    except (FileNotFoundError, NotADirectoryError, InputError):
        return False
    there = {item.name: item.size for item in storage.listing(manifest.root)}
    return stored.digest == manifest.digest and all(there.get(file.path) == file.size for file in manifest.files)


def key_of(words: Sequence[str], inputs: Mapping[str, Value]) -> str:
    """What decides a step's result. `words`: its command, with inputs filled in and outputs left as placeholders."""
    behind = {name: contents(value) for name, value in inputs.items() if name != "store" and isinstance(value, str)}
    return digest_of({"words": list(words), "code": code_digest(), "versions": versions_digest(), "behind": behind})


def contents(value: str) -> list[Any]:
    """What lies behind the addresses in a text now: names, sizes and tags; nothing for ordinary text."""
    found: list[Any] = []
    for part in filter(None, value.split(",")):
        address = re.sub(r":(\d+(\.\d+)?|\.\d+)$", "", part.strip())
        if storage.is_s3(address) or (len(address) < 4096 and "\0" not in address and Path(address).exists()):
            found.append(_behind(storage.normalise(address)))
    return found


def _behind(uri: str) -> list[Any]:
    if uri.endswith(f"/{MANIFEST}"):
        try:
            return [hashlib.sha256(storage.read_bytes(uri)).hexdigest()]
        except FileNotFoundError:
            return ["gone"]
    if not storage.is_s3(uri) and Path(uri).is_file():
        status = Path(uri).stat()
        return [status.st_size, status.st_mtime_ns]
    return [[item.name, item.size, item.tag] for item in storage.listing(uri)]


@lru_cache(maxsize=1)
def code_digest() -> str:
    """SHA-256 over the library and the stages: a change anywhere makes every stage look for itself."""
    root = Path(__file__).parents[2]
    running = hashlib.sha256()
    for path in sorted(path for folder in ("zhllama", "components") for path in (root / folder).rglob("*")):
        if path.is_file() and path.suffix in (".py", ".json", ".yaml", ".txt", ".html", ".jinja"):
            running.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return running.hexdigest()


@lru_cache(maxsize=1)
def versions_digest() -> str:
    """SHA-256 over the names and versions of all installed packages."""
    found = sorted(f"{item.name}=={item.version}" for item in importlib.metadata.distributions())
    return hashlib.sha256("\n".join(found).encode()).hexdigest()
