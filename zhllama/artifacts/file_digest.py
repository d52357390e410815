"""The digest of a file on this machine."""

from pathlib import Path
from typing import Any

_STEP = 2**20
"""Bytes of a file that are hashed at once."""


def file_digest(path: Path, algorithm: Any) -> str:
    """The hexadecimal digest of a file, by hashlib's or blake3's object."""
    room = memoryview(bytearray(_STEP))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(room):
            algorithm.update(room[:count])
    return str(algorithm.hexdigest())
