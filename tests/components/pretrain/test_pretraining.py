"""Both phases of continued pre-training: what changes, what is published; processes do not change the course."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from components.merge_adapters.merger import merge_adapters
from components.merge_adapters.options import MergeAdapters
from components.pretrain.options import Pretrain
from zhllama.artifacts.cache import materialize
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.open import open_artifact
from zhllama.data.packed import PackedDataset
from zhllama.errors import InputError
from zhllama.stage.run import run_stage
from zhllama.training.inputs import EMBEDDING
from zhllama.training.model import collate
from zhllama.training.stage import run_training as pretrain
from zhllama.weights.safetensors_io import Checkpoint

HEAD = "lm_head.weight"
QUICK = {"max_steps": 4, "logging_steps": 1, "learning_rate": 1e-2, "eval_steps": 0, "deepspeed": "none"}


def lines_of(manifest: Manifest) -> list[dict[str, float]]:
    return [json.loads(line) for line in open_artifact(manifest.reference).read("metrics.jsonl").splitlines()]


def losses(manifest: Manifest) -> list[float]:
    return [line["loss"] for line in lines_of(manifest) if "loss" in line]


def manifest_of(store: Path) -> Manifest:
    (path,) = store.glob("pretrain/*/manifest.json")
    return open_artifact(str(path)).manifest


def held_out_score(model: PeftModel, dataset: str) -> tuple[float, float]:
    """Loss and accuracy of transformers' own model over a dataset's validation blocks."""
    held_out = PackedDataset(open_artifact(dataset), "validation")
    batch = collate([held_out[index] for index in range(len(held_out))])
    with torch.no_grad():
        logits = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, attention_mask=None
        ).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
    at = batch["labels"] != -100
    return loss.item(), (logits.argmax(dim=-1)[at] == batch["labels"][at]).float().mean().item()


@pytest.fixture
def embeddings(tiny_model, packed_text, tmp_path) -> Manifest:
    options = Pretrain(stage="embeddings", model=tiny_model, dataset=packed_text, store=str(tmp_path / "s"), **QUICK)
    return run_stage(options, pretrain)


@pytest.fixture
def lora(tiny_model, packed_text, tmp_path) -> Manifest:
    options = Pretrain(stage="lora", model=tiny_model, dataset=packed_text, store=str(tmp_path / "s"), **QUICK)
    return run_stage(options, pretrain)


# --- embeddings -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_embeddings_phase_changes_embed_tokens_and_nothing_else(embeddings, tiny_model):
    before, after = Checkpoint(open_artifact(tiny_model)), Checkpoint(open_artifact(embeddings.reference))
    assert before.tensors.keys() == after.tensors.keys()
    changed = [name for name in before.tensors if not torch.equal(before.read(name), after.read(name))]
    assert changed == [EMBEDDING]
    assert {info.dtype for info in after.tensors.values()} == {"float16"}


@pytest.mark.slow
def test_the_embeddings_phase_gives_a_model_that_transformers_reads(embeddings, tiny_model):
    assert (embeddings.kind, embeddings.vocabulary) == ("hf-model", open_artifact(tiny_model).manifest.vocabulary)
    model = AutoModelForCausalLM.from_pretrained(Path(embeddings.root))
    tensor = Checkpoint(open_artifact(embeddings.reference)).read(EMBEDDING)
    assert torch.equal(model.get_input_embeddings().weight.half(), tensor)
    names = {file.path for file in embeddings.files}
    assert names == {file.path for file in open_artifact(tiny_model).manifest.files}
    course = {"metrics.jsonl", "report.html", "tensorboard/events.out.tfevents.0.training"}
    assert {file.path for file in embeddings.beside} == course


@pytest.mark.slow
def test_the_embeddings_phase_trains_lm_head_too_when_told(tiny_model, packed_text, tmp_path):
    options = Pretrain(
        stage="embeddings", also_lm_head=True, model=tiny_model, dataset=packed_text, store=str(tmp_path), **QUICK
    )
    manifest = run_stage(options, pretrain)
    before, after = Checkpoint(open_artifact(tiny_model)), Checkpoint(open_artifact(manifest.reference))
    changed = [name for name in before.tensors if not torch.equal(before.read(name), after.read(name))]
    assert sorted(changed) == sorted([EMBEDDING, HEAD])


# --- lora -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_lora_phase_gives_an_adapter_that_names_its_model(lora, tiny_model):
    base = open_artifact(tiny_model)
    assert lora.kind == "adapter"
    assert lora.facts["base_digest"] == base.digest
    assert lora.facts["base_lineage"] == (base.manifest.facts.get("lineage") or [base.digest])
    assert lora.facts["tensors"] == 2 * 2 * 7 + 2
    assert lora.vocabulary == base.manifest.vocabulary
    weights = load_file(Path(lora.root) / "adapter_model.safetensors")
    assert len(weights) == lora.facts["tensors"]
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert open_artifact(lora.reference).read("tokenizer.model") == base.read("tokenizer.model")


@pytest.mark.slow
def test_peft_puts_the_adapter_back_and_finds_the_held_out_loss_again(lora, tiny_model, packed_text):
    model = AutoModelForCausalLM.from_pretrained(Path(tiny_model).parent, dtype=torch.float32)
    loss, accuracy = held_out_score(PeftModel.from_pretrained(model, lora.root).eval(), packed_text)
    # float16 weights against the float32 ones that were evaluated
    assert loss == pytest.approx(lora.metrics["eval_loss"], abs=2e-3)
    assert accuracy == pytest.approx(lora.metrics["eval_accuracy"], abs=5e-3)
    assert lora.metrics["eval_loss"] < lora.metrics["first_loss"]


@pytest.mark.slow
def test_the_course_is_recorded(lora):
    lines = lines_of(lora)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert lines[-1]["step"] == 4
    assert {"eval_loss", "eval_perplexity", "eval_accuracy"} <= lines[-1].keys()
    assert lora.metrics["tokens_per_second"] > 0
    assert lora.facts["summary"].endswith("in 4 steps")
    assert b"<svg" in open_artifact(lora.reference).read("report.html")


@pytest.mark.slow
def test_nothing_of_the_work_folder_is_left(lora, tmp_path):
    assert not list((tmp_path / "cache/training").iterdir())


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("zero2", {}),
        pytest.param("zero3", {"gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param("zero2", {"embedding_rows": "new"}, marks=pytest.mark.slowest),
    ],
    ids=["ZeRO-2", "ZeRO-3, activations recomputed", "ZeRO-2, new rows"],
)
def test_two_processes_take_the_course_of_one(backend, options, command, extended_model, packed_chinese, tmp_path):
    common = {**QUICK, **options, "model": extended_model, "dataset": packed_chinese}
    assert_the_course_of_one(command, tmp_path, backend, common)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zero2", "zero3"], ids=["ZeRO-2", "ZeRO-3"])
def test_the_one_table_of_a_tied_model_is_trained_by_two_processes(backend, command, tied_model, packed_text, tmp_path):
    common = {**QUICK, "model": tied_model, "dataset": packed_text}
    together = assert_the_course_of_one(command, tmp_path, backend, common)
    weights = load_file(Path(together.root) / "adapter_model.safetensors")
    tables = [tensor for name, tensor in weights.items() if "embed_tokens" in name or "lm_head" in name]
    assert len(tables) == 2
    assert torch.equal(*tables)


def assert_the_course_of_one(command, folder, backend, options) -> Manifest:
    """Equal global batch, no dropout, six steps: losses within 2e-5, weights within what float16 resolves."""
    common = {**options, "stage": "lora", "max_steps": 6, "lora_dropout": 0.0}
    one = Pretrain(store=str(folder / "one"), **common, per_device_train_batch_size=4)
    alone = run_stage(one, pretrain)
    two = {**common, "deepspeed": backend, "per_device_train_batch_size": 2, "store": folder / "two"}
    process = command(processes=2, **two)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    together = manifest_of(folder / "two")
    assert losses(together) == pytest.approx(losses(alone), abs=2e-5)
    assert together.metrics["eval_loss"] == pytest.approx(alone.metrics["eval_loss"], abs=2e-5)
    one_by_one = zip(
        *(sorted(load_file(Path(m.root) / "adapter_model.safetensors").items()) for m in (alone, together))
    )
    for (name, alone_tensor), (other, tensor) in one_by_one:
        assert name == other
        torch.testing.assert_close(tensor, alone_tensor, rtol=2e-2, atol=2e-3)
    return together


@pytest.mark.slow
def test_the_optimizer_may_lie_on_the_host(command, tiny_model, packed_text, tmp_path):
    alone = run_stage(
        Pretrain(stage="lora", model=tiny_model, dataset=packed_text, store=str(tmp_path / "s"), **QUICK), pretrain
    )
    process = command(**{**QUICK, "stage": "lora", "deepspeed": "zero2_offload", "store": tmp_path / "offloaded"})
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    assert losses(manifest_of(tmp_path / "offloaded")) == pytest.approx(losses(alone), abs=2e-5)


@pytest.mark.slow
def test_in_bfloat16_every_backend_keeps_float32_masters(command, tiny_model, tmp_path):
    """Steps of 5e-5 on weights whose neighbours in bfloat16 lie up to 5e-4 apart: six of them move the masters."""
    before = Checkpoint(open_artifact(tiny_model)).read(HEAD).float()
    lr = 5e-5
    options = {**QUICK, "max_steps": 6, "stage": "lora", "precision": "bfloat16", "learning_rate": lr}
    options |= {"lr_scheduler_type": "constant", "warmup_steps": 0, "lora_dropout": 0.0, "weight_decay": 0.0}
    heads = []
    for backend in ("none", "zero2"):
        process = command(**{**options, "deepspeed": backend, "store": tmp_path / backend})
        said = process.communicate(timeout=300)[1]
        assert process.returncode == 0, said
        found = load_file(Path(manifest_of(tmp_path / backend).root) / "adapter_model.safetensors")
        (head,) = (tensor for name, tensor in found.items() if "lm_head" in name)
        heads.append(head.float())
    # where bfloat16 stood, since the base is loaded in it
    moved = [(head - before.bfloat16().float()).abs() for head in heads]
    for distance in moved:
        assert (distance > 0.5 * lr).float().mean() > 0.8
        assert distance.max() < 6 * lr + 1e-4
    assert (heads[0] - heads[1]).abs().mean() < 0.2 * moved[0].mean()


# --- what is trained --------------------------------------------------------------------------------------------------


def test_embeddings_may_have_an_lr_of_their_own(tiny_model, packed_text, tmp_path):
    options = {**QUICK, "embedding_lr": 1e-12, "weight_decay": 0.0}
    still = run_stage(
        Pretrain(stage="lora", model=tiny_model, dataset=packed_text, store=str(tmp_path), **options), pretrain
    )
    found = load_file(Path(still.root) / "adapter_model.safetensors")
    base = Checkpoint(open_artifact(tiny_model))
    for name, tensor in found.items():
        if "lora_B" in name:
            assert tensor.abs().max() > 1e-3, name
        for table in (EMBEDDING, HEAD):
            if name.endswith(table):
                torch.testing.assert_close(tensor, base.read(table), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_an_adapter_of_new_rows_is_put_back_by_peft(extended_model, packed_chinese, tmp_path):
    options = {**QUICK, "embedding_rows": "new", "stage": "lora", "lora_dropout": 0.0}
    manifest = run_stage(
        Pretrain(model=extended_model, dataset=packed_chinese, store=str(tmp_path), **options), pretrain
    )
    base = open_artifact(extended_model)
    before, size = base.manifest.facts["pieces_before"], base.manifest.vocabulary.size
    assert manifest.facts["new_rows"] == size - before
    found = load_file(Path(manifest.root) / "adapter_model.safetensors")
    assert manifest.facts["tensors"] == len(found) == 2 * 2 * 7 + 2
    rows = [tensor for name, tensor in found.items() if name.endswith("token_adapter.trainable_tokens_delta")]
    assert [tuple(tensor.shape) for tensor in rows] == [(size - before, 64)] * 2
    model = AutoModelForCausalLM.from_pretrained(materialize(base), dtype=torch.float32)
    loss, _ = held_out_score(PeftModel.from_pretrained(model, manifest.root).eval(), packed_chinese)
    assert loss == pytest.approx(manifest.metrics["eval_loss"], abs=2e-3)
    assert manifest.metrics["eval_loss"] < manifest.metrics["first_loss"]
    # merging puts the rows in their places, and nothing else into the embeddings
    merge = MergeAdapters(store=str(tmp_path), model=extended_model, adapters=manifest.reference)
    merged = Checkpoint(open_artifact(run_stage(merge, merge_adapters).reference))
    for table in (EMBEDDING, HEAD):
        old, new = Checkpoint(base).read(table), merged.read(table)
        assert torch.equal(old[:before], new[:before])
        (delta,) = (one for name, one in found.items() if table.split(".")[-2] in name)
        assert torch.equal(new[before:], delta)
    # and it can be continued, in its own shape
    further = Pretrain(
        model=extended_model, dataset=packed_chinese, store=str(tmp_path), **{**QUICK, "stage": "lora"},
        adapter=manifest.reference,
    )  # fmt: skip
    assert run_stage(further, pretrain).facts["new_rows"] == size - before


# --- wrong input ------------------------------------------------------------------------------------------------------


def test_an_lr_that_blows_up_stops_with_the_way_out(tiny_model, packed_text, tmp_path):
    options = {**QUICK, "learning_rate": 1e30, "warmup_steps": 0.0, "max_steps": 8}
    with pytest.raises(InputError, match=r"loss at step \d is (nan|inf).*--learning-rate"):
        run_stage(
            Pretrain(stage="lora", model=tiny_model, dataset=packed_text, store=str(tmp_path), **options), pretrain
        )


def test_help_is_quick_and_needs_no_torch():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "components.pretrain", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert " torch\n" not in done.stderr
