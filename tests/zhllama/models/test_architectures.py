"""Each architecture as data, against transformers' own class of it: tensors, shapes, parameters, what is said."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.small_models import KINDS, config_of, model_of, save
from zhllama.artifacts.open import open_artifact
from zhllama.errors import InputError
from zhllama.models import ARCHITECTURES, architecture, by_gguf
from zhllama.models.architecture import HEAD, NUMBERS
from zhllama.weights.model_config import checked_config, model_config
from zhllama.weights.safetensors_io import Checkpoint


def said_by(config: Any, **changes: Any) -> dict[str, Any]:
    """config.json as the stages read it."""
    return checked_config(json.loads(config.to_json_string(use_diff=False)) | changes, "here")


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_shapes_and_ties_are_those_of_transformers_class(kind: str) -> None:
    model = model_of(kind)
    config = said_by(model.config)
    places = {place.hf: place.shape for place in architecture(config, "here").places(config)}
    assert places == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert architecture(config, "here").parameters(config) == sum(one.numel() for one in model.parameters())
    assert config["architectures"] == [type(model).__name__]


@pytest.mark.parametrize("kind", KINDS)
def test_lora_is_put_where_peft_puts_it_of_all_linear_layers(kind: str) -> None:
    from peft import LoraConfig, get_peft_model

    model = model_of(kind)
    own = architecture(said_by(model.config), "here").lora_modules
    peft = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    found = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in peft.named_parameters() if ".lora_A" in name}
    assert set(own) == found


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_what_is_taken_where_nothing_is_said_is_transformers_own(kind: str) -> None:
    default = transformers.AutoConfig.for_model(kind)
    config = checked_config({"model_type": kind}, "here")
    for name in NUMBERS:
        assert config.get(name, getattr(default, name, None)) == getattr(default, name, config.get(name)), name
    assert config["rope_theta"] == default.rope_parameters["rope_theta"]
    assert config.get("sliding_window", None) == getattr(default, "sliding_window", None)
    assert set(ARCHITECTURES[kind].numbers) == set(NUMBERS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_transformers_saved_is_read_and_written_so_that_it_computes_the_same(
    tmp_path: Path, kind: str, llama_tokenizer: bytes
) -> None:
    folder = save(tmp_path / "saved", kind, llama_tokenizer)
    config = model_config(Checkpoint(open_artifact(str(folder))))
    ids = torch.arange(100, 160)[None]
    right = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    (folder / "config.json").write_text(json.dumps(config))
    found = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(found).__name__ == f"{KINDS[kind][0]}ForCausalLM"
    assert torch.equal(found(ids).logits, right)
    assert model_config(Checkpoint(open_artifact(str(folder)))) == config


def test_gguf_names_are_those_of_the_package_gguf() -> None:
    gguf = pytest.importorskip("gguf")
    for kind in KINDS:
        config = said_by(config_of(kind))
        model = architecture(config, "here")
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[model.gguf.upper()], 2)
        assert gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[model.gguf.upper()]] == model.gguf
        for place in model.places(config):
            module, _, end = place.hf.rpartition(".")
            assert place.gguf == f"{names.get_name(module)}.{end}"
        assert model.permuted == (("q_proj", "k_proj") if model.gguf == "llama" else ())
        # of those that share a name the first
        assert by_gguf(model.gguf, "here").gguf == model.gguf


def test_a_head_is_counted_once_where_it_is_the_embedding() -> None:
    untied, tied = (said_by(config_of("qwen3", tie_word_embeddings=tied)) for tied in (False, True))
    model = architecture(tied, "here")
    assert model.parameters(untied) - model.parameters(tied) == 800 * 64
    assert HEAD in {place.hf for place in model.places(tied)}


# --- config.json as people publish it ---------------------------------------------------------------------------------

QWEN25 = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
    "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1", "use_cache": True, "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2560, "initializer_range": 0.02,
    "intermediate_size": 9728, "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
    "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
MISTRAL = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip

LLAMA32 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": True,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
    "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
    "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 49152,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3", "use_cache": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("published", "said"),
    [
        (QWEN25, {"use_sliding_window": False}),
        (QWEN25 | {"layer_types": ["full_attention"] * 28, "sliding_window": None}, {"use_sliding_window": False}),
        ({k: v for k, v in QWEN25.items() if k != "use_sliding_window"}, {"use_sliding_window": False}),
        (QWEN25 | {"use_sliding_window": None, "sliding_window": 4096}, {"use_sliding_window": False}),
        (QWEN3, {"head_dim": 128, "tie_word_embeddings": True}),
        (LLAMA32, {"tie_word_embeddings": True, "rope_theta": 500000.0, "eos_token_id": [128001, 128008, 128009]}),
        (SMOLLM2, {"tie_word_embeddings": True, "num_key_value_heads": 3, "rope_theta": 100000.0}),
        (MISTRAL, {"sliding_window": 4096}),
        (MISTRAL | {"sliding_window": None, "head_dim": None, "vocab_size": 32768}, {"sliding_window": None}),
        ({k: v for k, v in MISTRAL.items() if k != "sliding_window"}, {"sliding_window": 4096}),
        (MISTRAL | {"head_dim": 160, "hidden_size": 5124, "sliding_window": None}, {"head_dim": 160}),
    ],
    ids=[
        "qwen2.5",
        "saved again",
        "no switch",
        "null",
        "qwen3",
        "llama 3.2",
        "smollm2",
        "v0.1",
        "v0.3",
        "no window named",
        "nemo",
    ],
)
def test_published_settings_are_taken_and_windows_are_said_to_every_program(
    published: dict[str, Any], said: dict[str, Any]
) -> None:
    config = checked_config(published, "here")
    assert {name: config[name] for name in said} == said
    assert checked_config(config, "here") == config


@pytest.mark.parametrize(
    ("published", "changes", "message"),
    [
        (QWEN25, {"use_sliding_window": True}, r"sets use_sliding_window \(True\)"),
        (QWEN25, {"use_sliding_window": None, "layer_types": ["sliding_attention"]}, "sets layer_types"),
        (QWEN3, {"attention_bias": True}, "sets attention_bias"),
        (QWEN25, {"attention_bias": True}, "sets attention_bias"),
        (MISTRAL, {"mlp_bias": True}, "sets mlp_bias"),
        (MISTRAL, {"use_sliding_window": False}, r"sets use_sliding_window \(False\)"),
        (MISTRAL, {"layer_types": ["full_attention"] * 32}, "sets layer_types"),
        (MISTRAL, {"sliding_window": 0}, r"sets sliding_window \(0\)"),
        ({"layer_types": ["full_attention"] * 32} | MISTRAL, {"sliding_window": "all"}, "sets sliding_window"),
        (QWEN3, {"hidden_size": None}, r"not a Qwen3 model's \(hidden_size is None"),
        ({}, {"model_type": "gemma2"}, r"a gemma2 model \(model_type\); only LLaMA, Mistral, Qwen2 and Qwen3 models"),
        ({}, {"model_type": ["llama"]}, r"is of a \['llama'\] model"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_would_be_another_arithmetic_is_refused_by_name(
    published: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        checked_config(published | changes, "here")


def test_a_gguf_of_another_architecture_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"here is of a gemma model \(general\.architecture\); only .*qwen3"):
        by_gguf("gemma", "here")
