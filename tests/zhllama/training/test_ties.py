"""Tied models are trained as the one table that they have, and their adapters merge to what was trained."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.merge_adapters.merger import merge_adapters
from components.merge_adapters.options import MergeAdapters
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.data.packed import PackedDataset
from zhllama.errors import InputError
from zhllama.inference.load import load_model
from zhllama.stage.run import run_stage
from zhllama.tokenizer.vocabulary import load_encoder
from zhllama.training.inputs import LoraShape, TrainingInputs
from zhllama.training.model import add_lora, collate, load_base, train_embeddings_only, trainable, trained_weights
from zhllama.training.worker import _add_adapter, _add_model
from zhllama.weights.safetensors_io import Checkpoint

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
KEY = "base_model.model."


def shape(embeddings: str) -> LoraShape:
    return LoraShape(4, 16, 0.0, ["q_proj", "v_proj"], embeddings, tuple(range(700, 800)) * (embeddings == "new"))


@pytest.fixture
def inputs(tied_model, packed_text) -> TrainingInputs:
    model = open_artifact(tied_model)
    return TrainingInputs(model, open_artifact(packed_text), None, load_encoder(model, "").vocabulary())


@pytest.fixture
def batch(packed_text):
    dataset = PackedDataset(open_artifact(packed_text))
    return collate([dataset[index] for index in range(4)])


def trained(model, batch):
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.3)
    model.train()
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def published(folder: Path, add, kind: str):
    out = ArtifactWriter(str(folder), "pretrain", "key")
    add(out)
    return open_artifact(out.publish(kind).reference)


def held_out_loss(model, batch) -> float:
    given = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = model(**given, use_cache=False, attention_mask=None).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100).item()


@pytest.mark.parametrize("embeddings", ["all", "new", ""])
def test_an_adapter_of_a_tied_model_goes_on_answers_and_merges_as_it_was_trained(
    tmp_path, tied_model, inputs, batch, embeddings
):
    model = add_lora(load_base(inputs.model, torch.float32), shape(embeddings)).train()
    before = model(**batch).loss.item()
    trained(model, batch)
    names = [name for name in trainable(model) if "lora_" not in name]
    assert len(names) == bool(embeddings)
    wanted = model(**batch).loss.item()
    assert wanted < before - 0.01
    adapter = published(tmp_path, lambda out: _add_adapter(out, inputs, model, trained_weights(model)), "adapter")
    further = add_lora(load_base(inputs.model, torch.float32), shape(embeddings), adapter)
    assert further.train()(**batch).loss.item() == pytest.approx(wanted, abs=2e-3)
    merged = run_stage(MergeAdapters(store=str(tmp_path), model=tied_model, adapters=adapter.root), merge_adapters)
    assert json.loads(Path(merged.root, "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"] is True
    assert HEAD not in Checkpoint(open_artifact(merged.root)).tensors
    for found in (load_model(open_artifact(merged.root)), load_model(inputs.model, [adapter])):
        assert held_out_loss(found.model, batch) == pytest.approx(wanted, abs=2e-3)


def test_the_gradient_of_the_one_table_is_of_both_its_uses(tied_model, batch):
    model = add_lora(load_base(open_artifact(tied_model), torch.float32), shape("all"))
    model.train()(**batch).loss.backward()
    (found,) = (one.grad for name, one in trainable(model).items() if "embed_tokens" in name)
    plain = load_base(open_artifact(tied_model), torch.float32).requires_grad_(True)
    plain.train()(**batch).loss.backward()
    torch.testing.assert_close(found, plain.model.embed_tokens.weight.grad)


def test_an_adapter_with_two_tables_is_not_put_into_one(tmp_path, tied_model, inputs):
    model = add_lora(load_base(inputs.model, torch.float32), shape("all"))
    adapter = published(tmp_path, lambda out: _add_adapter(out, inputs, model, trained_weights(model)), "adapter")
    file = Path(adapter.root, "adapter_model.safetensors")
    weights = load_file(file)
    weights[KEY + HEAD][0] += 1
    for name in ("manifest.json", "blocks.bin"):
        Path(adapter.root, name).unlink(missing_ok=True)
    save_file(weights, file)
    with pytest.raises(InputError, match="its embedding and head are two, and the model's are one"):
        add_lora(load_base(inputs.model, torch.float32), shape("all"), open_artifact(adapter.root))


@pytest.mark.parametrize("beside", [False, True], ids=["no head", "a head that nobody reads"])
def test_the_embeddings_phase_trains_the_head_with_them(tmp_path, tied_model, packed_text, inputs, batch, beside):
    if beside:
        folder = tmp_path / "model"
        folder.mkdir()
        for path in Path(tied_model).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        weights = load_file(folder / "model.safetensors")
        weights[HEAD] = torch.zeros(800, 64).half()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        inputs = TrainingInputs(open_artifact(str(folder)), inputs.dataset, None, inputs.vocabulary)
    model = trained(train_embeddings_only(load_base(inputs.model, torch.float32), also_lm_head=beside), batch)
    assert list(trainable(model)) == [EMBEDDING]
    wanted = model(**batch).loss.item()
    found = published(tmp_path, lambda out: _add_model(out, inputs, trained_weights(model)), "hf-model")
    assert held_out_loss(load_model(found).model, batch) == pytest.approx(wanted, abs=2e-3)
