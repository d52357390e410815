"""The tests' own model server, and waits that a test can afford."""

from collections.abc import Iterator

import pytest

from components.generate_instructions import limits, scheduler
from tests.components.generate_instructions.model_server import ModelServer


@pytest.fixture
def model() -> Iterator[ModelServer]:
    server = ModelServer()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-the-tests")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    return "sk-secret-of-the-tests"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FIRST_WAIT", 0.005)
    monkeypatch.setattr(limits, "LONGEST_WAIT", 0.02)
    monkeypatch.setattr(scheduler, "DRAIN", 10.0)
