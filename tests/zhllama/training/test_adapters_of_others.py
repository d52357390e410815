"""Adapters as peft, trl and LLaMA-Factory save them are continued as they are, and what was assumed is said."""

import json
import logging
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.data.packed import PackedDataset
from zhllama.errors import InputError
from zhllama.stage.inputs import Inputs
from zhllama.training.inputs import checked_inputs
from zhllama.training.model import collate, trainable, trained_model, trained_weights
from zhllama.training.options import FinetuneOptions
from zhllama.training.worker import _add_adapter
from zhllama.weights.adapter_config import AdapterConfig

MODULES = ["embed_tokens", "lm_head"]
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def adapter(tmp_path, tiny_model):
    """`adapter(**LoraConfig)`: what peft saves of a model that was trained somewhere."""

    def make(base: str = tiny_model, **changes) -> Path:
        options = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0}
        options |= deepcopy(changes)
        folder = Path(base) if Path(base).is_dir() else Path(base).parent
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(**options))
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return make


def given(adapter: Path, model: str, dataset: str) -> FinetuneOptions:
    return FinetuneOptions(store="s", model=model, dataset=dataset, adapter=str(adapter), deepspeed="none")


def continued(options: FinetuneOptions):
    return trained_model(options, checked_inputs(options, Inputs(options)), torch.float32)


def by_name(adapter: Path, change) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file)


def as_trl(adapter: Path, model: str) -> None:
    """With the tokenizer beside it, saved anew, and what was passed to the trainer."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(model).parent / name, adapter)
    (adapter / "training_args.bin").write_bytes(b"PK")
    (adapter / "trainer_state.json").write_text("{}")
    (adapter / "README.md").write_text("---\nbase_model: huggyllama/llama-7b\n---\n")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "huggyllama/llama-7b"
    (adapter / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("saved", [None, MODULES], ids=["LoRA", "with embeddings"])
@pytest.mark.parametrize("form", ["peft", "trl", "older peft", "no prefix"])
def test_it_goes_on_from_what_it_was(adapter, tiny_model, packed_text, caplog, form, saved):
    folder = adapter(modules_to_save=saved)
    batch = collate([PackedDataset(open_artifact(packed_text))[index] for index in range(4)])
    base = AutoModelForCausalLM.from_pretrained(Path(tiny_model).parent, dtype=torch.float32)
    asked = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = PeftModel.from_pretrained(base, folder)(**asked, use_cache=False, attention_mask=None).logits
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
    if form == "trl":
        as_trl(folder, tiny_model)
    elif form == "older peft":
        by_name(folder, lambda name: name.replace(".weight", ".default.weight") if "lora" in name else
                name.replace(".weight", ".modules_to_save.default.weight"))  # fmt: skip
    elif form == "no prefix":
        by_name(folder, lambda name: name.removeprefix("base_model.model."))
    with caplog.at_level(logging.INFO):
        model = continued(given(folder, tiny_model, packed_text)).train()
    assert model(**batch).loss.item() == pytest.approx(wanted.item(), abs=1e-4)
    pieces = "its vocabulary is the model's" if form == "trl" else "it names no vocabulary"
    said = f"{pieces}; its tensors fit: taken as trained on this model, with its 800 pieces"
    assert said in caplog.text
    assert ("though it names huggyllama/llama-7b" in caplog.text) is (form == "trl")


def test_another_vocabulary_beside_it_is_refused(adapter, tiny_model, packed_text):
    folder = adapter()
    as_trl(folder, tiny_model)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = list(vocabulary)[500:502]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match=r"800 pieces \(\w+\): the first foreign the second where they must be equal"):
        checked_inputs(options := given(folder, tiny_model, packed_text), Inputs(options))


def test_other_shapes_and_half_an_adapter_are_refused_before_a_weight_is_read(adapter, tiny_model, packed_text):
    folder = adapter()
    options, file = given(folder, tiny_model, packed_text), folder / "adapter_model.safetensors"
    weights = load_file(file)
    save_file(weights | {KEY: torch.zeros(4, 96)}, file)
    with pytest.raises(InputError, match=r"q_proj\.weight is \(64, 96\) in the adapter and \(64, 64\) in the model"):
        checked_inputs(options, Inputs(options))
    save_file({name: tensor for name, tensor in weights.items() if "layers.0" not in name}, file)
    with pytest.raises(InputError, match="it was cut short"):
        checked_inputs(options, Inputs(options))


ITS_OWN = {
    "rank-stabilised": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 5}},
    "one layer": {"layers_to_transform": 1},
    "layers left out": {"target_modules": "all-linear", "exclude_modules": ["up_proj"]},
    "an expression": {"target_modules": r".*layers\.0\..*q_proj"},
    "another module": {"modules_to_save": ["norm", "lm_head"]},
    "rows of the embedding": {"trainable_token_indices": [3, 5]},
    "other rows of either": {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [5, 7]}},
}


@pytest.mark.parametrize("name", ITS_OWN)
def test_what_it_has_of_its_own_is_trained_on_and_kept(tmp_path, adapter, tiny_model, packed_text, name):
    folder = adapter(**ITS_OWN[name])
    batch = collate([PackedDataset(open_artifact(packed_text))[index] for index in range(2)])
    options = given(folder, tiny_model, packed_text)
    inputs = checked_inputs(options, Inputs(options))
    model = trained_model(options, inputs, torch.float32).train()
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.3)
    before = model(**batch).loss
    before.backward()
    optimizer.step()
    after = model(**batch).loss.item()
    assert after < before.item()
    out = ArtifactWriter(str(tmp_path / "store"), "finetune", "key")
    _add_adapter(out, inputs, model, trained_weights(model))
    published = open_artifact(out.publish("adapter").reference)
    kept, had = (AdapterConfig(open_artifact(str(one)), "").for_peft() for one in (published.root, folder))
    assert kept == had
    options = given(published.root, tiny_model, packed_text)
    assert continued(options).train()(**batch).loss.item() == pytest.approx(after, abs=2e-3)


def test_padding_without_a_row_is_not_held_against_it(adapter, tiny_model, packed_text):
    folder = adapter()
    (folder / "added_tokens.json").write_text('{"[PAD]": 800}')
    checked_inputs(options := given(folder, tiny_model, packed_text), Inputs(options))


@pytest.mark.parametrize(
    "changes",
    [
        {"modules_to_save": MODULES, "ensure_weight_tying": True},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"trainable_token_indices": [3, 5]},
    ],
    ids=["both", "the embedding", "rows"],
)
def test_of_a_tied_model_it_goes_on_as_one_table(adapter, tied_model, packed_text, changes):
    folder = adapter(base=tied_model, **changes)
    model = continued(given(folder, tied_model, packed_text))
    (name,) = [name for name, one in model.named_parameters() if one.requires_grad and "lora_" not in name]
    assert "embed_tokens" in name
    (key,) = [key for key in load_file(folder / "adapter_model.safetensors") if "embed_tokens" in key]
    found = dict(model.named_parameters())[name]
    assert torch.equal(found, load_file(folder / "adapter_model.safetensors")[key].float())


@pytest.mark.parametrize("table", MODULES)
def test_lora_on_a_table_is_refused(adapter, tiny_model, packed_text, table):
    folder = adapter(target_modules=["q_proj", table])
    with pytest.raises(InputError, match=rf"it has LoRA on \S*{table}.weight, which is trained by rows here"):
        checked_inputs(options := given(folder, tiny_model, packed_text), Inputs(options))


def test_two_tables_for_the_one_of_a_tied_model_are_refused(adapter, tied_model, packed_text):
    folder = adapter(base=tied_model, modules_to_save=MODULES)
    with pytest.raises(InputError, match="its embedding and head are two, and the model's are one"):
        checked_inputs(options := given(folder, tied_model, packed_text), Inputs(options))
