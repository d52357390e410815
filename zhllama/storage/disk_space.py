"""Is there room for what will be written? Asked before a weight is read: hours of work must not end on a full disk.

S3 says nothing of its room, so only folders are checked.
"""

import os
import shutil
from pathlib import Path

from zhllama import storage
from zhllama.errors import InputError
from zhllama.progress import human


def require_space(uri: str, need: int, what: str) -> None:
    """InputError when a folder's file system has less than `need` bytes free. `what`: the option, or what it is for."""
    if storage.is_s3(uri):
        return
    folder = Path(uri)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < need:
        raise InputError(
            f"{what} {os.fspath(folder)}: {human(need, 'B')} will be needed and {human(free, 'B')} are free; free some "
            "or choose another place"
        )
