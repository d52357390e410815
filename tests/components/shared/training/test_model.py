"""What is trained and what is not, float32 masters, documents that do not see each other, adapters put back in."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from components.shared.artifact import open_artifact
from components.shared.errors import InputError
from components.shared.packed import PackedDataset
from components.shared.training.data import collate
from components.shared.training.model import (
    PackedLlama,
    adapter_config_json,
    add_lora,
    checkpoint_activations,
    load_base,
    read_back,
    train_embeddings_only,
    trainable,
)
from components.shared.training.options import LORA_TARGETS
from components.shared.training.shape import LoraShape

TARGETS = LORA_TARGETS.split(",")


def shape(r: int = 8, embeddings: str = "all", dropout: float = 0.0) -> LoraShape:
    return LoraShape(r, 4 * r, dropout, TARGETS, embeddings, tuple(range(700, 800)) if embeddings == "new" else ())


@pytest.fixture
def base(tiny_model: str) -> PackedLlama:
    return load_base(open_artifact(tiny_model), torch.float32)


@pytest.fixture
def batch(packed_text: str) -> dict[str, torch.Tensor]:
    dataset = PackedDataset(open_artifact(packed_text))
    return collate([dataset[index] for index in range(4)])


@pytest.mark.parametrize(
    ("pieces", "make", "count"),
    [
        (49_953, lambda model: train_embeddings_only(model, also_lm_head=False), 204_607_488),
        (49_953, lambda model: add_lora(model, shape()), 429_203_456),
        (49_954, lambda model: add_lora(model, shape()), 429_211_648),
        (49_954, lambda model: add_lora(model, shape(r=64)), 569_131_008),
    ],
    ids=["stage 1", "stage 2", "instructions", "instructions, rank 64"],
)
def test_as_many_parameters_of_a_7b_model_are_trained_as_in_the_recipe(pieces, make, count):
    config = LlamaConfig(
        vocab_size=pieces, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    with torch.device("meta"):
        model = PackedLlama(config).requires_grad_(False)
        assert sum(parameter.numel() for parameter in trainable(make(model))) == count


def test_trained_weights_are_float32_and_the_rest_stays_as_it_was(tiny_model):
    model = add_lora(load_base(open_artifact(tiny_model), torch.bfloat16), shape())
    assert {parameter.dtype for parameter in trainable(model)} == {torch.float32}
    frozen = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}
    assert frozen == {torch.bfloat16}


def test_the_loss_is_transformers_own(base, batch, tiny_model):
    base.train()
    found = base(**batch).loss
    plain = LlamaForCausalLM.from_pretrained(open_artifact(tiny_model).local(), dtype=torch.float32)
    logits = plain(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "under peft"])
def test_a_document_is_learnt_as_if_it_stood_alone(base, adapted, batch):
    model = add_lora(base, shape()) if adapted else train_embeddings_only(base, also_lm_head=True)
    model.train()
    ids = batch["input_ids"][:1, :40]
    positions = torch.cat([torch.arange(25), torch.arange(15)])[None]
    labels = torch.full_like(ids, -100)
    labels[:, 25:39] = ids[:, 26:40]
    together = model(input_ids=ids, position_ids=positions, labels=labels).loss
    alone = model(input_ids=ids[:, 25:], position_ids=positions[:, 25:], labels=labels[:, 25:]).loss
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    # the same tokens as one document do see each other: the comparison can fail
    joined = model(input_ids=ids, position_ids=torch.arange(40)[None], labels=labels).loss
    assert abs(joined.item() - alone.item()) > 1e-3


def test_the_head_that_is_trained_gets_the_gradient(base, batch):
    model = add_lora(base, shape())
    model.train()
    model(**batch).loss.backward()
    head = model.base_model.model.lm_head
    trained = head.modules_to_save["default"].weight
    assert trained.grad is not None
    assert trained.grad.abs().sum() > 0
    assert head.original_module.weight.grad is None


def test_gradients_are_the_same_with_activations_recomputed(tiny_model, batch):
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = add_lora(load_base(open_artifact(tiny_model), torch.float32), shape(embeddings=""))
        if recompute:
            checkpoint_activations(model)
        model.train()
        model(**batch).loss.backward()
        found.append([parameter.grad for parameter in trainable(model)])
    assert any(gradient.any() for gradient in found[0])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_tied_embeddings_cannot_be_trained_as_two(base):
    base.config.tie_word_embeddings = True
    with pytest.raises(InputError, match="tied"):
        add_lora(base, shape())


def test_an_adapter_of_another_shape_is_refused(tiny_model, tmp_path):
    small = add_lora(load_base(open_artifact(tiny_model), torch.float32), shape(r=4, embeddings=""))
    from peft import get_peft_model_state_dict

    save_file(get_peft_model_state_dict(small), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes(adapter_config_json(small))
    with pytest.raises(InputError, match="do not fit"):
        add_lora(load_base(open_artifact(tiny_model), torch.float32), shape(r=8), open_artifact(str(tmp_path)))


def test_the_adapters_description_names_no_path_and_is_ready_for_inference(base):
    value = json.loads(adapter_config_json(add_lora(base, shape())))
    assert value["base_model_name_or_path"] is None
    assert value["inference_mode"] is True
    assert sorted(value["target_modules"]) == sorted(TARGETS)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"a": torch.ones(2)}, "1 tensors saved where 2"),
        ({"a": torch.ones(2), "b": torch.empty(0)}, "tensor b is empty"),
        ({"a": torch.ones(2), "b": torch.tensor([1.0, torch.nan])}, "tensor b is empty or not finite"),
    ],
    ids=["one missing", "one empty", "one not a number"],
)
def test_a_saved_adapter_is_counted(tensors, said, tmp_path):
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=said):
        read_back(tmp_path / "adapter_model.safetensors", ["a", "b"])
