"""The S3 server of a laptop: its data stays, its credentials count, and it never shares its data with another."""

import json
import os
import signal
import subprocess
import sys

import pytest

from components.shared.errors import InputError
from pipelines.local_s3 import LocalS3
from pipelines.processes import started_at


def test_what_was_stored_is_there_after_a_restart(tmp_path):
    with LocalS3(tmp_path / "s3") as server:
        server.client().put_object(Bucket=server.bucket, Key="a", Body=b"kept")
        first = server.access
    with LocalS3(tmp_path / "s3") as server:
        assert server.client().get_object(Bucket=server.bucket, Key="a")["Body"].read() == b"kept"
        assert server.access.secret_key == first.secret_key


def test_a_second_server_on_the_same_data_is_refused(tmp_path):
    with (
        LocalS3(tmp_path / "s3"),
        pytest.raises(InputError, match="in use by another command"),
        LocalS3(tmp_path / "s3"),
    ):
        pass


def test_a_server_that_a_killed_command_left_is_ended_first(tmp_path):
    script = (
        "import sys, signal; from pathlib import Path; from pipelines.local_s3 import LocalS3\n"
        "with LocalS3(Path(sys.argv[1])): print('up', flush=True); signal.pause()"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "s3")]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "up\n"
    (left,) = json.loads((tmp_path / "s3" / "running.json").read_text())
    # held, so that it cannot hear of its parent's end before the next server looks
    os.kill(int(left), signal.SIGSTOP)
    owner.kill()
    owner.communicate()
    assert started_at(int(left))
    with LocalS3(tmp_path / "s3") as server:
        assert not started_at(int(left))
        server.client().put_object(Bucket=server.bucket, Key="a", Body=b"b")


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match=r"file/s3: Not a directory; choose another folder"),
        LocalS3(tmp_path / "file" / "s3"),
    ):
        pass
