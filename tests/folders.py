"""Folders as artifacts."""

from dataclasses import replace
from pathlib import Path

from zhllama import storage
from zhllama.artifacts.blocks import BLOCK
from zhllama.artifacts.manifest import PROVENANCE, Manifest
from zhllama.artifacts.writer import ArtifactWriter


def add_folder(out: ArtifactWriter, folder: Path) -> None:
    """Every file below a folder, under its name there; many at a time."""

    def add(item: storage.Stored) -> None:
        path = folder / item.name
        if item.size > BLOCK:
            out.add_file(item.name, path)
        else:
            out.add_bytes(item.name, path.read_bytes())

    storage.in_parallel(add, storage.listing(str(folder)))


def publish_first_format(manifest: Manifest) -> Manifest:
    """What was published, as releases before format 2 wrote it: all in the manifest, with its place."""
    first = replace(manifest, format=1, files=tuple(sorted(manifest.named, key=lambda file: file.path)), beside=())
    first = replace(first, digest=first.computed_digest())
    storage.delete(f"{first.root}/{PROVENANCE}")
    storage.write_bytes(first.reference, first.to_json())
    return first
