"""The name of a stage's work: the digest of all that decides its result."""

import hashlib
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zhllama import storage
from zhllama.artifacts.manifest import Input, digest_of
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.stage.options import StageOptions, configuration_of, references_of


def inputs_of(config: Any) -> dict[str, Input]:
    """Reference fields → what they hold now. Several references in a field become `name.0`, `name.1`."""
    found: dict[str, Input] = {}
    for name, addresses in references_of(config).items():
        option = f"--{name.replace('_', '-')}"
        for index, address in enumerate(addresses):
            artifact = open_artifact(address, option)
            reference = artifact.manifest.reference if artifact.verified else _plain_address(address, artifact)
            found[name if len(addresses) == 1 else f"{name}.{index}"] = Input(reference, artifact.digest)
    if isinstance(config, StageOptions):
        found.update(config.more_inputs())
    return found


def _plain_address(address: str, artifact: Artifact) -> str:
    """A folder, prefix or file as it was given, made absolute; of a repository of the Hub, with the commit found."""
    return artifact.root if artifact.root.startswith("hf://") else storage.normalise(address)


def source_digest(stages: Sequence[str]) -> str:
    """SHA-256 over the files of the stages and of the library that do work (not the KFP signature, not the command
    line)."""
    root = Path(__file__).parents[2]
    running = hashlib.sha256()
    for folder in (*(f"components/{stage}" for stage in sorted(stages)), "zhllama"):
        for path in sorted((root / folder).rglob("*")):
            works = path.suffix in (".py", ".json", ".yaml", ".txt", ".html", ".jinja") and path.is_file()
            if works and path.name not in ("component.py", "__main__.py"):
                running.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return running.hexdigest()


def versions_of(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise InputError(f"the package {package} is not installed; install this stage's extra") from error
    return found


def input_key(config: Any, inputs: dict[str, Input], stages: Sequence[str], packages: Sequence[str]) -> str:
    """The name of this work: 32 hexadecimal digits of the digest of all that decides its result."""
    value = {
        "stages": list(stages),
        "source": source_digest(stages),
        "versions": versions_of(packages),
        "configuration": configuration_of(config),
        "inputs": {name: given.digest for name, given in inputs.items()},
    }
    return digest_of(value)[:32]
