"""Artifacts of files that lie in no store: in memory, or behind a function. They are read as any other is."""

from collections.abc import Callable, Mapping

from zhllama import storage
from zhllama.artifacts.manifest import File, Manifest
from zhllama.artifacts.reader import Artifact


def in_memory(files: Mapping[str, bytes], root: str) -> Artifact:
    """`root`: what messages say of where they are."""
    sizes = {name: len(content) for name, content in files.items()}
    return read_by(lambda name, start, length: files[name][start : start + length], sizes, root)


def read_by(read: Callable[[str, int, int], bytes], sizes: Mapping[str, int], root: str) -> Artifact:
    """`read`: of a file, so many bytes from there; `sizes`: of each file."""

    def fill(name: str, start: int, length: int, buffer: memoryview, take: storage.Take | None) -> None:
        # as storage.read_piece: who takes the pieces may have room for one of them
        room = min(len(buffer), length) or 1
        for at in range(0, length, room):
            piece = buffer[: min(room, length - at)]
            piece[:] = read(name, start + at, len(piece))
            if take:
                take(at, piece)

    listed = tuple(File(name, size, "") for name, size in sizes.items())
    return Artifact(Manifest("", "", root, listed), False, fill)
