"""Instruction tuning: answers alone are learnt, an adapter is continued in its own shape, embeddings only when told."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from components.finetune.options import Finetune
from components.prepare_dataset.options import PrepareDataset
from components.prepare_dataset.preparer import prepare_dataset
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.open import open_artifact
from zhllama.data.packed import HELD_OUT_TEXT
from zhllama.errors import InputError
from zhllama.stage.run import run_stage
from zhllama.training.stage import run_training as finetune

QUICK = {
    "max_steps": 20,
    "logging_steps": 5,
    "learning_rate": 1e-2,
    "eval_steps": 0,
    "deepspeed": "none",
    "per_device_train_batch_size": 4,
}


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No PET_* from outside; checkpoints of this test only."""
    for name in [name for name in os.environ if name.startswith("PET_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ZHLLAMA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tune(tiny_model, packed_instructions, tmp_path):
    """`tune(**options)`: the stage on the tiny model and the Yes-or-No questions."""

    def run(**options) -> Manifest:
        chosen = {"model": tiny_model, "dataset": packed_instructions, "store": str(tmp_path / "store"), **QUICK}
        return run_stage(Finetune(**{**chosen, **options}), finetune)

    return run


def weights(manifest: Manifest) -> dict[str, torch.Tensor]:
    return load_file(Path(manifest.root) / "adapter_model.safetensors")


def config(manifest: Manifest) -> dict:
    return json.loads(open_artifact(manifest.reference).read("adapter_config.json"))


@pytest.mark.slow
def test_answers_are_learnt(tune):
    manifest = tune(max_steps=40)
    assert manifest.kind == "adapter"
    assert manifest.metrics["eval_loss"] < 0.6 * manifest.metrics["first_loss"]
    assert manifest.metrics["eval_accuracy"] > 0.5
    assert manifest.facts["summary"].endswith("in 40 steps")


@pytest.fixture
def english(tiny_model, english_text, tmp_path) -> str:
    """The reference of English text in blocks of 64, a fifth of it held out."""
    (tmp_path / "english.txt").write_text("\n".join(english_text[:200]))
    given = {"tokenizer": tiny_model, "text": str(tmp_path / "english.txt"), "store": str(tmp_path / "english")}
    return run_stage(PrepareDataset(**given, block_size=64, validation_fraction=0.2), prepare_dataset).reference


@pytest.mark.slow
def test_text_is_replayed_beside_instructions_and_measured_in_bits_per_byte(tune, english):
    replayed, measured = (tune(replay=english, replay_share=share).metrics for share in (0.5, 0.0))
    assert replayed["base_replay_loss"] == measured["base_replay_loss"]
    assert replayed["eval_replay_loss"] < measured["eval_replay_loss"]
    dataset = open_artifact(english)
    size = sum(len(json.loads(line)["text"].encode()) for line in dataset.read(HELD_OUT_TEXT).splitlines())
    labels = dataset.manifest.facts["splits"]["validation"]["learned"]
    bits = replayed["eval_replay_loss"] * labels / math.log(2) / size
    assert replayed["eval_replay_bits_per_byte"] == pytest.approx(bits)


@pytest.mark.slow
def test_a_training_counts_its_budget_from_where_the_one_before_did(tune, english):
    steered = {"replay": english, "forgetting_budget": 0.03, "eval_steps": 10}
    first = tune(**steered)
    second = tune(**steered, adapter=first.reference, forgetting_base=first.reference)
    assert second.metrics["base_replay_loss"] == first.metrics["base_replay_loss"]
    lines = [json.loads(line) for line in open_artifact(second.reference).read("metrics.jsonl").splitlines()]
    begins = lines[0]["eval_replay_loss"] / lines[0]["base_replay_loss"] - 1
    assert lines[0]["budget_spent"] == pytest.approx(begins / 0.03)
    assert begins != 0


@pytest.mark.parametrize("embeddings", [False, True])
def test_embeddings_are_trained_only_when_told(tune, embeddings):
    manifest = tune(train_embeddings=embeddings, max_steps=2)
    saved = {name.rsplit(".", 2)[1] for name in weights(manifest) if "lora_" not in name}
    assert saved == ({"embed_tokens", "lm_head"} if embeddings else set())
    assert bool(config(manifest).get("modules_to_save")) == embeddings == manifest.facts["embeddings"]


@pytest.mark.slow
def test_an_adapter_is_continued_in_its_own_shape(tune):
    first = tune(lora_r=4, lora_alpha=12.0, train_embeddings=True)
    second = tune(adapter=first.reference)
    assert (config(second)["r"], config(second)["lora_alpha"]) == (4, 12)
    assert weights(second).keys() == weights(first).keys()
    # it begins where the first one ended, not anew
    assert second.metrics["first_loss"] == pytest.approx(first.metrics["eval_loss"], rel=0.3)
    assert second.metrics["eval_loss"] < first.metrics["eval_loss"]
    assert second.inputs["adapter"].digest == first.digest


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"lora_r": 8}, "--lora-r 8: the adapter .* has 4"),
        ({"lora_alpha": 8.0}, "--lora-alpha 8: the adapter .* has 32"),
    ],
    ids=["rank", "alpha"],
)
def test_an_option_that_contradicts_the_adapter_is_refused(tune, option, said):
    first = tune(lora_r=4, max_steps=1)
    with pytest.raises(InputError, match=said):
        tune(adapter=first.reference, **option)


@pytest.mark.slow
@pytest.mark.parametrize("same", [True, False], ids=["the same weights, and a note", "other weights"])
def test_an_adapter_goes_on_with_the_weights_that_it_was_trained_on_alone(same, tune, tiny_model, tmp_path):
    from zhllama.artifacts.writer import ArtifactWriter

    first = tune(max_steps=1)
    source = open_artifact(tiny_model)
    out = ArtifactWriter(str(tmp_path / "other"), "convert_weights", "key")
    for name in source.names:
        out.copy(source, name)
    out.add_bytes("README.md", b"another artifact")
    if not same:
        name = next(name for name in source.names if name.endswith(".safetensors"))
        content = bytearray(source.read(name))
        content[-1] ^= 1
        out.add_bytes(name, bytes(content))
    out.vocabulary = source.manifest.vocabulary
    model = out.publish("hf-model")
    assert model.digest != source.digest
    if same:
        tune(adapter=first.reference, model=model.reference, max_steps=1)
        return
    with pytest.raises(InputError, match=r"it was trained on the model .*, not on the model"):
        tune(adapter=first.reference, model=model.reference)


@pytest.mark.slow
def test_the_same_work_is_not_done_again(tune, caplog):
    first = tune(max_steps=1)
    with caplog.at_level("INFO"):
        second = tune(max_steps=1)
    assert second == first
    assert "already done" in caplog.text


@pytest.mark.slow
def test_model_data_and_result_can_lie_in_s3(tune, tiny_model, packed_instructions, s3_store):
    from zhllama.artifacts.writer import ArtifactWriter

    def moved(reference: str) -> str:
        source = open_artifact(reference)
        out = ArtifactWriter(s3_store, source.manifest.stage, "key")
        for name in source.names:
            out.copy(source, name)
        out.vocabulary, out.facts = source.manifest.vocabulary, dict(source.manifest.facts)
        return out.publish(source.manifest.kind).reference

    here = tune(max_steps=2)
    there = tune(max_steps=2, model=moved(tiny_model), dataset=moved(packed_instructions), store=s3_store)
    assert there.root.startswith("s3://")
    assert there.metrics["loss"] == here.metrics["loss"]
    names = {file.path: file.sha256 for file in there.files}
    assert (
        names["adapter_model.safetensors"]
        == {file.path: file.sha256 for file in here.files}["adapter_model.safetensors"]
    )


# --- the recipe's batches ---------------------------------------------------------------------------------------------


@pytest.fixture
def one_by_one(tiny_model, llama_tokenizer, tmp_path) -> str:
    """The reference of 40 questions, each padded to a block of its own, as prepare_dataset packs them faithfully."""
    import numpy as np

    from tests.packed_data import Segment, blocks_of
    from zhllama.artifacts.writer import ArtifactWriter
    from zhllama.data.packed import KIND, TRAIN, PackedWriter, packed_facts
    from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder

    encoder = SentencePieceEncoder(llama_tokenizer)
    out = ArtifactWriter(str(tmp_path / "faithful"), "prepare_dataset", "key", {"packing": "faithful"})
    with PackedWriter(out, TRAIN, 64, encoder.size, 0) as split:
        for number in range(40):
            prompt = [encoder.bos, *encoder.encode(f"Is {number * 37} even?")]
            answer = [*encoder.encode("No" if number % 2 else "Yes"), encoder.eos]
            split.write_blocks(blocks_of([Segment(np.array(prompt + answer), prompt=len(prompt))]))
    out.vocabulary = open_artifact(tiny_model).manifest.vocabulary
    out.facts = packed_facts(64, encoder.size, 0, [split])
    return out.publish(KIND).reference


@pytest.mark.slow
def test_padded_samples_are_learnt_alike_with_and_without_what_padding_costs(tune, one_by_one):
    """What stands behind a sample is seen by nothing in it, so cutting it off changes no loss."""
    courses = []
    for faithful in (False, True):
        manifest = tune(dataset=one_by_one, faithful=faithful, max_steps=6, logging_steps=1, lora_dropout=0.0)
        lines = open_artifact(manifest.reference).read("metrics.jsonl").splitlines()
        courses.append([json.loads(line)["loss"] for line in lines])
    assert len(courses[0]) == 6
    assert courses[1] == pytest.approx(courses[0], abs=2e-5)


def test_an_adapter_that_is_trained_on_a_copy_of_the_model_at_another_place_is_the_same(tune, tiny_model, tmp_path):
    """adapter_config.json names where the model lies, for peft."""
    copy = tmp_path / "elsewhere" / "model"
    shutil.copytree(Path(tiny_model).parent, copy)
    first, second = tune(max_steps=2), tune(max_steps=2, model=str(copy), store=str(tmp_path / "other"))
    assert config(second)["base_model_name_or_path"] == str(copy) != config(first)["base_model_name_or_path"]
    assert second.digest == first.digest
    open_artifact(second.reference).verify()
