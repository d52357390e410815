"""Trainings of a tiny model as real processes, on S3 where it matters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.soak.training import Material, Training, material, start


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """A tiny model and blocks for it, in a folder."""
    return material(str(tmp_path_factory.mktemp("material")))


@pytest.fixture
def train(tiny: Material, tmp_path: Path) -> Callable[..., Training]:
    """Starts a training: `train(store, processes=2, environment={…}, **options)`."""

    def begin(store: str, processes: int = 2, environment: dict[str, str] | None = None, **options: Any) -> Training:
        return start(tiny, store, tmp_path / "cache", environment or {}, processes, **options)

    return begin
