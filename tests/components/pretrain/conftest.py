"""Short trainings of the tiny model, in this process and as the real command."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No PET_* from outside; checkpoints of this test only."""
    for name in [name for name in os.environ if name.startswith("PET_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ZHLLAMA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def command(tiny_model: str, packed_text: str, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts `python -m components.pretrain` on the tiny model: `command(processes, **options)`."""

    def start(processes: int | None = None, **options: Any) -> subprocess.Popen[str]:
        chosen = {"model": tiny_model, "dataset": packed_text, "store": str(tmp_path / "store"), **options}
        words = [word for name, value in chosen.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        environment = {**os.environ, "PET_NPROC_PER_NODE": str(processes)} if processes else dict(os.environ)
        return subprocess.Popen(
            [sys.executable, "-m", "components.pretrain", *words],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start
