"""Both stages of continued pre-training: what changes, what is published; processes do not change the course."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from components.pretrain.pretraining import Pretrain, pretrain
from components.shared.artifact import ArtifactWriter, Manifest, open_artifact
from components.shared.cli import run_stage
from components.shared.errors import InputError
from components.shared.packed import PackedDataset
from components.shared.safetensors_io import Checkpoint
from components.shared.training.data import collate
from components.shared.training.inputs import EMBEDDING, HEAD

QUICK = {"max_steps": 4, "logging_steps": 1, "learning_rate": 1e-2, "eval_steps": 0, "deepspeed": "none"}


def lines_of(manifest: Manifest) -> list[dict[str, float]]:
    return [json.loads(line) for line in open_artifact(manifest.reference).read("metrics.jsonl").splitlines()]


def losses(manifest: Manifest) -> list[float]:
    return [line["loss"] for line in lines_of(manifest) if "loss" in line]


def manifest_of(store: Path) -> Manifest:
    (path,) = store.glob("pretrain/*/manifest.json")
    return open_artifact(str(path)).manifest


@pytest.fixture
def stage_1(tiny_model, packed_text, tmp_path) -> Manifest:
    options = Pretrain(stage="embeddings", model=tiny_model, dataset=packed_text, store=str(tmp_path / "s"), **QUICK)
    return run_stage(options, pretrain)


@pytest.fixture
def stage_2(tiny_model, packed_text, tmp_path) -> Manifest:
    options = Pretrain(stage="lora", model=tiny_model, dataset=packed_text, store=str(tmp_path / "s"), **QUICK)
    return run_stage(options, pretrain)


# --- stage 1 ----------------------------------------------------------------------------------------------------------


def test_stage_1_changes_embed_tokens_and_nothing_else(stage_1, tiny_model):
    before, after = Checkpoint(open_artifact(tiny_model)), Checkpoint(open_artifact(stage_1.reference))
    assert before.tensors.keys() == after.tensors.keys()
    changed = [name for name in before.tensors if not torch.equal(before.read(name), after.read(name))]
    assert changed == [EMBEDDING]
    assert {info.dtype for info in after.tensors.values()} == {"float16"}


def test_stage_1_gives_a_model_that_transformers_reads(stage_1, tiny_model):
    assert (stage_1.kind, stage_1.vocabulary) == ("hf-model", open_artifact(tiny_model).manifest.vocabulary)
    model = AutoModelForCausalLM.from_pretrained(Path(stage_1.root))
    tensor = Checkpoint(open_artifact(stage_1.reference)).read(EMBEDDING)
    assert torch.equal(model.get_input_embeddings().weight.half(), tensor)
    names = {file.path for file in stage_1.files}
    course = {"metrics.jsonl", "report.html", "tensorboard/events.out.tfevents.0.training"}
    assert names == {file.path for file in open_artifact(tiny_model).manifest.files} | course


def test_stage_1_trains_lm_head_too_when_told(tiny_model, packed_text, tmp_path):
    options = Pretrain(
        stage="embeddings", also_lm_head=True, model=tiny_model, dataset=packed_text, store=str(tmp_path), **QUICK
    )
    manifest = run_stage(options, pretrain)
    before, after = Checkpoint(open_artifact(tiny_model)), Checkpoint(open_artifact(manifest.reference))
    changed = [name for name in before.tensors if not torch.equal(before.read(name), after.read(name))]
    assert sorted(changed) == sorted([EMBEDDING, HEAD])


# --- stage 2 ----------------------------------------------------------------------------------------------------------


def test_stage_2_gives_an_adapter_that_names_its_model(stage_2, tiny_model):
    base = open_artifact(tiny_model)
    assert stage_2.kind == "adapter"
    assert stage_2.facts["base_digest"] == base.digest
    assert stage_2.facts["base_lineage"] == (base.manifest.facts.get("lineage") or [base.digest])
    assert stage_2.facts["tensors"] == 2 * 2 * 7 + 2
    assert stage_2.vocabulary == base.manifest.vocabulary
    weights = load_file(Path(stage_2.root) / "adapter_model.safetensors")
    assert len(weights) == stage_2.facts["tensors"]
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert open_artifact(stage_2.reference).read("tokenizer.model") == base.read("tokenizer.model")


def test_peft_puts_the_adapter_back_and_finds_the_held_out_loss_again(stage_2, tiny_model, packed_text):
    model = AutoModelForCausalLM.from_pretrained(Path(tiny_model).parent, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, stage_2.root).eval()
    held_out = PackedDataset(open_artifact(packed_text), "validation")
    batch = collate([held_out[index] for index in range(len(held_out))])
    with torch.no_grad():
        logits = adapted(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, attention_mask=None
        ).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
    at = batch["labels"] != -100
    accuracy = (logits.argmax(dim=-1)[at] == batch["labels"][at]).float().mean().item()
    # float16 weights against the float32 ones that were evaluated
    assert loss.item() == pytest.approx(stage_2.metrics["eval_loss"], abs=2e-3)
    assert accuracy == pytest.approx(stage_2.metrics["eval_accuracy"], abs=5e-3)
    assert stage_2.metrics["eval_loss"] < stage_2.metrics["first_loss"]


def test_the_course_is_recorded(stage_2):
    lines = lines_of(stage_2)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert lines[-1]["step"] == 4
    assert {"eval_loss", "eval_perplexity", "eval_accuracy"} <= lines[-1].keys()
    assert stage_2.metrics["tokens_per_second"] > 0
    assert stage_2.facts["summary"].endswith("in 4 steps")
    assert b"<svg" in open_artifact(stage_2.reference).read("report.html")


def test_nothing_of_the_work_folder_is_left(stage_2, tmp_path):
    assert not list((tmp_path / "cache/training").iterdir())


# --- processes --------------------------------------------------------------------------------------------------------


def test_two_processes_with_zero_2_take_the_course_of_one(command, tiny_model, packed_text, tmp_path):
    """Equal global batch, no dropout, six steps: losses within 2e-5, weights within what float16 resolves."""
    common = {**QUICK, "stage": "lora", "max_steps": 6, "lora_dropout": 0.0}
    one = Pretrain(
        model=tiny_model, dataset=packed_text, store=str(tmp_path / "one"), **common, per_device_train_batch_size=4
    )
    alone = run_stage(one, pretrain)
    two = {**common, "deepspeed": "zero2", "per_device_train_batch_size": 2, "store": tmp_path / "two"}
    process = command(processes=2, **two)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    together = manifest_of(tmp_path / "two")
    assert losses(together) == pytest.approx(losses(alone), abs=2e-5)
    assert together.metrics["eval_loss"] == pytest.approx(alone.metrics["eval_loss"], abs=2e-5)
    one_by_one = zip(
        *(sorted(load_file(Path(m.root) / "adapter_model.safetensors").items()) for m in (alone, together))
    )
    for (name, alone_tensor), (other, tensor) in one_by_one:
        assert name == other
        torch.testing.assert_close(tensor, alone_tensor, rtol=2e-2, atol=2e-3)


# --- wrong input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def foreign_dataset(packed_text, tmp_path) -> str:
    """The packed text as another tokenizer's."""
    from dataclasses import replace

    source = open_artifact(packed_text)
    out = ArtifactWriter(str(tmp_path / "foreign"), "prepare_dataset", "key")
    for name in source.names:
        out.copy(source, name)
    assert source.manifest.vocabulary is not None
    out.vocabulary = replace(source.manifest.vocabulary, digest="0" * 64)
    out.facts = dict(source.manifest.facts)
    return out.publish("packed-dataset").reference


def test_a_dataset_of_another_tokenizer_is_refused_before_anything_starts(tiny_model, foreign_dataset, tmp_path):
    options = Pretrain(stage="lora", model=tiny_model, dataset=foreign_dataset, store=str(tmp_path / "s"), **QUICK)
    with pytest.raises(InputError, match=r"--dataset .* foreign the second where they must be equal"):
        run_stage(options, pretrain)
    assert not list((tmp_path / "s").rglob("*.*"))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"lora_targets": "q_proj,attention"}, "--lora-targets attention: .* has no such layer"),
        ({"deepspeed": "missing.json"}, "--deepspeed missing.json: no such file"),
        ({"adapter": "{tiny_model}"}, "this is a hf-model; a adapter is needed"),
        ({"dataset": "{tiny_model}"}, "this is a hf-model; a packed-dataset is needed"),
    ],
    ids=["no such layer", "no such file", "a model for an adapter", "a model for a dataset"],
)
def test_wrong_input_is_one_line(wrong, said, tiny_model, packed_text, tmp_path):
    wrong = {name: value.format(tiny_model=tiny_model) for name, value in wrong.items()}
    chosen = {"model": tiny_model, "dataset": packed_text, **QUICK, **wrong}
    with pytest.raises(InputError, match=said):
        run_stage(Pretrain(stage="lora", store=str(tmp_path), **chosen), pretrain)


def test_blocks_longer_than_the_models_positions_are_refused(tiny_model, packed_text, tmp_path):
    source = open_artifact(tiny_model)
    out = ArtifactWriter(str(tmp_path / "short"), "convert_weights", "key")
    for name in source.names:
        if name != "config.json":
            out.copy(source, name)
    out.add_json("config.json", {**json.loads(source.read("config.json")), "max_position_embeddings": 32})
    out.vocabulary = source.manifest.vocabulary
    short = out.publish("hf-model").reference
    with pytest.raises(InputError, match="blocks of 64 tokens, but the model has 32 positions"):
        run_stage(Pretrain(stage="lora", model=short, dataset=packed_text, store=str(tmp_path), **QUICK), pretrain)


def test_a_rate_that_blows_up_stops_with_the_way_out(tiny_model, packed_text, tmp_path):
    options = {**QUICK, "learning_rate": 1e30, "warmup_steps": 0.0, "max_steps": 8}
    with pytest.raises(InputError, match=r"loss at step \d is (nan|inf).*--learning-rate"):
        run_stage(
            Pretrain(stage="lora", model=tiny_model, dataset=packed_text, store=str(tmp_path), **options), pretrain
        )


def test_a_deepspeed_file_that_contradicts_the_options_is_refused(command, tmp_path):
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 7}))
    process = command(processes=2, **{**QUICK, "stage": "lora", "deepspeed": own})
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 2
    assert said == (
        f"error: --deepspeed {own}: gradient_accumulation_steps is 7, but --gradient-accumulation-steps is 1; "
        "write auto there\n"
    )
    assert not list((tmp_path / "store").rglob("manifest.json"))


def test_help_is_quick_and_needs_no_torch():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "components.pretrain", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert " torch\n" not in done.stderr
