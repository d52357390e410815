"""What is trained and what is not, float32 masters, documents that do not see each other, adapters put back in."""

import itertools
import json
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from zhllama.artifacts.cache import materialize
from zhllama.artifacts.manifest import File, Input, Manifest
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.reader import Artifact
from zhllama.data.packed import PackedDataset
from zhllama.errors import InputError
from zhllama.models.llama import LLAMA
from zhllama.training.inputs import LoraShape
from zhllama.training.model import (
    FLASH,
    adapter_config_json,
    add_lora,
    attention,
    checkpoint_activations,
    collate,
    load_base,
    packed,
    read_back,
    train_embeddings_only,
    trainable,
    trained_weights,
)

TARGETS = list(LLAMA.lora_modules)


def shape(r: int = 8, embeddings: str = "all", dropout: float = 0.0) -> LoraShape:
    return LoraShape(r, 4 * r, dropout, TARGETS, embeddings, tuple(range(700, 800)) if embeddings == "new" else ())


@pytest.fixture
def base(tiny_model: str) -> Any:
    return load_base(open_artifact(tiny_model), torch.float32)


def test_the_row_of_padding_is_trained_where_text_has_it_as_well(tmp_path, tiny_model, batch):
    folder = shutil.copytree(Path(tiny_model).parent, tmp_path / "model")
    (folder / "manifest.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    bos = config["bos_token_id"]
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": bos}))
    model = train_embeddings_only(load_base(open_artifact(str(folder)), torch.float32), also_lm_head=False).train()
    assert (batch["input_ids"] == bos).any()
    model(**batch).loss.backward()
    assert model.get_input_embeddings().weight.grad[bos].any()


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
    ids=["embeddings", "lora", "sft", "sft, rank 64"],
)
def test_as_many_parameters_of_a_7b_model_are_trained_as_in_the_recipe(pieces, make, count):
    config = LlamaConfig(
        vocab_size=pieces, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    with torch.device("meta"):
        model = packed("LlamaForCausalLM")(config).requires_grad_(False)
        assert sum(parameter.numel() for parameter in trainable(make(model)).values()) == count


def test_trained_weights_are_float32_and_the_rest_stays_as_it_was(tiny_model):
    model = add_lora(load_base(open_artifact(tiny_model), torch.bfloat16), shape())
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}
    frozen = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}
    assert frozen == {torch.bfloat16}


def test_the_loss_is_transformers_own(base, batch, tiny_model):
    base.train()
    found = base(**batch).loss
    plain = LlamaForCausalLM.from_pretrained(materialize(open_artifact(tiny_model)), dtype=torch.float32)
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


def test_new_rows_alone_are_trained_and_begin_where_the_base_has_them(base, batch):
    base.eval()
    before = base(**batch)
    model = add_lora(base, shape(embeddings="new"))
    assert float(model.eval()(**batch)["loss"]) == pytest.approx(float(before["loss"]), rel=1e-6)
    rows = {name: parameter for name, parameter in model.named_parameters() if "trainable_tokens_delta" in name}
    assert {(name.split(".token_adapter")[0].rsplit(".", 1)[-1], tuple(rows[name].shape)) for name in rows} == {
        ("embed_tokens", (100, 64)),
        ("lm_head", (100, 64)),
    }
    every = add_lora_count(embeddings="all")
    assert every - sum(one.numel() for one in trainable(model).values()) == 2 * 700 * 64
    model.train()
    model(**batch).loss.backward()
    for name, parameter in rows.items():
        assert parameter.grad.abs().sum() > 0, name
    frozen = [one for one in model.parameters() if not one.requires_grad]
    assert all(one.grad is None for one in frozen)


def add_lora_count(embeddings: str) -> int:
    with torch.device("meta"):
        config = LlamaConfig(
            vocab_size=800, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4
        )
        model = add_lora(packed("LlamaForCausalLM")(config).requires_grad_(False), shape(embeddings=embeddings))
    return sum(parameter.numel() for parameter in trainable(model).values())


def test_new_rows_get_the_gradient_that_they_get_among_all(tiny_model, batch):
    gradients = []
    for rows in ("all", "new"):
        torch.manual_seed(0)
        model = add_lora(load_base(open_artifact(tiny_model), torch.float32), shape(embeddings=rows))
        model.train()
        model(**batch).loss.backward()
        found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
        for layer in ("embed_tokens", "lm_head"):
            (gradient,) = (value for name, value in found.items() if layer in name)
            gradients.append(gradient[700:] if rows == "all" else gradient)
    assert gradients[1].any()
    torch.testing.assert_close(gradients[0], gradients[2])
    torch.testing.assert_close(gradients[1], gradients[3])


# --- attention that stays in its document -----------------------------------------------------------------------------


def by_segments(module, query, key, value, attention_mask, scaling, dropout=0.0, **borders):
    """What flash-attn's kernel for sequences of varying length computes, called as transformers calls it."""
    assert attention_mask is None
    assert torch.equal(borders["cu_seq_lens_q"], borders["cu_seq_lens_k"])
    ends = borders["cu_seq_lens_q"].tolist()
    assert query.shape[0] == 1
    assert borders["max_length_q"] == max(end - begin for begin, end in itertools.pairwise(ends))
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            *(tensor[:, :, begin:end] for tensor in (query, key, value)), is_causal=True, scale=scaling
        )
        for begin, end in itertools.pairwise(ends)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


@pytest.mark.parametrize("recomputed", [False, True], ids=["plain", "activations recomputed"])
def test_the_loss_is_the_same_by_segments_and_by_a_mask(recomputed, tiny_model, batch, monkeypatch):
    """The kernel itself needs a GPU; a loop over the borders that it is given stands for it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, FLASH, by_segments)
    found = []
    for kind in ("sdpa", FLASH):
        torch.manual_seed(0)
        model = add_lora(load_base(open_artifact(tiny_model), torch.float32), shape())
        if recomputed:
            checkpoint_activations(model)
        model.config._attn_implementation = kind
        model.train()
        loss = model(**batch).loss
        loss.backward()
        found.append((loss.item(), torch.cat([one.grad.flatten() for one in trainable(model).values()])))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("gpu", "installed", "dtype", "chosen"),
    [
        (True, True, torch.bfloat16, FLASH),
        (True, True, torch.float16, FLASH),
        (True, True, torch.float32, "sdpa"),
        (True, False, torch.bfloat16, "sdpa"),
        (False, True, torch.bfloat16, "sdpa"),
    ],
    ids=["bf16", "fp16", "no half precision", "not installed", "no GPU"],
)
def test_flash_attention_is_taken_where_it_can_be(gpu, installed, dtype, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr("zhllama.training.model.is_flash_attn_2_available", lambda: installed)
    assert attention(dtype) == chosen


def test_what_is_published_are_the_weights_in_float32(tiny_model):
    model = add_lora(load_base(open_artifact(tiny_model), torch.bfloat16), shape())
    weights = trained_weights(model)
    assert weights.keys() == {name for name, one in model.named_parameters() if one.requires_grad}
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    name, tensor = next(iter(weights.items()))
    tensor += 1
    assert not torch.equal(model.get_parameter(name), tensor)


def test_gradients_are_the_same_with_activations_recomputed(tiny_model, batch):
    found, passes = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = add_lora(load_base(open_artifact(tiny_model), torch.float32), shape(embeddings=""))
        if recompute:
            checkpoint_activations(model)
        model.train()
        seen = []
        model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        model(**batch).loss.backward()
        found.append([parameter.grad for parameter in trainable(model).values()])
        passes.append(len(seen))
    assert passes == [1, 2]
    assert any(gradient.any() for gradient in found[0])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_a_table_that_came_with_an_adapter_and_was_not_trained_is_refused(tiny_model, tmp_path):
    model = open_artifact(tiny_model)
    small = add_lora(load_base(model, torch.float32), shape(r=4, embeddings=""))
    table = {"base_model.model.model.embed_tokens.weight": torch.ones(800, 64)}
    save_file(get_peft_model_state_dict(small) | table, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes(adapter_config_json(small, model))
    adapter = open_artifact(str(tmp_path))
    with pytest.raises(InputError, match=r"do not fit this model: \S*embed_tokens.weight is .* there and nothing here"):
        add_lora(load_base(model, torch.float32), shape(), adapter)


def adapter_in(folder, weights, save):
    folder.mkdir()
    settings = {"r": 8, "lora_alpha": 32, "target_modules": TARGETS, "modules_to_save": ["embed_tokens", "lm_head"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save(weights, folder)
    return open_artifact(str(folder))


def test_a_published_adapter_is_continued_from_its_pickle(tiny_model, tmp_path):
    """As those of the recipe are: a pickle, half precision, with rotary frequencies that old versions of peft saved."""
    torch.manual_seed(3)
    given = add_lora(load_base(open_artifact(tiny_model), torch.float32), shape())
    for parameter in trainable(given).values():
        parameter.data = torch.randn_like(parameter)
    weights = {name: tensor.half() for name, tensor in get_peft_model_state_dict(given).items()}
    frequencies = {"base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    plain = adapter_in(tmp_path / "a", weights, lambda w, at: save_file(w, at / "adapter_model.safetensors"))
    pickled = adapter_in(tmp_path / "b", weights | frequencies, lambda w, at: torch.save(w, at / "adapter_model.bin"))
    found = [
        trained_weights(add_lora(load_base(open_artifact(tiny_model), torch.float32), shape(), adapter))
        for adapter in (plain, pickled)
    ]
    assert found[0].keys() == found[1].keys() == trained_weights(given).keys()
    for name, tensor in trained_weights(given).items():
        assert torch.equal(found[0][name], tensor.half().float())
        assert torch.equal(found[1][name], found[0][name])


@pytest.mark.parametrize(
    ("pickled", "said"),
    [(OrderedDict(a=print), "wants to run code"), ([torch.ones(1)], "not a dictionary of tensors")],
    ids=["code", "a list"],
)
def test_a_pickle_that_is_no_adapter_is_refused(pickled, said, tiny_model, tmp_path):
    adapter = adapter_in(tmp_path / "a", pickled, lambda w, at: torch.save(w, at / "adapter_model.bin"))
    with pytest.raises(InputError, match=rf"adapter_model\.bin: .*{said}"):
        add_lora(load_base(open_artifact(tiny_model), torch.float32), shape(), adapter)


KNOWN_TO_PEFT_0_13 = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "megatron_config", "megatron_core", "modules_to_save", "peft_type", "r", "rank_pattern", "revision",
    "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip


def test_the_adapters_description_says_what_older_peft_reads_and_names_the_base(base, tiny_model):
    model = open_artifact(tiny_model)
    value = json.loads(adapter_config_json(add_lora(base, shape()), model))
    assert value.keys() <= KNOWN_TO_PEFT_0_13
    assert None not in value.values()
    assert value["base_model_name_or_path"] == str(Path(tiny_model).parent)
    assert value["inference_mode"] is True
    assert sorted(value["target_modules"]) == sorted(TARGETS)
    model.root = "hf://someone/model@0123"
    value = json.loads(adapter_config_json(add_lora(base, shape()), model))
    assert (value["base_model_name_or_path"], value["revision"]) == ("someone/model", "0123")


@pytest.mark.parametrize(
    ("stage", "root", "source", "said"),
    [
        ("", "hf://someone/model@0123/folder", "", {"base_model_name_or_path": "hf://someone/model@0123/folder"}),
        ("fetch_weights", "/s/f/1", "hf://someone/model", {"base_model_name_or_path": "someone/model"}),
        ("fetch_weights", "/s/f/1", "hf://someone/model/13B", {"base_model_name_or_path": "/s/f/1"}),
        ("fetch_weights", "/s/f/1", "/data/model", {"base_model_name_or_path": "/s/f/1"}),
        ("extend_tokenizer", "/s/e/1", "hf://someone/model", {"base_model_name_or_path": "/s/e/1"}),
        ("", "s3://bucket/model", "", {"base_model_name_or_path": "s3://bucket/model"}),
    ],
    ids=["folder of a repository", "fetched", "fetched folder", "fetched from a disk", "made of the Hub's", "S3"],
)
def test_an_adapters_base_is_named_by_the_hub_only_where_it_is_the_hubs(base, stage, root, source, said):
    inputs = {"source": Input(source, "0" * 64)} if source else {}
    model = Artifact(Manifest("hf-model", stage, root, (File("x", 1, ""),), inputs=inputs), False)
    value = json.loads(adapter_config_json(add_lora(base, shape()), model))
    assert {name: value[name] for name in ("base_model_name_or_path", "revision") if name in value} == said


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
