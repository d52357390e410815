"""Bad input to a training: one line, exit code 2, nothing written; told by the real command, before torch is loaded."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from zhllama.artifacts.manifest import Input
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.data.packed import KIND
from zhllama.errors import InputError
from zhllama.stage.inputs import Inputs
from zhllama.training.inputs import checked_inputs
from zhllama.training.options import PretrainOptions


def changed(reference: str, store: Path, name: str, **changes: Any) -> str:
    """A copy of an artifact with other files (bytes; a dot is written as __), vocabulary, facts or configuration."""
    source = open_artifact(reference)
    out = ArtifactWriter(str(store / "changed"), source.manifest.stage, name)
    files = {key.replace("__", "."): value for key, value in changes.items() if isinstance(value, bytes)}
    for path in source.names:
        if path not in files:
            out.copy(source, path)
    for path, content in files.items():
        out.add_bytes(path, content)
    out.vocabulary = changes.get("vocabulary", source.manifest.vocabulary)
    out.facts = {**source.manifest.facts, **changes.get("facts", {})}
    out.configuration = {**source.manifest.configuration, **changes.get("configuration", {})}
    return out.publish(source.manifest.kind).reference


def foreign(reference: str) -> Any:
    vocabulary = open_artifact(reference).manifest.vocabulary
    assert vocabulary is not None
    return replace(vocabulary, digest="0" * 64)


def settings_of(model: str, **changes: Any) -> bytes:
    return json.dumps({**json.loads(open_artifact(model).read("config.json")), **changes}).encode()


@pytest.fixture
def adapter(tiny_model, tmp_path) -> Callable[..., str]:
    """`adapter(vocabulary=…, **settings)`: the reference of an adapter of the tiny model, as far as it is looked at."""
    base = open_artifact(tiny_model)

    def make(vocabulary: Any = None, base_digest: str = "", **settings: Any) -> str:
        have = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["q_proj"], "modules_to_save": None}
        out = ArtifactWriter(str(tmp_path / "adapters"), "pretrain", "key")
        out.add_json("adapter_config.json", {**have, **settings})
        out.vocabulary = vocabulary or base.manifest.vocabulary
        out.facts = {"base_digest": base_digest or base.digest}
        return out.publish("adapter").reference

    return make


@pytest.fixture
def said(tiny_model, packed_text, tmp_path) -> Callable[..., str]:
    """`said(**options)`: what the command says on standard error. It must end with 2, write nothing, say one line."""

    def run(stage: str = "pretrain", **options: Any) -> str:
        store = tmp_path / "store"
        given = {"store": store, "model": tiny_model, "dataset": packed_text, **options}
        if stage == "pretrain":
            given.setdefault("stage", "lora")
        words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PET_")}
        done = subprocess.run(
            [sys.executable, "-m", f"components.{stage}", *words],
            env={**environment, "ZHLLAMA_CACHE": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.splitlines()
        assert done.stdout == ""
        assert not [path for path in store.rglob("*") if path.is_file()]
        assert line.startswith("error: ")
        return line.removeprefix("error: ")

    return run


# --- the vocabulary contract ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_dataset_of_another_tokenizer(said, packed_text, tmp_path):
    dataset = changed(packed_text, tmp_path, "foreign", vocabulary=foreign(packed_text))
    assert "the first foreign the second where they must be equal" in said(dataset=dataset)


@pytest.mark.slow
def test_a_dataset_of_a_tokenizer_that_extends_the_models(said, packed_text, extended_model, tmp_path):
    vocabulary = open_artifact(extended_model).manifest.vocabulary
    dataset = changed(packed_text, tmp_path, "extended", vocabulary=vocabulary)
    assert "the first extends the second where they must be equal" in said(dataset=dataset)


def test_a_model_whose_rows_are_not_its_tokenizers(said, tiny_model, tmp_path):
    model = changed(tiny_model, tmp_path, "rows", config__json=settings_of(tiny_model, vocab_size=801))
    assert "model.embed_tokens.weight is (800, 64) where config.json says (801, 64)" in said(model=model)


def test_an_adapter_of_another_tokenizer(said, adapter, tiny_model):
    assert "--adapter" in (line := said(adapter=adapter(vocabulary=foreign(tiny_model))))
    assert "foreign the second where they must be equal" in line


def test_an_adapter_of_another_model(said, adapter):
    assert "it was trained on the model 111111111111, not on" in said(adapter=adapter(base_digest="1" * 64))


# --- model and data ---------------------------------------------------------------------------------------------------


def test_blocks_longer_than_the_models_positions(said, tiny_model, tmp_path):
    model = changed(tiny_model, tmp_path, "short", config__json=settings_of(tiny_model, max_position_embeddings=32))
    assert "blocks of 64 tokens, but the model has 32 positions" in said(model=model)


def test_a_model_that_is_no_llama(said, tiny_model, tmp_path):
    model = changed(tiny_model, tmp_path, "other", config__json=settings_of(tiny_model, model_type="gpt2"))
    assert "of a gpt2 model (model_type); only LLaMA, Mistral" in said(model=model)


def test_a_model_whose_settings_are_none(said, tiny_model, tmp_path):
    model = changed(tiny_model, tmp_path, "cut", config__json=settings_of(tiny_model)[:-20])
    assert "config.json is no JSON object (" in said(model=model)


@pytest.mark.parametrize(("option", "needed"), [("dataset", KIND), ("adapter", "adapter")])
def test_a_model_where_something_else_is_needed(option, needed, said, tiny_model):
    assert f"this is of kind hf-model; {needed} is needed" in said(**{option: tiny_model})


# --- replay -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"facts": {"block_size": 32}}, "blocks of 32 tokens, and the dataset's have 64; prepare it with --block-size"),
        ({"facts": {"splits": {}}}, "no blocks to train on in it"),
        ({"facts": {"splits": {"train": {"columns": 2}}}}, "nothing of it is held out to measure --forgetting-budget"),
        ({"facts": {"prompt": "alpaca-newline"}}, "its items ask otherwise than the dataset's"),
    ],
)
def test_what_cannot_be_replayed(changes, words, tiny_model, packed_text, tmp_path):
    replay = changed(packed_text, tmp_path, "replay", **changes)
    given = {"store": "s", "model": tiny_model, "dataset": packed_text}
    options = PretrainOptions(**given, stage="lora", replay=replay, forgetting_budget=0.03)
    with pytest.raises(InputError, match=f"--replay .*{words}"):
        checked_inputs(options, Inputs(options))


def test_replay_of_another_tokenizer(said, packed_text, tmp_path):
    replay = changed(packed_text, tmp_path, "foreign-replay", vocabulary=foreign(packed_text))
    line = said(replay=replay)
    assert "--replay" in line
    assert "foreign the second where they must be equal" in line


@pytest.mark.parametrize(
    ("replayed", "figures", "words"),
    [
        (None, {}, "it was trained without --replay"),
        ("0" * 64, {}, "it was trained with another --replay"),
        ("", {}, "it names no base_replay_loss"),
        ("", {"base_replay_loss": 2.5}, ""),
    ],
)
def test_an_earlier_training_that_the_budget_counts_from(replayed, figures, words, tiny_model, packed_text, tmp_path):
    digest = open_artifact(packed_text).digest
    before = {} if replayed is None else {"replay": Input("r", replayed or digest)}
    out = ArtifactWriter(str(tmp_path / "before"), "pretrain", "key", {}, before)
    out.add_json("adapter_config.json", {})
    out.metrics |= figures
    base = out.publish("adapter").reference
    given = {"store": "s", "model": tiny_model, "dataset": packed_text, "replay": packed_text}
    options = PretrainOptions(**given, stage="lora", forgetting_base=base, forgetting_budget=0.03)
    if not words:
        assert checked_inputs(options, Inputs(options)).base_loss == 2.5
        return
    with pytest.raises(InputError, match=f"--forgetting-base .*{words}"):
        checked_inputs(options, Inputs(options))


def test_no_average_is_kept_of_weights_in_parts(tiny_model, packed_text):
    options = PretrainOptions(
        store="s", model=tiny_model, dataset=packed_text, stage="lora", ema=0.9, deepspeed="zero3"
    )
    with pytest.raises(InputError, match=r"--ema 0.9: under ZeRO-3 .* give --deepspeed zero2 or none"):
        checked_inputs(options, Inputs(options))


def test_an_empty_dataset(said, tiny_model, tmp_path):
    out = ArtifactWriter(str(tmp_path / "empty"), "prepare_dataset", "key")
    out.add_bytes("README.md", b"no blocks")
    out.vocabulary = open_artifact(tiny_model).manifest.vocabulary
    out.facts = {"block_size": 64, "token_type": "<u2", "pad_id": 0, "splits": {}}
    assert "no blocks to train on in it" in said(dataset=out.publish(KIND).reference)


def test_the_recipes_batches_of_blocks_that_were_packed_otherwise(said, packed_text, tmp_path):
    dataset = changed(packed_text, tmp_path, "best-fit", configuration={"packing": "best-fit"})
    line = said(dataset=dataset, faithful=True)
    assert "was packed as best-fit, several documents to a block; prepare it with --packing faithful" in line


# --- the adapter's shape ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["attention", "input_layernorm"], ids=["no layer", "no matrix"])
def test_a_lora_target_that_does_not_exist(target, said):
    line = said(lora_targets=f"q_proj,{target}")
    assert line.startswith(f"--lora-targets {target}: ")
    assert "has no such layer" in line


def test_an_option_that_contradicts_the_adapter(said, adapter):
    assert said(adapter=adapter(), lora_r=8).startswith("--lora-r 8: the adapter ")


def test_an_adapter_without_weights(said, adapter):
    line = said(adapter=adapter())
    assert line.startswith("--adapter ")
    assert "neither adapter_model.safetensors nor adapter_model.bin in it" in line


def test_new_rows_of_a_model_that_was_never_extended(said):
    assert "--embedding-rows new: --model" in said(embedding_rows="new")


# --- DeepSpeed --------------------------------------------------------------------------------------------------------


def test_a_deepspeed_file_that_contradicts_the_options(said, tmp_path):
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 7}))
    assert said(deepspeed=own) == (
        f"--deepspeed {own}: gradient_accumulation_steps is 7, but --gradient-accumulation-steps is 1; write auto there"
    )


def test_a_deepspeed_file_that_is_not_there_or_no_json(said, tmp_path):
    assert "no such file; give a JSON file, zero2, zero2_offload, zero3 or none" in said(deepspeed="zero9")
    (tmp_path / "own.json").write_text("{")
    assert "not a readable JSON file" in said(deepspeed=tmp_path / "own.json")


def test_new_rows_under_zero_3(said, extended_model, packed_text, tmp_path):
    vocabulary = open_artifact(extended_model).manifest.vocabulary
    dataset = changed(packed_text, tmp_path, "extended", vocabulary=vocabulary)
    line = said(model=extended_model, dataset=dataset, embedding_rows="new", deepspeed="zero3")
    assert "under ZeRO-3 the embeddings lie in parts" in line


@pytest.mark.slow
def test_half_precision_without_a_gpu(said):
    assert said("finetune", precision="float16") == (
        "--precision float16: it needs a GPU, and there is none here; give bfloat16 or float32"
    )
