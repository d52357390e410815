"""Room is asked for before work begins."""

import shutil

import pytest

from zhllama.errors import InputError
from zhllama.storage.folders import require_space


def test_a_folder_without_room_is_named_with_what_is_needed_and_what_is_free(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(InputError, match=rf"--store {tmp_path}: \d+\.\d TB will be needed and .* are free"):
        require_space(str(tmp_path / "not" / "yet" / "there"), free + 2 * 10**12, "--store")


def test_room_that_is_there_and_s3_pass(tmp_path):
    require_space(str(tmp_path), 1, "--store")
    require_space("s3://bucket/prefix", 10**18, "--store")
