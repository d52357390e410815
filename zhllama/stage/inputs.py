"""A stage's inputs, opened once: what its key was made of is what it reads.

Files are verified against the manifest that was opened, a repository of the Hub is read at the commit that was found. A
plain folder or prefix that changes while it is read would stand under a wrong digest: then nothing is published.
"""

from collections.abc import Mapping
from typing import Any

from zhllama import storage
from zhllama.artifacts.manifest import Input
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.stage.options import StageOptions, option_of, references_of


class Inputs:
    """The artifacts behind the reference fields of a stage's options, by the field's name."""

    def __init__(self, options: Any) -> None:
        """Opens them. InputError where nothing is behind a reference."""
        self._opened: dict[str, list[Artifact]] = {}
        self.records: dict[str, Input] = {}
        """What the manifest says of them. Several in a field are `name.0`, `name.1`."""
        for name, addresses in references_of(options).items():
            self._opened[name] = [open_artifact(address, option_of(name)) for address in addresses]
            for index, (address, artifact) in enumerate(zip(addresses, self._opened[name], strict=True)):
                # what has no manifest: by its address, made absolute, or the commit that the Hub has it at
                plain = artifact.root if artifact.root.startswith("hf://") else storage.normalise(address)
                reference = artifact.manifest.reference if artifact.verified else plain
                key = name if len(addresses) == 1 else f"{name}.{index}"
                self.records[key] = Input(reference, artifact.digest)
        if isinstance(options, StageOptions):
            self.records |= options.more_inputs()

    def __getitem__(self, name: str) -> Artifact:
        """The one artifact of a field that must be given."""
        (artifact,) = self._opened[name]
        return artifact

    def get(self, name: str) -> Artifact | None:
        """The one artifact of a field, or None where it was not given."""
        return self[name] if name in self._opened else None

    def all(self, name: str) -> list[Artifact]:
        """The artifacts of a field, in the order they were given."""
        return list(self._opened.get(name, ()))

    def require_unchanged(self) -> None:
        """InputError that names an input which is no longer what it was when it was opened."""
        for name, artifacts in self._opened.items():
            for artifact in artifacts:
                if artifact.changed():
                    what = "it was changed while it was read, so nothing is published"
                    mend = "start again, or give an artifact with a manifest"
                    raise InputError(f"{option_of(name)} {artifact.root}: {what}; {mend}")

    def require_same(self, records: Mapping[str, Input]) -> None:
        """InputError where these are not the inputs that another process of the same work has opened."""
        for name, record in records.items():
            if (mine := self.records.get(name)) is not None and mine.digest != record.digest:
                option = option_of(name.partition(".")[0])
                raise InputError(f"{option} {record.reference}: it was changed since this work began; start again")
