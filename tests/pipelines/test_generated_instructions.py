"""Starting from generated and from imported instructions: the pipeline, run on this machine up to the packed data."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.adapt_llama import compile_pipeline
from pipelines.configuration import configure
from pipelines.local.runner import run_pipeline
from tests.components.generate_instructions.model_server import ModelServer
from zhllama.artifacts.open import open_artifact


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelServer]:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-the-tests")
    server = ModelServer()
    yield server
    server.close()


@pytest.fixture
def start(s3_store: str, tmp_path: Path, extended_model: str) -> Any:
    """Runs the pipeline up to the packed instructions; returns their reference and that of the items."""

    def run(**arguments: str) -> tuple[str, str]:
        given = {"store": s3_store, "extended_model": extended_model, "block_size": "256", "backend": "local"}
        # enough to hold one back
        given["validation_fraction"] = "0.1"
        told = configure("tiny", given | {"text": "none-is-read", **arguments}, write=False)
        compile_pipeline(told, tmp_path / "pipeline.yaml")
        result = run_pipeline(tmp_path / "pipeline.yaml", told.arguments, tmp_path / "work", until="prepare_generated")
        assert result.exit_code == 0, result.error
        packed = next(reference for reference in _references(tmp_path / "work") if "/prepare_dataset/" in reference)
        (items,) = [
            each.reference for name, each in open_artifact(packed).manifest.inputs.items() if "instructions" in name
        ]
        return packed, items

    return run


def _references(work: Path) -> list[str]:
    """Every reference that a step of the run wrote."""
    texts = [path.read_text() for path in work.rglob("*") if path.is_file() and path.name == "ref"]
    return [text for text in texts if text.endswith("manifest.json")]


@pytest.mark.slow
def test_a_run_without_instructions_has_a_model_write_them(model: ModelServer, start: Any) -> None:
    packed, items = start(generate_items="40", generate_base_url=model.url, generate_model="writer")
    assert "/generate_instructions/" in items
    found = open_artifact(items)
    assert len(json.loads(found.read("instructions.json"))) == 40
    assert json.loads(found.read("card.json"))["cost"]["billed"]["answer"] == model.billed_answer
    assert {one.key for one in model.asked} == {"Bearer sk-secret-of-the-tests"}
    assert open_artifact(packed).manifest.kind == "packed-dataset"


@pytest.mark.slowest
def test_a_run_can_import_a_public_data_set(start: Any, tmp_path: Path, chinese_text: list[str]) -> None:
    turns = [
        [{"from": "human", "value": f"改写：{text}"}, {"from": "gpt", "value": text}] for text in chinese_text[:60]
    ]
    (tmp_path / "sharegpt.json").write_text(json.dumps([{"conversations": each} for each in turns], ensure_ascii=False))
    _, items = start(import_instructions=str(tmp_path / "sharegpt.json"))
    found = json.loads(open_artifact(items).read("instructions.json"))
    assert 20 < len(found) <= 60
    assert all(item["instruction"].startswith("改写：") for item in found)
