"""Folders as artifacts."""

from pathlib import Path

from zhllama import storage
from zhllama.artifacts.blocks import BLOCK
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
