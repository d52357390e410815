"""What a file on this machine is: the digest of its content, and a stamp that no write leaves as it was."""

import hashlib
from pathlib import Path
from typing import Any


def file_digest(path: Path, algorithm: Any) -> str:
    """The hexadecimal digest of a file, by hashlib's or blake3's object."""
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, lambda: algorithm).hexdigest()


def stamp(path: Path) -> list[int]:
    """Size, inode and times: they cannot all stay when a file is written to (no program can set a time of change)."""
    status = path.stat()
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
