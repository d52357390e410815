"""One reader for adapters: what their configuration may say, how their tensors may be called, what is half of one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from zhllama.artifacts.open import open_artifact
from zhllama.errors import InputError
from zhllama.weights.adapter import Adapter

LAYERS = [f"model.layers.{index}.self_attn.{name}" for index in (0, 1) for name in ("q_proj", "v_proj")]
SHAPES = {
    **{f"{name}.weight": (8, 8) for name in LAYERS},
    **{f"model.layers.{index}.input_layernorm.weight": (8,) for index in (0, 1)},
    "model.embed_tokens.weight": (20, 8),
    "lm_head.weight": (20, 8),
}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
PLAIN = {
    f"base_model.model.{name}.lora_{part}.weight": torch.full(shape, 0.5)
    for name in LAYERS
    for part, shape in (("A", (2, 8)), ("B", (8, 2)))
}

FIRST = next(iter(PLAIN))


def write(folder: Path, tensors: dict[str, torch.Tensor] = PLAIN, config: Any = None, pickled: Any = None) -> Adapter:
    folder.mkdir(exist_ok=True)
    text = config if isinstance(config, str) else json.dumps(CONFIG | (config or {}))
    (folder / "adapter_config.json").write_text(text)
    if pickled is None:
        save_file(tensors, folder / "adapter_model.safetensors")
    else:
        torch.save(pickled, folder / "adapter_model.bin")
    return Adapter(open_artifact(str(folder)), "--adapters")


def fit(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    return adapter.fitted(SHAPES, "the model", None)


# --- the configuration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"init_lora_weights": "pissa"}, "sets init_lora_weights='pissa'"),
        ({"init_lora_weights": "pissa_niter_16"}, "sets init_lora_weights='pissa_niter_16'"),
        ({"init_lora_weights": "olora"}, "sets init_lora_weights='olora'"),
        ({"init_lora_weights": "corda"}, "sets init_lora_weights='corda'"),
        ({"init_lora_weights": "loftq"}, "sets init_lora_weights='loftq'"),
        ({"init_lora_weights": "lora_ga"}, "sets init_lora_weights='lora_ga'"),
        ({"init_lora_weights": "of_next_year"}, "sets init_lora_weights='of_next_year'"),
        ({"use_dora": True}, r"sets use_dora \(DoRA\)"),
        ({"use_dora": "false"}, r"sets use_dora \(DoRA\)"),
        ({"lora_bias": True}, r"sets lora_bias \(biases\)"),
        ({"bias": "lora_only"}, "sets bias='lora_only'"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "sets layer_replication"),
        ({"target_parameters": ["mlp.experts"]}, "sets target_parameters"),
        ({"enable_lora": [True, False, True]}, "sets enable_lora"),
        ({"use_of_next_year": True}, "sets use_of_next_year"),
        ({"factor_of_next_year": 0.5}, "sets factor_of_next_year"),
        ({"depth_of_next_year": 0}, "sets depth_of_next_year"),
        ({"peft_type": "IA3", "r": None}, "a IA3 adapter; only LoRA"),
        ({"peft_type": "LOHA"}, "a LOHA adapter"),
        ('{"peft_type": "VERA"}', "a VERA adapter"),
        ('{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 8}', "a PROMPT_TUNING adapter"),
        ('{"peft_type": "LORA"}', "no LoRA configuration .it has no r."),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 1\n", "no LoRA configuration"),
        ("<!doctype html><title>404</title>", "no LoRA configuration"),
        ("[" * 200_000, "no LoRA configuration"),
        ('{"r": 1e999, "lora_alpha": 1}', "no LoRA configuration"),
        ('{"r": NaN, "lora_alpha": 1}', "no LoRA configuration"),
        ({"r": 0}, "r is 0, where a rank of 1 or more"),
        ({"r": -2}, "r is -2, where a rank of 1 or more"),
        ({"r": 2.5}, "r is 2.5, where a rank of 1 or more"),
        ({"r": True}, "r is True, where a rank"),
        ({"r": "2"}, "r is 2, where a rank"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf, where a number"),
        ({"lora_alpha": None}, "lora_alpha is None, where a number"),
        ({"use_rslora": "false"}, "use_rslora is false, where true or false"),
        ({"rank_pattern": {"(((": 2}}, "is no regular expression"),
        ({"alpha_pattern": {"(((": 2}}, "is no regular expression"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is no object"),
        ({"rank_pattern": {"q_proj": 0}}, "q_proj is 0, where a rank"),
        ({"alpha_pattern": {"q_proj": "x"}}, "q_proj is x, where a number"),
        ({"target_modules": "((("}, "is no regular expression"),
        ({"target_modules": {"q_proj": 1}}, "target_modules is no list of names"),
        ({"layers_to_transform": "all"}, "layers_to_transform is no list"),
        ({"layers_to_transform": [0], "target_modules": "all-linear"}, "beside an expression for target_modules"),
        ({"lora_dropout": 5}, "lora_dropout is 5, where a share of 1"),
        ({"lora_alpha": 0}, "lora_alpha is 0: it changes nothing"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices are no rows"),
    ],
)
def test_what_is_set_and_not_done_is_refused_by_its_name(tmp_path: Path, config: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as refused:
        write(tmp_path / "adapter", config=config)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "config",
    [
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False, "loftq_config": {"bits": 4}, "eva_config": {"rho": 2.0}},
        {"auto_mapping": {"unsloth_fixed": True}, "peft_version": "0.21.2", "revision": "main"},
        {"enable_lora": None, "merge_weights": False, "megatron_core": "megatron.core", "qalora_group_size": 16},
        {"use_of_next_year": None, "list_of_next_year": [], "flag_of_next_year": False, "object_of_next_year": {}},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": None},
        {"target_modules": ["q_proj", "v_proj", "k_proj"], "exclude_modules": ["k_proj"]},
        {"rank_pattern": {"(a+)+b": 4, "(x?)*" * 30: 4}},
        {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"r": 2.0},
    ],
)
def test_what_changes_no_arithmetic_passes(tmp_path: Path, config: Any) -> None:
    adapter = write(tmp_path / "adapter", config=config)
    assert fit(adapter) == SHAPES
    assert [update.scale for update in adapter.updates.values()] == [2.0] * 4


def test_an_alpha_of_0_is_said_to_peft_and_is_not_its_default(tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter", config={"lora_alpha": 0, "alpha_pattern": {"q_proj": 4}})
    assert adapter.config.for_peft()["lora_alpha"] == 0


# --- names ------------------------------------------------------------------------------------------------------------


def renamed(change: Any) -> dict[str, torch.Tensor]:
    return {change(key): tensor for key, tensor in PLAIN.items()}


NAMES = {
    "plain": lambda key: key,
    "without a prefix": lambda key: key.removeprefix("base_model.model."),
    "older peft": lambda key: key.replace(".weight", ".default.weight"),
    "another name": lambda key: key.replace(".weight", ".policy.weight"),
    "compiled outside": lambda key: f"_orig_mod.{key}",
    "compiled inside": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled by layer": lambda key: key.replace("self_attn", "_orig_mod.self_attn"),
    "DDP": lambda key: f"module.{key}",
    "DDP without a prefix": lambda key: "module." + key.removeprefix("base_model.model."),
    "FSDP": lambda key: key.replace("layers.", "layers._fsdp_wrapped_module."),
    "recomputed": lambda key: key.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
    "Lightning": lambda key: f"model.{key}",
    "flat": lambda key: f"state_dict.module.{key}",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_are_known_through_what_trainers_put_around_them(tmp_path: Path, name: str) -> None:
    adapter = write(tmp_path / "adapter", renamed(NAMES[name]))
    assert fit(adapter) == SHAPES
    assert sorted(adapter.updates) == sorted(f"{layer}.weight" for layer in LAYERS)
    assert {key for key, _ in adapter.peft_keys()} == set(PLAIN)


@pytest.mark.parametrize("name", ["state_dict", "module", "model", "model_state_dict"])
def test_a_pickle_may_hold_the_tensors_one_level_down(tmp_path: Path, name: str) -> None:
    adapter = write(tmp_path / "adapter", pickled={name: PLAIN, "epoch": 3, "optimizer": {"lr": 0.1}})
    assert fit(adapter) == SHAPES
    assert torch.equal(adapter.read(adapter.updates[f"{LAYERS[0]}.weight"].a), torch.full((2, 8), 0.5))


def test_what_lies_in_the_place_of_a_pickle_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "adapter_model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 1\n")
    with pytest.raises(InputError, match=r"adapter_model\.bin: it is a git-lfs pointer in place of the file"):
        Adapter(open_artifact(str(tmp_path)), "--adapters")


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (renamed(lambda key: f"critic.{key}"), r"it changes critic\.\S+, which the model does not have"),
        (renamed(lambda key: key.replace("layers", "blocks")), "which the model does not have"),
        (renamed(lambda key: key.replace("base_model.model.model.", "base_model.model.")), "does not have"),
        (
            PLAIN | {"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(8)},
            "neither a",
        ),
        (PLAIN | {"base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias": torch.ones(8)}, "neither a LoRA"),
        (PLAIN | renamed(NAMES["older peft"]), "are the same tensor"),
        (
            renamed(lambda key: key.replace(".weight", ".a.weight" if "layers.0" in key else ".b.weight")),
            r"it holds 2 adapters \(a, b\)",
        ),
        ({key: value for key, value in PLAIN.items() if "layers.1" not in key}, r"names \S+layers\.1\S+.* cut short"),
        ({key: value for key, value in PLAIN.items() if "0.self_attn.q" not in key}, r"\(1 such\); it was cut short"),
        (dict(list(PLAIN.items())[1:]), "has one of its two LoRA factors"),
        (PLAIN | {FIRST: torch.tensor(0.5)}, "is a single number"),
        (PLAIN | {"model.embed_tokens.weight": torch.tensor(0.5)}, "is a single number"),
        (PLAIN | {FIRST: torch.ones(2, 8, dtype=torch.int8)}, "is int8; give the adapter in float16"),
        (PLAIN | {FIRST: torch.ones(0)}, r"has factors \(0,\)"),
    ],
)
def test_other_names_and_halves_are_refused(tmp_path: Path, tensors: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        fit(write(tmp_path / "adapter", {key: value.clone() for key, value in tensors.items()}))


def test_half_an_adapter_is_whole_when_its_configuration_says_so(tmp_path: Path) -> None:
    half = {key: value for key, value in PLAIN.items() if "layers.1" in key}
    assert fit(write(tmp_path / "adapter", half, {"layers_to_transform": [1]})) == SHAPES
    assert fit(write(tmp_path / "adapter", half, {"layers_to_transform": 1})) == SHAPES
    assert fit(write(tmp_path / "adapter", half, {"target_modules": r"model\.layers\.1\..*"})) == SHAPES


def test_factors_that_the_configuration_does_not_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not name among its target_modules"):
        fit(write(tmp_path / "adapter", config={"target_modules": ["q_proj"]}))


def test_saved_modules_are_known_by_either_name_and_must_be_there(tmp_path: Path) -> None:
    saved = {"modules_to_save": ["embed_tokens"]}
    rows = torch.ones(20, 8)
    for name in ("weight", "modules_to_save.weight", "modules_to_save.default.weight"):
        adapter = write(tmp_path / "adapter", PLAIN | {f"base_model.model.model.embed_tokens.{name}": rows}, saved)
        assert fit(adapter) == SHAPES
        assert ("base_model.model.model.embed_tokens.weight" in dict(adapter.peft_keys())) is True
    with pytest.raises(InputError, match=r"names model\.embed_tokens\.weight, and the adapter has no tensor of it"):
        fit(write(tmp_path / "adapter", config=saved))


def test_the_base_that_an_adapter_names_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(write(tmp_path / "adapter", config={"base_model_name_or_path": "someone/other-model"}))
    assert "it says that it was trained on someone/other-model; it is given to the model" in caplog.text
