"""An artifact of files that are in memory: what was made of others, read as any other is."""

from collections.abc import Mapping

from zhllama import storage
from zhllama.artifacts.manifest import File, Manifest
from zhllama.artifacts.reader import Artifact


def in_memory(files: Mapping[str, bytes], root: str) -> Artifact:
    """`root`: what messages say of where they are."""

    def read(name: str, start: int, length: int, buffer: memoryview, take: storage.Take | None) -> None:
        # as storage.read_piece: who takes the pieces may have room for one of them
        room = min(len(buffer), length) or 1
        for at in range(0, length, room):
            piece = buffer[: min(room, length - at)]
            piece[:] = files[name][start + at : start + at + len(piece)]
            if take:
                take(at, piece)

    listed = tuple(File(name, len(content), "") for name, content in files.items())
    return Artifact(Manifest("", "", root, listed), False, read)
