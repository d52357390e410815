"""Fixtures that many tests use: a real S3 server for the session, and a store (folder or S3) per test."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.shared import storage
from pipelines.local_s3 import LocalS3

# tests run side by side on few cores: one thread per process is faster than many that fight
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalS3]:
    """SeaweedFS on loopback, one for the session (one per xdist worker)."""
    with LocalS3(tmp_path_factory.mktemp("s3"), bucket="tests") as server:
        yield server


@pytest.fixture
def s3_store(s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """An empty s3:// prefix of its own, with the environment that reaches it."""
    for name, value in s3_server.access.environment().items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ZHLLAMA_CACHE", str(tmp_path / "cache"))
    storage.forget_client()
    return f"s3://tests/{os.getpid()}-{next(_numbers)}"


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store of each kind: the test runs once with a folder and once with S3."""
    if request.param == "folder":
        return str(tmp_path / "store")
    return str(request.getfixturevalue("s3_store"))
