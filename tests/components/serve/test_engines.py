"""Which engine is chosen, and how it is started."""

from pathlib import Path

import pytest

from components.serve.engines import choose, vllm_engine
from zhllama.errors import InputError


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program `vllm` on the path, of another Python than this one."""
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    return program


def test_vllm_is_found_where_another_python_has_it_and_started_in_that_one(vllm, tmp_path):
    assert choose("vllm", gguf=False) == "vllm"
    command = vllm_engine(tmp_path, "llama", 2048).command
    assert command[:3] == [str(vllm), "serve", str(tmp_path / "llama")]


def test_vllm_is_not_chosen_without_a_gpu(vllm):
    assert choose("auto", gguf=False) == "transformers"


def test_vllm_that_is_asked_for_must_be_there(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="not installed"):
        choose("vllm", gguf=False)
