"""A GGUF converted: the model that it was made of, bit for bit what gguf dequantises; what is no such is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components.convert_weights.converter import convert_weights
from components.convert_weights.options import ConvertWeights
from tests.gguf_models import ROPE_FREQS, sentencepiece_fields, turned, write_gguf
from tests.zhllama.tokenizer.byte_level_models import trained
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.open import open_artifact
from zhllama.errors import InputError
from zhllama.models.rope import Rope
from zhllama.stage.run import run_stage
from zhllama.tokenizer.gguf_tokenizer import PRE, byte_level_fields
from zhllama.tokenizer.vocabulary import load_encoder
from zhllama.weights.safetensors_io import Checkpoint

gguf = pytest.importorskip("gguf")

SHAPE: dict[str, Any] = {
    "vocab_size": 800, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 50_000.0,
    "head_dim": 16, "tie_word_embeddings": False,
}  # fmt: skip


def convert(store: str | Path, weights: str | Path, **options: Any) -> Manifest:
    return run_stage(ConvertWeights(store=str(store), weights=str(weights), **options), convert_weights)


def object_in(folder: str, name: str) -> dict[str, Any]:
    return json.loads(Path(folder, name).read_text("utf-8"))


def random_model(kind: str, **changes: Any) -> Any:
    """transformers' own, in float32, with numbers that bfloat16 holds."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **(SHAPE | changes))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # biases and norms begin as zeros and ones
            parameter.copy_((parameter + torch.randn_like(parameter) * 0.05).bfloat16().float())
    return model


def state_of(model: Any) -> dict[str, torch.Tensor]:
    tied = model.config.tie_word_embeddings
    return {name: one for name, one in model.state_dict().items() if not (tied and name == "lm_head.weight")}


def folder_of(path: Path, model: Any, tokenizer: dict[str, Any], kind: str = "F32", **more: Any) -> Path:
    path.mkdir()
    config = SHAPE | {name: getattr(model.config, name) for name in SHAPE if hasattr(model.config, name)}
    architecture = model.config.model_type
    write_gguf(path / "model.gguf", state_of(model), config, tokenizer, kind, architecture, **more)
    return path


@pytest.fixture(scope="module")
def pieces(llama_tokenizer: bytes) -> dict[str, Any]:
    return sentencepiece_fields(llama_tokenizer)


@pytest.fixture(scope="module")
def byte_level(english_text: list[str]) -> dict[str, Any]:
    """Fields of a tokenizer of Qwen's shape, 790 tokens and ten rows that only pad."""
    fast = trained(english_text[:800], PRE["qwen2"], 787, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    ids = {f"tokenizer.ggml.{name}_token_id": index for name, index in {"bos": 787, "eos": 789, "padding": 787}.items()}
    more = {"tokenizer.ggml.add_bos_token": False, "tokenizer.chat_template": "{{ messages[0].content }}<|im_end|>"}
    return byte_level_fields(fast, "here", 800) | ids | more


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
        ("llama", {"head_dim": 32}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 32}),
    ],
    ids=["llama", "tied", "wide heads", "biases", "qwen2", "qwen2 tied", "qwen3"],
)
def test_the_model_is_the_one_that_it_was_made_of(tmp_path, byte_level, kind, changes):
    from transformers import AutoModelForCausalLM

    model = random_model(kind, **changes)
    manifest = convert(tmp_path / "store", folder_of(tmp_path / "weights", model, byte_level))
    found = AutoModelForCausalLM.from_pretrained(manifest.root, dtype=torch.float32)
    assert found.config.model_type == kind
    assert state_of(found).keys() == state_of(model).keys()
    for name, wanted in state_of(model).items():
        assert torch.equal(state_of(found)[name], wanted), name
    ids = torch.randint(0, 790, (1, 40))
    with torch.no_grad():
        assert torch.equal(found(ids).logits, model(ids).logits)
    vocabulary = manifest.vocabulary
    assert (vocabulary.size, vocabulary.rows, vocabulary.tied) == (790, 800, model.config.tie_word_embeddings)
    settings = object_in(manifest.root, "generation_config.json")
    assert settings["eos_token_id"] == 789


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_what_is_quantised_is_what_gguf_dequantises(tmp_path, pieces, kind):
    model = random_model("llama")
    weights = folder_of(tmp_path / "weights", model, pieces, kind, embedding="Q8_0" if kind == "Q4_1" else "")
    manifest = convert(tmp_path / "store", weights)
    checkpoint = Checkpoint(open_artifact(manifest.reference))
    own = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    for name, wanted in state_of(model).items():
        found = checkpoint.read(name)
        assert found.dtype == own, name
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2], 0)
        array = wanted.numpy()
        if array.ndim > 1:
            # a row's blocks are the same wherever it stands, but which rows are neighbours is not
            packed_as = "Q8_0" if kind == "Q4_1" and "embed" in name else kind
            type_of = gguf.GGMLQuantizationType[packed_as]
            array = gguf.dequantize(gguf.quants.quantize(array, type_of), type_of)
        assert np.array_equal(found.float().numpy(), array), (name, heads)
    assert manifest.vocabulary.dtype == str(own).removeprefix("torch.")


def test_a_dtype_may_be_asked_for(tmp_path, pieces):
    model = random_model("llama")
    weights = folder_of(tmp_path / "weights", model, pieces, "Q8_0")
    plain = convert(tmp_path / "store", weights)
    half = convert(tmp_path / "store", weights, dtype="bfloat16")
    assert plain.reference != half.reference
    one, other = (Checkpoint(open_artifact(manifest.reference)) for manifest in (plain, half))
    assert object_in(half.root, "config.json")["dtype"] == "bfloat16"
    for name in one.tensors:
        assert torch.equal(one.read(name).bfloat16(), other.read(name)), name


def test_norms_that_the_models_dtype_does_not_hold_stay_as_they_are(tmp_path, pieces):
    model = random_model("llama")
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.full((64,), 1 + 2**-20))
    manifest = convert(tmp_path / "store", folder_of(tmp_path / "weights", model, pieces, "F16"))
    checkpoint = Checkpoint(open_artifact(manifest.reference))
    assert checkpoint.read("model.norm.weight").dtype == torch.float32
    assert torch.equal(checkpoint.read("model.norm.weight"), model.model.norm.weight)
    assert checkpoint.read("model.layers.0.input_layernorm.weight").dtype == torch.float16


def test_factors_of_another_kind_are_refused(tmp_path, pieces):
    factors = {ROPE_FREQS: np.linspace(1, 3, 8)}
    weights = folder_of(tmp_path / "weights", random_model("llama"), pieces, tensors=factors)
    with pytest.raises(InputError, match=r"rope_freqs\.weight holds other factors than Llama 3's"):
        convert(tmp_path / "store", weights)
    weights = folder_of(tmp_path / "plain", random_model("llama"), pieces, tensors={ROPE_FREQS: np.ones(8)})
    assert object_in(convert(tmp_path / "store", weights).root, "config.json")["rope_scaling"] is None


def test_a_window_makes_it_a_mistral(tmp_path, pieces):
    weights = folder_of(
        tmp_path / "weights", random_model("llama"), pieces, more={"llama.attention.sliding_window": 64}
    )
    found = object_in(convert(tmp_path / "store", weights).root, "config.json")
    assert (found["model_type"], found["sliding_window"]) == ("mistral", 64)
    weights = folder_of(tmp_path / "whole", random_model("llama"), pieces, more={"llama.attention.sliding_window": 128})
    assert object_in(convert(tmp_path / "store", weights).root, "config.json")["model_type"] == "llama"


def test_what_float16_cannot_hold_is_refused(tmp_path, pieces):
    model = random_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = 1e6
    with pytest.raises(InputError, match=r"float16 cannot hold output_norm\.weight; give --dtype bfloat16"):
        convert(tmp_path / "store", folder_of(tmp_path / "weights", model, pieces), dtype="float16")


def test_the_tokenizer_is_the_files_own(tmp_path, pieces, llama_tokenizer):
    from zhllama.tokenizer.vocabulary import Relation

    weights = folder_of(tmp_path / "weights", random_model("llama"), {**pieces, "tokenizer.chat_template": "{{ 7 }}"})
    manifest = convert(tmp_path / "store", weights)
    encoder = load_encoder(open_artifact(manifest.reference), "--model")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.model").write_bytes(llama_tokenizer)
    own = load_encoder(open_artifact(str(tmp_path / "tokenizer")), "--tokenizer")
    assert encoder.vocabulary().relation_to(own.vocabulary()) is Relation.EQUAL
    assert object_in(manifest.root, "tokenizer_config.json")["chat_template"] == "{{ 7 }}"


def test_further_ends_of_an_answer_are_kept(tmp_path, byte_level):
    fields = byte_level | {"tokenizer.ggml.eot_token_id": 788}
    manifest = convert(tmp_path / "store", folder_of(tmp_path / "weights", random_model("llama"), fields))
    settings = object_in(manifest.root, "generation_config.json")
    assert settings["eos_token_id"] == [789, 788]


def test_parts_are_one_model(tmp_path, pieces):
    model = random_model("llama")
    whole = convert(tmp_path / "store", folder_of(tmp_path / "whole", model, pieces))
    parts = folder_of(tmp_path / "parts", model, pieces, split=8)
    assert sorted(path.name for path in parts.iterdir())[0] == "model-00001-of-00003.gguf"
    cut = convert(tmp_path / "store", parts)
    assert [(file.path, file.sha256) for file in cut.files] == [(file.path, file.sha256) for file in whole.files]


# --- rotary positions -------------------------------------------------------------------------------------------------

LLAMA_31 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        LLAMA_31,
        LLAMA_31 | {"factor": 32.0},
        LLAMA_31 | {"original_max_position_embeddings": 4096},
        LLAMA_31 | {"high_freq_factor": 2.0},
    ],
    ids=["3.1", "3.2", "shorter", "another"],
)
def test_llama_3s_positions_are_found_again(tmp_path, pieces, settings):
    rope = Rope("llama3", 50_000.0, {name: value for name, value in settings.items() if name != "rope_type"})
    factors = {ROPE_FREQS: np.array(rope.factors(64))}
    weights = folder_of(tmp_path / "weights", random_model("llama", head_dim=64), pieces, tensors=factors)
    found = object_in(convert(tmp_path / "store", weights).root, "config.json")
    assert found["rope_scaling"] == {"type": "llama3", **settings}


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({"llama.rope.scaling.type": "none"}, None),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        ({"llama.rope.scale_linear": 2.5}, {"rope_type": "linear", "factor": 2.5}),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 8.0,
             "llama.rope.scaling.original_context_length": 32},
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
        ),
    ],
    ids=["none", "linear", "linear, old", "yarn"],
)  # fmt: skip
def test_stretched_positions_are_read(tmp_path, pieces, more, wanted):
    weights = folder_of(tmp_path / "weights", random_model("llama"), pieces, more=more)
    found = object_in(convert(tmp_path / "store", weights).root, "config.json")
    assert found["rope_scaling"] == (wanted and {"type": wanted["rope_type"], **wanted})
    assert (found["rms_norm_eps"], found["rope_theta"]) == (1e-5, 50_000.0)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"general.type": "adapter"}, "this GGUF is no model but of the kind adapter"),
        ({"llama.expert_count": 8}, r"sets expert_count \(8\), which is not done here"),
        ({"llama.logit_scale": 0.5}, "sets logit_scale"),
        ({"llama.attention.clamp_kqv": 8.0}, "sets attention.clamp_kqv"),
        ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type is longrope"),
        ({"llama.rope.dimension_count": 8}, "its heads are 16 wide and rope.dimension_count is 8"),
        ({"tokenizer.ggml.pre": "default", "tokenizer.ggml.model": "t5"}, "its tokenizer is of the kind t5"),
    ],
)
def test_a_setting_that_is_not_done_is_refused(tmp_path, pieces, more, said):
    tokenizer = {name: value for name, value in pieces.items() if name not in more}
    weights = folder_of(tmp_path / "weights", random_model("llama"), tokenizer, more=more)
    with pytest.raises(InputError, match=said):
        convert(tmp_path / "store", weights)


def test_a_setting_that_says_nothing_is_taken(tmp_path, pieces):
    more = {
        "llama.expert_count": 0,
        "llama.vocab_size": 800,
        "llama.attention.causal": True,
        "quantize.imatrix.file": "x",
    }
    convert(tmp_path / "store", folder_of(tmp_path / "weights", random_model("llama"), pieces, more=more))


def test_another_architecture_is_refused_by_name(tmp_path, pieces):
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "phi3")
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"is of a phi3 model \(general\.architecture\); only .*Qwen3"):
        convert(tmp_path / "store", tmp_path)


def test_tensors_must_be_those_of_the_fields(tmp_path, pieces):
    model = random_model("llama")
    config = SHAPE | {"num_hidden_layers": 3}
    (tmp_path / "less").mkdir()
    write_gguf(tmp_path / "less" / "model.gguf", state_of(model), config, pieces)
    with pytest.raises(InputError, match=r"blk\.2\.attn_q\.weight is not there"):
        convert(tmp_path / "store", tmp_path / "less")
    weights = folder_of(tmp_path / "more", model, pieces, tensors={"blk.0.ffn_gate_inp.weight": np.ones((8, 64))})
    with pytest.raises(InputError, match=r"tensor blk\.0\.ffn_gate_inp\.weight is none of a LLaMA model"):
        convert(tmp_path / "store", weights)
    config = SHAPE | {"intermediate_size": 100}
    (tmp_path / "other").mkdir()
    write_gguf(tmp_path / "other" / "model.gguf", state_of(model), config, pieces)
    with pytest.raises(InputError, match=r"blk\.0\.ffn_gate\.weight is \(96, 64\), where its fields say \(100, 64\)"):
        convert(tmp_path / "store", tmp_path / "other")


def test_several_models_are_none(tmp_path, pieces):
    weights = folder_of(tmp_path / "weights", random_model("llama"), pieces)
    (weights / "other.gguf").write_bytes(b"")
    with pytest.raises(InputError, match=r"several models in it \(model\.gguf, other\.gguf\); give one"):
        convert(tmp_path / "store", weights)


def test_metas_weights_keep_their_dtype(tmp_path, tiny_meta):
    with pytest.raises(InputError, match="--dtype bfloat16: Meta's weights keep their own"):
        convert(tmp_path / "store", tiny_meta, dtype="bfloat16")


def test_the_rows_of_a_head_are_turned_as_llama_cpp_does():
    rows = np.arange(8)[:, None]
    assert turned(rows, 2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
