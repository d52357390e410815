"""Blocks are shown as what they are: every document with its borders, what is masked and what is learned."""

import json
import subprocess
import sys

import pytest
from rich.console import Console

from components.prepare_dataset.options import PrepareDataset
from components.prepare_dataset.preparer import prepare_dataset
from zhllama import storage
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.reader import Artifact
from zhllama.data import packed
from zhllama.data.packed import PackedDataset
from zhllama.data.packed_view import as_json, sampled_blocks, shown_block, view
from zhllama.errors import InputError
from zhllama.stage.run import run_stage
from zhllama.tokenizer.prompt import DEFAULT
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder

ITEMS = [{"instruction": f"翻译第{number}句", "input": "", "output": f"Hello, {number}!"} for number in range(40)]


@pytest.fixture
def tokenizer(tmp_path, llama_tokenizer) -> str:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.model").write_bytes(llama_tokenizer)
    return str(tmp_path / "tokenizer")


@pytest.fixture
def items(tmp_path, store, tokenizer) -> Artifact:
    (tmp_path / "items.json").write_text(json.dumps(ITEMS))
    return prepared(store, tokenizer, instructions=str(tmp_path / "items.json"), block_size=512)


def prepared(store, tokenizer, **options) -> Artifact:
    options = {"validation_fraction": 0.1} | options
    manifest = run_stage(PrepareDataset(store=str(store), tokenizer=tokenizer, **options), prepare_dataset)
    return open_artifact(manifest.reference)


def printed(artifact: Artifact, count: int, split: str = "train") -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w", encoding="utf-8"))
    console.print(view(artifact, count, split))
    return console.export_text()


def test_every_item_is_shown_with_its_prompt_masked(items, llama_tokenizer):
    blocks = as_json(items, 1000) + as_json(items, 1000, "validation")
    found = {(one["masked"], one["learned"].strip()) for block in blocks for one in block["documents"]}
    assert found == {(DEFAULT.wrap(item["instruction"]), item["output"]) for item in ITEMS}
    assert all(one["begins"] and one["ends"] for block in blocks for one in block["documents"])


def test_a_page_shows_borders_masks_and_padding(items):
    page = printed(items, 1)
    assert "train block" in page
    assert "places of padding" in page
    assert page.count("<s>⟦Below is an instruction") == page.count("⟧") > 1
    assert "!\u2009</s>" in page


def test_a_document_that_was_cut_is_shown_as_cut(tmp_path, tokenizer, english_text, llama_tokenizer):
    (tmp_path / "long.txt").write_text(" ".join(english_text[:40]))
    artifact = prepared(
        tmp_path / "s", tokenizer, text=str(tmp_path / "long.txt"), block_size=64, validation_fraction=0
    )
    dataset, encoder = PackedDataset(artifact), SentencePieceEncoder(llama_tokenizer)
    pieces = [shown_block(dataset, index, encoder)[0] for index in range(len(dataset))]
    assert sum(piece.begins for piece in pieces) == sum(piece.ends for piece in pieces) == 1
    page = printed(artifact, 3)
    assert "⋯" in page


def test_blocks_are_read_by_range(store, tokenizer, tmp_path, english_text, monkeypatch):
    (tmp_path / "a.txt").write_text("\n".join(english_text[:500]))
    artifact = prepared(store, tokenizer, text=str(tmp_path / "a.txt"), block_size=64)
    monkeypatch.setattr(packed, "materialize", lambda artifact: pytest.fail("fetched whole"))
    assert len(as_json(artifact, 3)) == 3


def test_the_same_blocks_are_sampled_every_time(items):
    dataset = PackedDataset(items, by_range=True)
    assert sampled_blocks(dataset, 3) == sampled_blocks(dataset, 3) == sorted(set(sampled_blocks(dataset, 3)))
    assert len(sampled_blocks(dataset, 1000)) == len(dataset)


def test_a_dataset_whose_tokenizer_is_gone_says_so(tmp_path, tokenizer, chinese_tokenizer):
    (tmp_path / "items.json").write_text(json.dumps(ITEMS))
    artifact = prepared(tmp_path / "s", tokenizer, instructions=str(tmp_path / "items.json"))
    (tmp_path / "tokenizer" / "tokenizer.model").write_bytes(chinese_tokenizer)
    with pytest.raises(InputError, match="is not the one that this dataset was made with"):
        view(artifact, 1)
    storage.delete_all(tokenizer)
    with pytest.raises(InputError, match=r"the tokenizer of this dataset .*nothing is there"):
        view(artifact, 1)


def test_another_artifact_is_refused(tmp_path, tokenizer):
    with pytest.raises(InputError, match="not a packed dataset"):
        view(open_artifact(tokenizer), 1)


@pytest.mark.slow
def test_the_command_shows_blocks(tmp_path, tokenizer):
    (tmp_path / "items.json").write_text(json.dumps(ITEMS))
    artifact = prepared(tmp_path / "s", tokenizer, instructions=str(tmp_path / "items.json"))
    command = [sys.executable, "-m", "pipelines", "show", artifact.manifest.reference, "--work", str(tmp_path / "work")]
    shown = subprocess.run([*command, "--sample", "2"], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("train block") == 2
    listed = subprocess.run([*command, "--sample", "2", "--json"], capture_output=True, text=True, check=True)
    assert len(json.loads(listed.stdout)) == 2
    held_out = subprocess.run([*command, "--sample", "1", "--split", "validation"], capture_output=True, text=True)
    assert "validation block" in held_out.stdout
    assert subprocess.run([*command, "--sample", "-1"], capture_output=True, text=True).returncode == 2
