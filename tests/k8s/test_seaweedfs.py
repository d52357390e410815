"""k8s/dev's SeaweedFS, started with the StatefulSet's command: it serves S3 to those keys alone, and keeps its data."""

import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from pipelines.local.s3_server import free_ports
from pipelines.manifests.base import dev_secrets
from tests.k8s.kustomizations import build, of_kind
from zhllama.stage.child_processes import die_with_parent


@pytest.fixture(scope="module")
def container() -> Any:
    (found,) = of_kind(build("dev"), "StatefulSet")["seaweedfs"]["spec"]["template"]["spec"]["containers"]
    return found


@pytest.fixture
def keys() -> dict[str, str]:
    secret = dev_secrets("zhllama")[0]
    assert secret["metadata"]["name"] == "zhllama-s3"
    return dict(secret["stringData"])


def client(port: int, access_key: str, secret_key: str) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
        region_name="us-east-1",
        config=Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}),
    )


@contextmanager
def running(container: Any, keys: dict[str, str], folder: Path) -> Iterator[tuple[int, int]]:
    """The container's command, with what the pod gives it, on loopback: the ports of S3 and of its gRPC."""
    ports = free_ports(8)
    names = ("master", "volume", "filer", "s3")
    options = [f"-{name}.port={ports[2 * i]}" for i, name in enumerate(names)]
    options += [f"-{name}.port.grpc={ports[2 * i + 1]}" for i, name in enumerate(names)]
    moved = {"-dir=/data": f"-dir={folder}"}
    assert set(moved) <= set(container["args"])
    arguments = [moved.get(word, word) for word in container["args"] if not word.startswith("-s3.port=")]
    environment = {}
    for variable in container["env"]:
        reference = variable.get("valueFrom", {}).get("secretKeyRef")
        environment[variable["name"]] = keys[reference["key"]] if reference else str(folder)
    with open(folder / "log", "ab") as log:
        server = subprocess.Popen(
            [str(Path(sys.executable).parent / container["command"][0]), *arguments, *options],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
        )
    try:
        s3 = client(ports[6], keys["AWS_ACCESS_KEY_ID"], keys["AWS_SECRET_ACCESS_KEY"])
        deadline = time.monotonic() + 120
        while True:
            try:
                # the bucket is made by the server itself
                s3.put_object(Bucket="zhllama", Key="ready", Body=b"yes")
                break
            except (ClientError, BotoCoreError):
                assert server.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.2)
        listening = {one.laddr for one in psutil.Process(server.pid).net_connections("inet") if one.status == "LISTEN"}
        assert {one.port for one in listening if one.ip != "127.0.0.1"} == {ports[6], ports[7]}
        yield ports[6], ports[7]
    finally:
        server.terminate()
        server.wait(60)


def _field(number: int, content: bytes) -> bytes:
    """Of a protobuf message."""
    return bytes([number << 3 | 2, len(content)]) + content


STRANGER = (
    _field(1, b"stranger")
    + _field(2, _field(1, b"stranger") + _field(2, b"stranger's"))
    + b"".join(_field(3, action) for action in (b"Admin", b"Read", b"Write", b"List"))
)
"""A user of S3 with keys of its own, as SeaweedFS' parts tell each other of one."""


def call(port: int, method: str, message: bytes) -> None:
    """A gRPC call by somebody who has nothing to show for it, to the end of its answer."""

    def frame(kind: int, flags: int, stream: int, content: bytes) -> bytes:
        return struct.pack(">I", len(content))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + content

    said = {
        ":method": "POST", ":scheme": "http", ":path": method, ":authority": "s3", "te": "trailers",
        "content-type": "application/grpc",
    }  # fmt: skip
    head = b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in said.items()
    )
    data = b"\0" + struct.pack(">I", len(message)) + message
    with socket.create_connection(("127.0.0.1", port), timeout=10) as one, one.makefile("rb") as answer:
        one.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + frame(1, 4, 1, head) + frame(0, 1, 1, data)
        )
        kind = flags = -1
        while not (kind == 1 and flags & 1):
            length, kind, flags, _ = struct.unpack(">IBBI", b"\0" + answer.read(9))
            answer.read(length)


def test_it_serves_the_secrets_keys_alone_and_keeps_what_it_was_given(container, keys, tmp_path):
    access_key, secret_key = keys["AWS_ACCESS_KEY_ID"], keys["AWS_SECRET_ACCESS_KEY"]
    with running(container, keys, tmp_path) as (port, grpc):
        client(port, access_key, secret_key).put_object(Bucket="zhllama", Key="a", Body=b"kept")
        call(grpc, "/messaging_pb.SeaweedS3IamCache/PutIdentity", _field(1, STRANGER))
        with pytest.raises(ClientError, match="InvalidAccessKeyId"):
            client(port, "stranger", "stranger's").get_object(Bucket="zhllama", Key="a")
        for pair in ((access_key, "0" * 40), ("0" * 20, secret_key)):
            with pytest.raises(ClientError, match=r"SignatureDoesNotMatch|InvalidAccessKeyId"):
                client(port, *pair).get_object(Bucket="zhllama", Key="a")
        probe = container["readinessProbe"]["httpGet"]["path"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{probe}") as answer:
            assert answer.status == 200
    with running(container, keys, tmp_path) as (port, _):
        assert client(port, access_key, secret_key).get_object(Bucket="zhllama", Key="a")["Body"].read() == b"kept"


def test_each_call_makes_other_keys():
    first, second = ([secret["stringData"] for secret in dev_secrets("team")] for _ in range(2))
    assert first[0]["ZHLLAMA_S3_ENDPOINT"] == "http://seaweedfs.team.svc:8333"
    for one, other in zip(first, second, strict=True):
        for name in one:
            assert (one[name] == other[name]) is (name in ("AWS_DEFAULT_REGION", "ZHLLAMA_S3_ENDPOINT")), name
