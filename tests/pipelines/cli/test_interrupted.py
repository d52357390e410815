"""A command that is told to stop in mid-run, or that ends, leaves nothing in the folder for temporary files."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WAITING = {
    "ls": ("ls", "s3://bucket/a"),
    "show": ("show", "s3://bucket/a/manifest.json"),
    "verify": ("verify", "s3://bucket/a/manifest.json"),
    "gc": ("gc", "s3://bucket/a"),
    "cp": ("cp", "s3://bucket/a/manifest.json", "s3://bucket/b"),
    "status": ("status", "a-run", "--host", "http://{address}"),
    "cancel": ("cancel", "a-run", "--host", "http://{address}"),
    "reap": ("reap",),
    "chat": ("chat", "--model", "s3://bucket/a/manifest.json"),
    "a stage": ("components.convert_weights", "--weights", "s3://bucket/a", "--store", "s3://bucket/b"),
}
"""What asks a server that does not answer."""


@pytest.fixture
def around(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "tmp").mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "ZHLLAMA_", "KUBE"))}
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "ZHLLAMA_CACHE": str(tmp_path / "cache")}
    return {**kept, **keys, "TMPDIR": str(tmp_path / "tmp")}


@pytest.mark.parametrize(
    ("name", "number"),
    [
        pytest.param(name, number, marks=[pytest.mark.slow] if name not in ("ls", "status", "reap") else [])
        for name in WAITING
        for number in (signal.SIGTERM, signal.SIGINT)
        if number == signal.SIGTERM or name == "ls"
    ],
)
def test_a_command_that_is_stopped_leaves_nothing(around, tmp_path, name, number):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        address = f"127.0.0.1:{server.getsockname()[1]}"
        cluster = {"name": "a", "cluster": {"server": f"http://{address}"}}
        context = {"name": "a", "context": {"cluster": "a", "user": "a"}}
        value = {
            "clusters": [cluster],
            "contexts": [context],
            "current-context": "a",
            "users": [{"name": "a", "user": {}}],
        }
        (tmp_path / "kubeconfig").write_text(json.dumps(value))
        told = {"ZHLLAMA_S3_ENDPOINT": f"http://{address}", "KUBECONFIG": str(tmp_path / "kubeconfig")}
        words = [word.format(address=address) for word in WAITING[name]]
        module = words if words[0].startswith("components") else ["pipelines", *words]
        with subprocess.Popen(
            [sys.executable, "-m", *module], env=around | told, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
        ) as command:
            server.accept()
            command.send_signal(number)
            _, said = command.communicate(timeout=60)
    assert command.returncode == 143, said
    assert os.listdir(tmp_path / "tmp") == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("compile", "--size", "tiny", "-o", "{work}/p.yaml"), ("render", "base", "-o", "{work}"),
        ("plan", "--size", "7b"),
        ("parameters", "--size", "7b"), ("env", "--nodes", "2"), ("check", "{work}"), ("run", "--set", "none=1"),
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_a_command_that_ends_leaves_nothing(around, tmp_path, words):
    words = [word.format(work=tmp_path / "work") for word in words]
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "a.yaml").write_text("apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n")
    ended = subprocess.run([sys.executable, "-m", "pipelines", *words], env=around, capture_output=True, text=True)
    assert "Traceback" not in ended.stderr
    assert os.listdir(tmp_path / "tmp") == []
