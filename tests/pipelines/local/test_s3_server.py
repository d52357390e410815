"""The S3 server of a laptop: its data stays, its credentials count, and it never shares its data with another."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from botocore.exceptions import EndpointConnectionError

from pipelines.local import s3_server as local_s3
from pipelines.local.processes import alone_in, started_at
from pipelines.local.s3_server import LocalS3
from zhllama import storage
from zhllama.errors import InputError


@pytest.mark.slow
def test_what_was_stored_is_there_after_a_restart(tmp_path):
    with LocalS3(tmp_path / "s3") as server:
        server.client().put_object(Bucket=server.bucket, Key="a", Body=b"kept")
        first = server.keys
    with LocalS3(tmp_path / "s3") as server:
        assert server.client().get_object(Bucket=server.bucket, Key="a")["Body"].read() == b"kept"
        assert server.keys == first


def test_a_second_server_on_the_same_data_is_refused(tmp_path):
    with (
        LocalS3(tmp_path / "s3"),
        pytest.raises(InputError, match="in use by another command"),
        LocalS3(tmp_path / "s3"),
    ):
        pass


@pytest.mark.slow
def test_a_server_that_a_killed_command_left_is_ended_first(tmp_path):
    script = (
        "import sys, signal; from pathlib import Path; from pipelines.local.s3_server import LocalS3\n"
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


def test_a_folder_that_cannot_be_locked_is_one_line(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(InputError, match=r"s3: No locks available; choose another folder"), LocalS3(tmp_path / "s3"):
        pass


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy"])
def test_a_proxy_in_the_environment_is_not_asked_for_what_is_here(tmp_path, monkeypatch, name):
    for variable in ("HTTP_PROXY", "http_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
    # nobody listens there
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "example.com")
    with LocalS3(tmp_path / "s3") as server:
        around = server.environment()
        for variable, value in around.items():
            monkeypatch.setenv(variable, value)
        storage.forget_client()
        storage.write_bytes(f"s3://{server.bucket}/a", b"kept")
        assert storage.read_bytes(f"s3://{server.bucket}/a") == b"kept"
        assert around["NO_PROXY"] == around["no_proxy"] == "example.com,127.0.0.1"
        assert server.environment()["NO_PROXY"] == around["NO_PROXY"]
    storage.forget_client()


def test_a_disk_that_is_full_at_the_first_start_does_not_spoil_the_next(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(local_s3.os, "fsync", full)
        with pytest.raises(InputError, match="No space left on device"), LocalS3(tmp_path / "s3"):
            pass
    with LocalS3(tmp_path / "s3") as server:
        assert (tmp_path / "s3" / "s3.json").stat().st_mode & 0o777 == 0o600
        assert server.keys["secretKey"]


def taking(port: int, times: int, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Has another program take the filer's port, at the first so many starts, between our look and the server's."""
    real, given = local_s3.free_ports, list[list[int]]()

    def free_ports(count: int) -> list[int]:
        ports = real(count)
        if len(given) < times:
            ports[4] = port
        given.append(ports)
        return ports

    monkeypatch.setattr(local_s3, "free_ports", free_ports)
    return given


def test_a_port_that_is_taken_meanwhile_is_another_one_the_next_time(tmp_path, monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        given = taking(other.getsockname()[1], 1, monkeypatch)
        with LocalS3(tmp_path / "s3") as server:
            assert len(given) == 2
            assert server.endpoint.endswith(f":{given[1][8]}")
            server.client().put_object(Bucket=server.bucket, Key="a", Body=b"b")


def test_ports_that_are_always_taken_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(local_s3, "STARTS", 2)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taking(other.getsockname()[1], 2, monkeypatch)
        with pytest.raises(InputError, match="taken 2 times before the S3 server had them"), LocalS3(tmp_path / "s3"):
            pass
    with LocalS3(tmp_path / "s3"):
        assert json.loads((tmp_path / "s3" / "running.json").read_text())


class TestWhileAnotherCommandHasIt:
    @pytest.fixture
    def owner(self, tmp_path) -> Iterator[LocalS3]:
        with ExitStack() as stack:
            server = stack.enter_context(LocalS3(tmp_path / "s3"))
            server.client().put_object(Bucket=server.bucket, Key="a", Body=b"kept")
            yield server

    def test_one_that_reads_uses_it_and_leaves_it_running(self, owner):
        for _ in range(2):
            with LocalS3(owner.folder, attach=True) as reader:
                assert (reader.endpoint, reader.keys) == (owner.endpoint, owner.keys)
                assert reader.client().get_object(Bucket=reader.bucket, Key="a")["Body"].read() == b"kept"
        assert owner.client().get_object(Bucket=owner.bucket, Key="a")["Body"].read() == b"kept"

    def test_its_end_waits_for_the_reader(self, owner):
        ending = threading.Thread(target=owner.__exit__, args=(None, None, None))
        with LocalS3(owner.folder, attach=True) as reader:
            ending.start()
            # the first that its end does
            while (owner.folder / "server.json").exists():
                pass
            assert reader.client().get_object(Bucket=reader.bucket, Key="a")["Body"].read() == b"kept"
        ending.join()
        with pytest.raises(EndpointConnectionError):
            reader.client().list_buckets()

    def test_its_end_does_not_wait_for_ever(self, owner, monkeypatch):
        monkeypatch.setattr(local_s3, "ATTACHED_TIMEOUT", 0.1)
        with LocalS3(owner.folder, attach=True):
            owner.__exit__(None, None, None)

    def test_one_that_reads_starts_it_where_nobody_has_it(self, tmp_path):
        with LocalS3(tmp_path / "s3", attach=True) as first, LocalS3(tmp_path / "s3", attach=True) as second:
            assert first.endpoint == second.endpoint

    def test_one_that_is_not_there_in_time_is_said_to_be_in_use(self, tmp_path, monkeypatch):
        monkeypatch.setattr(local_s3, "START_TIMEOUT", 0.1)
        (tmp_path / "s3").mkdir()
        with (
            alone_in(tmp_path / "s3"),
            pytest.raises(InputError, match="in use by another command"),
            LocalS3(tmp_path / "s3", attach=True),
        ):
            pass
