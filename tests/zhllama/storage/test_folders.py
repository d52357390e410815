"""Room is asked for before work begins; what has no end is not read."""

import os
import shutil
import threading

import pytest

from zhllama import storage
from zhllama.errors import InputError
from zhllama.storage.folders import require_space


def test_a_folder_without_room_is_named_with_what_is_needed_and_what_is_free(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(InputError, match=rf"--store {tmp_path}: \d+\.\d TB will be needed and .* are free"):
        require_space(str(tmp_path / "not" / "yet" / "there"), free + 2 * 10**12, "--store")


def test_room_that_is_there_and_s3_pass(tmp_path):
    require_space(str(tmp_path), 1, "--store")
    require_space("s3://bucket/prefix", 10**18, "--store")


def test_a_device_ends_at_the_bound_and_a_pipe_that_nobody_writes_to_at_once(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    assert storage.read_bytes(str(tmp_path / "pipe")) == b""
    monkeypatch.setattr(storage, "WHOLE", 100)
    with pytest.raises(InputError, match="device: it has 101 bytes, and 100 are read at most"):
        storage.read_bytes(str(tmp_path / "device"))
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        storage.read_bytes(str(tmp_path))


def test_what_another_program_writes_is_read_to_its_end():
    """As `--expect <(sha256sum *)` gives it."""
    reading, writing = os.pipe()
    with open(writing, "wb") as file:
        threading.Timer(0.05, lambda: (file.write(b"abc"), file.close())).start()
        assert storage.read_bytes(f"/dev/fd/{reading}") == b"abc"
    os.close(reading)
