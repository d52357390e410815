"""config.json of a base: every number is checked once, against its range and against the tensors."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from zhllama.artifacts.open import open_artifact
from zhllama.errors import InputError
from zhllama.weights.model_config import model_config
from zhllama.weights.safetensors_io import Checkpoint


@pytest.fixture
def model(tmp_path: Path, tiny_model: str) -> Path:
    """A copy of the tiny model's folder, without its manifest: 800 rows × 64, 2 layers, 4 heads."""
    folder = shutil.copytree(Path(tiny_model).parent, tmp_path / "model")
    (folder / "manifest.json").unlink()
    return folder


def read(model: Path, name: str = "config.json", **changes: Any) -> dict[str, Any]:
    path = model / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return model_config(Checkpoint(open_artifact(str(model))))


def test_what_is_given_back_says_base_and_dtype_for_every_reader(model: Path) -> None:
    path = model / "config.json"
    config = json.loads(path.read_text())
    assert {"rope_theta", "rope_scaling", "rope_parameters", "dtype", "torch_dtype"} <= config.keys()
    for name in ("rope_theta", "rope_scaling", "torch_dtype", "vocab_size"):
        del config[name]
    config["vocab_size"] = 800
    path.write_text(json.dumps(config))
    found = read(model, rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
    assert (found["rope_theta"], found["rope_scaling"]) == (1e6, None)
    assert found["torch_dtype"] == found["dtype"] == "float16"


NAN, INF = float("nan"), float("inf")
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"pad_token_id": 800}, "pad_token_id=800, which is not a row, and the model has 800"),
    ({"eos_token_id": [2, 800]}, "eos_token_id=800"),
    ({"bos_token_id": -2}, "bos_token_id=-2"),
    ({"pad_token_id": 1.0}, "pad_token_id=1.0"),
    ({"pad_token_id": "0"}, "pad_token_id='0'"),
    ({"pad_token_id": True}, "pad_token_id=True"),
    ({"pad_token_id": []}, r"pad_token_id=\[\]"),
    ({"eos_token_id": [2, None]}, "eos_token_id=None"),
    ({"rms_norm_eps": NAN}, "rms_norm_eps=nan"),
    ({"rms_norm_eps": INF}, "rms_norm_eps=inf"),
    ({"rms_norm_eps": 0}, "rms_norm_eps=0"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6'"),
    ({"initializer_range": -1.0}, "initializer_range=-1.0"),
    ({"anything": {"at": ["any", NAN]}}, r"anything\.at\.1=nan"),
    ({"anything": 10**400}, "anything=1000"),
    ({"hidden_size": 64.0}, r"hidden_size is 64\.0"),
    ({"hidden_size": None}, r"hidden_size is None"),
    ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
    ({"max_position_embeddings": 2**40}, "max_position_embeddings is 1099511627776"),
    ({"num_attention_heads": 3}, "multiple of num_attention_heads"),
    ({"num_key_value_heads": 3}, "of num_key_value_heads"),
    ({"head_dim": 15}, "odd width"),
    ({"num_key_value_heads": 2}, r"k_proj\.weight is \(64, 64\) where config\.json says \(32, 64\)"),
    ({"head_dim": 32}, r"q_proj\.weight is \(64, 64\) where config\.json says \(128, 64\)"),
    ({"hidden_size": 128}, r"embed_tokens\.weight is \(800, 64\) where config\.json says \(800, 128\)"),
    ({"intermediate_size": 200}, r"gate_proj\.weight is \(192, 64\) where"),
    ({"vocab_size": 801}, r"embed_tokens\.weight is \(800, 64\) where"),
    ({"num_hidden_layers": 3}, r"no tensor model\.layers\.2"),
    ({"num_hidden_layers": 10**9}, "says 1000000000 layers, and there are 21 tensors"),
    ({"num_hidden_layers": 1}, r"tensor model\.layers\.1\.\S+ is none of a LLaMA model with 1 layers"),
    ({"rope_scaling": {"type": "longrope"}}, r"\(longrope\), which is not done"),
    ({"model_type": "gemma2"}, "is of a gemma2 model"),
    ({"model_type": None}, "is of a None model"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false', where true or false"),
    ({"use_cache": 1}, "use_cache=1"),
    ({"dtype": "float99"}, "dtype='float99', where one of float16"),
    ({"attention_bias": True}, r"no tensor model\.layers\.0\.self_attn\.q_proj\.bias"),
    ({"mlp_bias": True}, r"no tensor model\.layers\.0\.mlp\.gate_proj\.bias"),
    ({"tie_word_embeddings": True}, r"lm_head\.weight is not model\.embed_tokens\.weight"),
    ({"sliding_window": 16}, r"sets sliding_window \(16\), which is not known here"),
    ({"attention_multiplier": 0.5}, "sets attention_multiplier"),
    ({"logits_scaling": 4.0}, "sets logits_scaling"),
    ({"rotary_pct": 0.25}, "sets rotary_pct"),
    ({"pruned_heads": {"0": [1]}}, "sets pruned_heads"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sets layer_types"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message[:24] for _, message in WRONG])
def test_what_cannot_be_computed_with_is_refused_by_name(model: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(model, **changes)


@pytest.mark.parametrize("changes", [{"pad_token_id": -1}, {"pad_token_id": None}, {"eos_token_id": [2, 3]}], ids=str)
def test_ids_that_people_have_are_taken(model: Path, changes: dict[str, Any]) -> None:
    assert read(model, **changes).items() >= changes.items()


HARMLESS: list[dict[str, Any]] = [
    {"_name_or_path": "decapoda/llama", "max_sequence_length": 2048, "tokenizer_class": "LlamaTokenizer"},
    {"unsloth_version": "2026.1", "neftune_noise_alpha": 5, "z_loss_weight": 1e-4},
    {"pretraining_tp": 2, "id2label": {"0": "LABEL_0"}, "task_specific_params": None, "pruned_heads": {}},
    {"sliding_window": 4096, "use_sliding_window": False, "layer_types": ["full_attention"] * 2},
    {"sliding_window": 2048, "logits_scaling": None, "auto_map": {"AutoConfig": "its_own.Config"}},
    {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}, "mlp_bias": False},
    {"activation": "swiglu", "head_dim": 16, "trust_remote_code": True, "cls_token_id": 1},
    {"max_window_layers": 28, "sliding_window": None, "use_sliding_window": False},
    {"original_max_position_embeddings": None, "hidden_act": None, "use_cache": None},
]


@pytest.mark.parametrize("changes", HARMLESS, ids=lambda changes: next(iter(changes)))
def test_what_says_nothing_of_the_arithmetic_is_taken_and_transformers_reads_what_is_written(
    model: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    from transformers import AutoConfig

    (tmp_path / "written").mkdir()
    (tmp_path / "written" / "config.json").write_text(json.dumps(read(model, **changes)))
    config = AutoConfig.from_pretrained(tmp_path / "written")
    assert (config.hidden_size, config.architectures) == (64, ["LlamaForCausalLM"])


def test_an_adapter_in_the_models_folder_is_refused(model: Path) -> None:
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"adapter_config\.json lies in the model's folder"):
        read(model)


def test_a_tensor_more_is_refused_by_name(model: Path) -> None:
    save_file({"score.weight": torch.zeros(2, 64)}, model / "more.safetensors")
    index = model / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["score.weight"] = "more.safetensors"
    index.write_text(json.dumps(value))
    with pytest.raises(InputError, match=r"tensor score\.weight is none of a LLaMA model with 2 layers"):
        read(model)


@pytest.mark.parametrize(
    "changes", [{"pad_token_id": 32_000}, {"temperature": NAN}, {"top_p": INF}, {"top_k": "40"}], ids=str
)
def test_the_generation_settings_beside_it_are_checked_too(model: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"generation_config\.json has " + next(iter(changes))):
        read(model, "generation_config.json", **changes)
