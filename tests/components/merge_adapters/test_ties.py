"""Models whose head is their embedding: merged, they are the model with its adapter, tied or not as that is."""

import json
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.components.merge_adapters.conftest import randomise
from tests.components.merge_adapters.test_merger import merge, tensors_of
from zhllama.artifacts.open import open_artifact
from zhllama.errors import InputError
from zhllama.inference.load import load_model
from zhllama.weights import stream

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS = [799, 3, 500]


@pytest.fixture(scope="module")
def tied(tied_model) -> Path:
    return Path(tied_model)


@pytest.fixture(scope="module")
def adapter_of(tmp_path_factory, tied):
    """`adapter_of(seed, **LoraConfig)` → what peft saves of an adapter of the tied model."""

    def make(seed: int, **changes) -> Path:
        options = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | deepcopy(changes)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tied), LoraConfig(**options))
        randomise(model, seed)
        weights = dict(model.named_parameters())
        table = "base_model.model.model.embed_tokens.lora_embedding_{}.default"
        if options.get("ensure_weight_tying") and table.format("A") in weights:
            # one storage, when it is trained
            head = "base_model.model.lm_head.lora_{}.default.weight"
            weights[head.format("A")].data = weights[table.format("B")].data.T
            weights[head.format("B")].data = weights[table.format("A")].data.T
        folder = tmp_path_factory.mktemp(f"adapter-{seed}")
        model.save_pretrained(folder)
        return folder

    return make


def apart(folder: Path):
    """As peft says to load a tied model whose embedding and head are changed apart."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    return model


def logits(model, *, of: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.float().eval()(of).logits


PARTED = {
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "head saved": {"modules_to_save": ["lm_head"]},
    "both saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "LoRA on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA on both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "LoRA on one, the other saved": {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
    "rows of the head": {"trainable_token_indices": {"lm_head": ROWS}},
    "other rows of either": {"trainable_token_indices": {"embed_tokens": ROWS, "lm_head": [1, 3]}},
    "one saved, rows of the other": {
        "modules_to_save": ["embed_tokens"],
        "trainable_token_indices": {"lm_head": ROWS},
    },
}
TIED = {
    "neither": {},
    "saved as one": {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "the embedding, for both": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "the head, for both": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "LoRA on one": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "LoRA on one, by the head": {"target_modules": ["lm_head"], "ensure_weight_tying": True},
    "rows": {"trainable_token_indices": ROWS},
    "rows of the embedding": {"trainable_token_indices": {"embed_tokens": ROWS}},
    "rows of both": {"trainable_token_indices": {"embed_tokens": ROWS, "lm_head": ROWS}},
}
CASES = [pytest.param(changes, stays, id=name) for all_, stays in ((PARTED, False), (TIED, True))
         for name, changes in all_.items()]  # fmt: skip


@pytest.mark.parametrize(("changes", "stays"), CASES)
def test_the_merged_model_is_the_model_with_its_adapter(tmp_path, tied, adapter_of, changes, stays):
    adapter = adapter_of(1, **changes)
    manifest = merge(tmp_path, tied, adapter)
    prompt = torch.tensor([[1, 3, 500, 799, 7]])
    wanted = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tied), adapter), of=prompt)
    merged = AutoModelForCausalLM.from_pretrained(manifest.root)
    assert (logits(merged, of=prompt) - wanted).norm() < 2e-3 * wanted.norm()
    assert json.loads(open_artifact(manifest.root).read("config.json"))["tie_word_embeddings"] is stays
    assert (HEAD not in tensors_of(manifest)) is stays
    assert manifest.vocabulary.tied is stays


@pytest.mark.parametrize("name", list(PARTED))
def test_what_is_parted_has_the_bits_of_peft_on_the_model_with_two_tables(tmp_path, tied, adapter_of, name):
    adapter = adapter_of(2, **PARTED[name])
    wanted = PeftModel.from_pretrained(apart(tied), adapter).merge_and_unload().state_dict()
    found = tensors_of(merge(tmp_path, tied, adapter))
    assert {key for key, tensor in wanted.items() if not torch.equal(found[key], tensor)} == set()


def test_adapters_change_one_table_until_one_parts_it(tmp_path, tied, adapter_of):
    rows = adapter_of(1, trainable_token_indices=ROWS)
    saved = adapter_of(2, modules_to_save=["embed_tokens"])
    later = adapter_of(3, trainable_token_indices=[5, 6])
    model = AutoModelForCausalLM.from_pretrained(tied)
    for adapter in (rows, saved, later):
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    found, wanted = tensors_of(merge(tmp_path, tied, rows, saved, later)), model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert not torch.equal(wanted[EMBEDDING], wanted[HEAD])


def test_tables_are_compared_by_parts(tmp_path, tied, adapter_of, monkeypatch):
    monkeypatch.setattr(stream, "SPAN", 192 * 64)
    monkeypatch.setattr("zhllama.weights.ties.ROWS", 96)
    adapter = adapter_of(1, **TIED["saved as one"])
    assert HEAD not in tensors_of(merge(tmp_path / "tied", tied, adapter))
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    weights["base_model.model.lm_head.weight"][-1, -1] += 1
    save_file(weights, file)
    assert HEAD in tensors_of(merge(tmp_path / "apart", tied, adapter))


@pytest.mark.parametrize("own_file", [False, True], ids=["beside the embedding", "in a file of its own"])
def test_a_head_that_nobody_read_is_left_behind(tmp_path, tied, adapter_of, own_file):
    model = tmp_path / "model"
    shutil.copytree(tied, model)
    weights = load_file(model / "model.safetensors")
    stale = {HEAD: torch.zeros_like(weights[EMBEDDING])}
    if own_file:
        (model / "model.safetensors").rename(model / "a.safetensors")
        save_file(stale, model / "b.safetensors")
        places = dict.fromkeys(weights, "a.safetensors") | {HEAD: "b.safetensors"}
        (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    else:
        save_file(weights | stale, model / "model.safetensors", metadata={"format": "pt"})
    plain = merge(tmp_path / "store", model, adapter_of(1))
    assert {name for path in Path(plain.root).glob("*.safetensors") for name in load_file(path)} == set(weights)
    parted = tensors_of(merge(tmp_path / "store", model, adapter_of(1, modules_to_save=["embed_tokens"])))
    assert torch.equal(parted[HEAD], weights[EMBEDDING])


def test_a_model_without_a_head_is_tied_whatever_its_settings_leave_out(tmp_path, tied, adapter_of):
    model = tmp_path / "model"
    shutil.copytree(tied, model)
    settings = json.loads((model / "config.json").read_text())
    del settings["tie_word_embeddings"]
    (model / "config.json").write_text(json.dumps(settings))
    manifest = merge(tmp_path / "store", model, adapter_of(1))
    assert json.loads(Path(manifest.root, "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"] is True


def test_rows_of_the_embedding_beside_lora_on_the_head_are_refused(tmp_path, tied, adapter_of):
    adapter = adapter_of(1, target_modules=["lm_head"], trainable_token_indices={"embed_tokens": ROWS})
    with pytest.raises(InputError, match="trains rows of the embedding and LoRA on the head, which are one"):
        merge(tmp_path, tied, adapter)


def test_what_a_tied_model_becomes_can_be_proved(tmp_path, tied, adapter_of):
    rows, parts = adapter_of(1, trainable_token_indices=ROWS), adapter_of(2, **PARTED["LoRA on the embedding"])
    manifest = merge(tmp_path, tied, rows, parts, adapter_of(3), prove=True)
    assert manifest.facts["proof"]["relative_difference"] < 2e-3


@pytest.mark.parametrize(("changes", "stays"), CASES)
def test_what_is_asked_with_adapters_beside_is_what_they_merge_to(tmp_path, tied, adapter_of, changes, stays):
    adapters = [adapter_of(1, trainable_token_indices=[7, 8]), adapter_of(2, **changes), adapter_of(3)]
    wanted = tensors_of(merge(tmp_path, tied, *adapters))
    model = load_model(
        open_artifact(str(tied)), [open_artifact(str(one)) for one in adapters], precision="float32"
    ).model
    found, prompt = model.state_dict(), torch.tensor([[1, 3, 500, 799, 7]])
    for name in wanted:
        assert (found[name] - wanted[name].float()).norm() <= 2e-3 * wanted[name].float().norm(), name
    assert model.config.tie_word_embeddings is stays
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is stays
    merged = AutoModelForCausalLM.from_pretrained(next(tmp_path.glob("merge_adapters/*")))
    assert (logits(model, of=prompt) - logits(merged, of=prompt)).norm() < 2e-3 * logits(merged, of=prompt).norm()
