"""Room is asked for before work begins; what has no end is not read."""

import os
import shutil

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


def test_a_pipe_or_a_device_in_the_place_of_a_small_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name in ("pipe", "device"):
        with pytest.raises(InputError, match="it is a pipe or a device; give a file"):
            storage.read_bytes(str(tmp_path / name))
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        storage.read_bytes(str(tmp_path))
