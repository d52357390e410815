"""A fake cluster that the launcher's client reaches, and launchers as commands."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from components.launch_training.launcher import launch_training
from components.launch_training.options import LaunchTraining
from tests.components.launch_training.fake_cluster import FakeCluster, warm_up
from zhllama.artifacts.manifest import Manifest
from zhllama.stage.run import run_stage


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


@pytest.fixture
def stage(tiny_model: str, packed_text: str, tmp_path: Path) -> Callable[..., Manifest]:
    """`stage(**options)`: the launcher on the tiny model, in this process, on the cluster."""

    def run_it(**options: Any) -> Manifest:
        chosen = {"stage": "lora", "model": tiny_model, "dataset": packed_text, "store": str(tmp_path / "store")}
        return run_stage(LaunchTraining(**{**chosen, **options}), launch_training)

    return run_it


@pytest.fixture
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for a back-off; a launcher looks again at once."""
    monkeypatch.setattr("zhllama.kubernetes.api.FIRST_WAIT", 0.01)
    monkeypatch.setattr("components.launch_training.follower.LOOK_EVERY", 0.01)
    for module, name in (("job_log", "WAIT"), ("follower", "REWATCH")):
        for which in ("FIRST", "LONGEST"):
            monkeypatch.setattr(f"components.launch_training.{module}.{which}_{name}", 0.02)
