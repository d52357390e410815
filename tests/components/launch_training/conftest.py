"""A fake cluster that the launcher's client reaches, and launchers as commands."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.components.launch_training.fake_cluster import FakeCluster, warm_up


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No PET_* from outside; checkpoints of this test only."""
    for name in [name for name in os.environ if name.startswith("PET_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ZHLLAMA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, alone: None) -> Iterator[FakeCluster]:
    """An API server whose kubeconfig is in the environment."""
    warm_up()
    with FakeCluster() as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig")))
        yield server


@pytest.fixture
def command(tiny_model: str, packed_text: str, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts `python -m components.launch_training` on the tiny model: `command(*more words)`."""

    def start(*words: str) -> subprocess.Popen[str]:
        ours = ("--store", str(tmp_path / "store"), "--model", tiny_model, "--dataset", packed_text, "--stage", "lora")
        return subprocess.Popen(
            [sys.executable, "-m", "components.launch_training", *ours, *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start
