"""GGUF where llama.cpp is not installed: what Python alone writes is written, the rest is refused."""

import importlib.metadata
from pathlib import Path

import pytest

from components.export_model.__main__ import ExportModel, export_model
from zhllama.artifacts.manifest import Manifest
from zhllama.errors import InputError
from zhllama.stage.run import run_stage


@pytest.fixture
def without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def absent(name: str) -> str:
        if name == "llama-cpp-python":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)


def export(store: Path, model: Path, kinds: str) -> Manifest:
    return run_stage(ExportModel(store=str(store), model=str(model), format="gguf", quantization=kinds), export_model)


def test_a_precision_is_written_and_the_manifest_says_that_ids_were_not_compared(
    without_llama_cpp: None, model: Path, tmp_path: Path
):
    manifest = export(tmp_path / "store", model, "f16")
    assert Path(manifest.root, "model-f16.gguf").read_bytes()[:4] == b"GGUF"
    assert manifest.facts["tokenizer_lines_differing"] is None
    assert "llama.cpp" not in manifest.inputs


def test_a_quantised_type_is_refused_by_its_name(without_llama_cpp: None, model: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"--quantization f16,q4_k_m: .* q4_k_m, is not installed"):
        export(tmp_path / "store", model, "f16,q4_k_m")


@pytest.mark.gguf
def test_it_is_the_file_that_is_written_where_llama_cpp_is(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
):
    with_it = export(tmp_path / "with", model, "f16")
    request.getfixturevalue("without_llama_cpp")
    without = export(tmp_path / "without", model, "f16")
    assert [file.sha256 for file in with_it.files] == [file.sha256 for file in without.files]
