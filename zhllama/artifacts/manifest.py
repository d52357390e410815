"""The manifest: a small JSON object, written last, that names an artifact's files and makes them visible.

It carries kind, vocabulary contract, configuration, the digests of the inputs, and its own digest, which leaves out
place, time and host: equal content, equal digest. A *reference* is the address of a manifest (`…/manifest.json`), or a
plain folder or prefix: with a manifest in it the two are the same, without one the files are taken as they are.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from zhllama import storage
from zhllama.artifacts.json_file import value_of
from zhllama.errors import InputError
from zhllama.tokenizer.vocabulary import Vocabulary

MANIFEST = "manifest.json"
FORMAT = 1


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class File:
    """A file of an artifact: its name below the root, bytes, SHA-256 (empty in a plain folder: unknown)."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Input:
    """What a stage read: the reference it was given and the digest found behind it."""

    reference: str
    digest: str


@dataclass(frozen=True)
class Manifest:
    """What a stage published. `facts` are the stage's own statements, `metrics` its figures."""

    kind: str
    stage: str
    root: str
    files: tuple[File, ...]
    blocks: str | None = None
    vocabulary: Vocabulary | None = None
    configuration: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Input] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    created: str = ""
    host: str = ""
    digest: str = ""

    @property
    def reference(self) -> str:
        return f"{self.root}/{MANIFEST}"

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def to_value(self) -> dict[str, Any]:
        value = asdict(replace(self, files=()))
        # asdict copies what it finds, one by one: a tenth of a second for 10,000 files, several times
        value["files"] = [vars(file) for file in self.files]
        return value

    def computed_digest(self) -> str:
        value = self.to_value()
        for left_out in ("root", "created", "host", "digest"):
            del value[left_out]
        value["inputs"] = {name: given.digest for name, given in self.inputs.items()}
        return digest_of(value)

    def to_json(self) -> bytes:
        return (json.dumps({"format": FORMAT, **self.to_value()}, indent=1, ensure_ascii=False) + "\n").encode()

    @staticmethod
    def from_json(content: bytes, where: str) -> "Manifest":
        """Parses and checks a manifest; InputError when it is not one or does not match its own digest."""
        try:
            value = value_of(content)
            version = value.pop("format")
            if version != FORMAT:
                raise InputError(f"{where}: manifest format {version}; this program reads format {FORMAT}")
            value["files"] = tuple(File(**file) for file in value["files"])
            value["inputs"] = {name: Input(**given) for name, given in value["inputs"].items()}
            if value["vocabulary"] is not None:
                value["vocabulary"] = Vocabulary(**value["vocabulary"])
            manifest = Manifest(**value)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{where}: not a zhllama manifest ({error}); give the reference a stage wrote") from error
        if manifest.digest != manifest.computed_digest():
            raise InputError(f"{where}: the manifest was changed after it was written; run its stage again")
        for file in manifest.files:
            storage.join(manifest.root, file.path)
        return manifest
