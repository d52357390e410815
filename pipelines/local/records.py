"""What a step did, kept beside its log, so that a later run can see that there is nothing to do; how a run ended.

Fifteen stages that each say that their work is published take half a minute. The record answers in milliseconds, where
it is sure: same command, code, packages and content behind every address, and the published files still there.
"""

import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from pipelines.local.placeholders import Surroundings, Value, is_of, value_of
from pipelines.local.plan import Node
from zhllama import storage
from zhllama.artifacts.json_file import object_of
from zhllama.artifacts.manifest import MANIFEST, Manifest, digest_of, read_manifest
from zhllama.artifacts.open import open_artifact
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
    published: str = ""
    """The manifest that `ref` led to, as text; empty where it led to none."""
    provenance: str = ""
    """What lay beside it."""

    @property
    def reference(self) -> str:
        """The reference that the step wrote; empty when it wrote none."""
        value = self.parameters.get("ref")
        return value if isinstance(value, str) else ""

    @cached_property
    def manifest(self) -> Manifest | None:
        """What the step published, as it stood when the step had ended; None when it published nothing."""
        if not self.published:
            return None
        root = self.reference.removesuffix(f"/{MANIFEST}")
        manifest = Manifest.from_json(self.published.encode(), self.reference, root)
        return manifest.told(self.provenance.encode() or None)

    def still_there(self) -> bool:
        """Whether what the step published is where it was: same manifest, every file of its size."""
        manifest = self.manifest
        if manifest is None:
            return False
        try:
            stored = open_artifact(manifest.reference)
        except InputError:
            # nothing, a damaged one, a store that is not to be had: the stage is asked, and says so
            return False
        wanted = {file.path: file.size for file in manifest.named}
        return stored.digest == manifest.digest and not any(storage.not_as_wanted(manifest.root, wanted))

    def write(self, folder: Path) -> None:
        storage.write_bytes(str(folder / RECORD), (json.dumps(asdict(self), ensure_ascii=False) + "\n").encode())


def read_record(folder: Path) -> Record | None:
    """The record of a step; None when there is none (or half of one)."""
    try:
        return Record(**object_of((folder / RECORD).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def forget(folder: Path) -> None:
    """Makes a step run again: its record and the manifest it published are taken away (its files stay)."""
    record = read_record(folder)
    (folder / RECORD).unlink(missing_ok=True)
    if record is not None and record.manifest is not None:
        storage.delete(record.reference)


def key_of(words: Sequence[str], inputs: Mapping[str, Value]) -> str:
    """What decides a step's result. `words`: its command, without the folder of its outputs."""
    behind = {name: _contents(value) for name, value in inputs.items() if name != "store" and isinstance(value, str)}
    return digest_of({"words": list(words), **_surroundings(), "behind": behind})


def _contents(value: str) -> list[Any]:
    """What lies behind the addresses in a text now: names, sizes and tags; nothing for ordinary text."""
    found: list[Any] = []
    for part in filter(None, value.split(",")):
        address = re.sub(r":(\d+(\.\d+)?|\.\d+)$", "", part.strip())
        local = not storage.is_s3(address)
        # Path.exists raises for a text that is too long for a name
        if local and not os.path.exists(address):
            continue
        uri = storage.normalise(address)
        if uri.endswith(f"/{MANIFEST}"):
            content = storage.read_or_none(uri)
            found.append(["gone" if content is None else hashlib.sha256(content).hexdigest()])
        elif local and Path(uri).is_file():
            status = Path(uri).stat()
            found.append([status.st_size, status.st_mtime_ns])
        else:
            found.append([[item.name, item.size, item.tag] for item in storage.listing(uri)])
    return found


@cache
def _surroundings() -> dict[str, str]:
    """SHA-256 over the library and the stages (a change anywhere makes every stage look for itself), and over the
    names and versions of all installed packages."""
    root = Path(__file__).parents[2]
    code = hashlib.sha256()
    for path in sorted(path for folder in ("zhllama", "components") for path in (root / folder).rglob("*")):
        if path.is_file() and path.suffix in (".py", ".json", ".yaml", ".txt", ".html", ".jinja"):
            code.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    versions = sorted(f"{item.name}=={item.version}" for item in importlib.metadata.distributions())
    return {"code": code.hexdigest(), "versions": hashlib.sha256("\n".join(versions).encode()).hexdigest()}


def outputs_written(node: Node, around: Surroundings) -> tuple[dict[str, Value], dict[str, Any], Manifest | None]:
    """The output parameters that a step wrote, its metrics, and the manifest that its `ref` leads to.
    InputError for an output that is missing or of another type."""
    content = storage.read_or_none(around.output_file)
    try:
        executor = object_of(b"{}" if content is None else content)
    except ValueError as error:
        raise InputError(f"{node.name}: its executor output is not JSON ({error})") from error
    values: dict[str, Value] = {}
    for name, kind in node.component.output_parameters.items():
        path = Path(around.output_parameters[name])
        if name in executor.get("parameterValues", {}):
            values[name] = executor["parameterValues"][name]
            if not is_of(values[name], kind):
                raise InputError(f"{node.name}: its output {name} is {values[name]!r}, which is no {kind}")
        elif path.exists():
            values[name] = value_of(path.read_text(encoding="utf-8"), kind, f"{node.name}: its output {name}")
        else:
            raise InputError(f"{node.name}: it ended with 0 but did not write its output {name}")
    made = (artifact for listed in executor.get("artifacts", {}).values() for artifact in listed.get("artifacts", []))
    metrics = dict(pair for artifact in made for pair in artifact.get("metadata", {}).items())
    reference = values.get("ref")
    if isinstance(reference, str) and reference.endswith(f"/{MANIFEST}"):
        with suppress(OSError, InputError):
            return values, metrics, read_manifest(reference)
    return values, metrics, None


@dataclass(frozen=True)
class RunResult:
    """How a run ended. `error`: a line about the first failure, empty when all is well; `steps` in the plan's order,
    each as `run.json` has it."""

    exit_code: int
    error: str
    seconds: float
    steps: Mapping[str, Mapping[str, Any]]

    def reference(self, step: str) -> str:
        """The reference that a step wrote in this run (or before, when nothing has changed)."""
        found: str = self.steps[step]["reference"]
        if not found:
            raise InputError(f"{step}: it wrote no reference in this run ({self.steps[step]['state']})")
        return found
