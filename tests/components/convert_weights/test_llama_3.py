"""Meta's layout of Llama 3: its tokenizer, its embedding cut by rows, its stretched positions, a head that is tied; and
the way back by export_model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from components.convert_weights.converter import convert_weights
from components.convert_weights.options import ConvertWeights
from components.export_model.exporter import export_model
from components.export_model.options import ExportModel
from tests.zhllama.tokenizer.byte_level_models import trained
from tests.zhllama.tokenizer.test_tiktoken_file import file_of, ranks_in
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.open import open_artifact
from zhllama.errors import InputError
from zhllama.stage.run import run_stage
from zhllama.tokenizer.gguf_tokenizer import PRE
from zhllama.weights.meta_format import MetaParams, places, shard_name, split, unpermute
from zhllama.weights.safetensors_io import Checkpoint

ROWS = 544 + 256
PARAMS: dict[str, Any] = {
    "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": ROWS, "ffn_dim_multiplier": 1.3,
    "multiple_of": 32, "norm_eps": 1e-5, "rope_theta": 500_000.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(english_text: list[str]) -> bytes:
    return file_of(ranks_in(trained(english_text[:800], PRE["llama-bpe"], ROWS - 256, [])))


def state_of(params: MetaParams, tied: bool = False) -> dict[str, torch.Tensor]:
    """By Hugging Face names, bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=ROWS, hidden_size=params.dim, intermediate_size=params.width, num_hidden_layers=params.n_layers,
        num_attention_heads=params.n_heads, num_key_value_heads=params.kv_heads, tie_word_embeddings=tied,
    )  # fmt: skip
    return {name: one.detach().bfloat16().clone() for name, one in LlamaForCausalLM(config).state_dict().items()}


def written(folder: Path, tokenizer: bytes, shards: int = 1, tied: bool = False, **changes: Any) -> dict[str, Any]:
    """As Meta writes it: its state dict comes back."""
    folder.mkdir()
    said = PARAMS | changes
    params = MetaParams.from_json(json.dumps(said).encode(), "here")
    state = state_of(params, tied)
    cut: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    for place in places(params.n_layers, params.n_heads, params.kv_heads):
        weight = unpermute(state[place.hf], place.heads) if place.heads else state[place.hf]
        axis = 0 if place.meta == "tok_embeddings.weight" else place.axis
        for shard, part in zip(cut, split(weight, axis, shards)):
            shard[place.meta] = part.clone()
    for number, shard in enumerate(cut):
        torch.save(shard, folder / shard_name(number))
    (folder / "params.json").write_text(json.dumps(said))
    (folder / "tokenizer.model").write_bytes(tokenizer)
    return state


def convert(store: Path, weights: str | Path, **options: Any) -> Manifest:
    return run_stage(ConvertWeights(store=str(store), weights=str(weights), **options), convert_weights)


def object_in(manifest: Manifest, name: str) -> dict[str, Any]:
    return json.loads(Path(manifest.root, name).read_text("utf-8"))


@pytest.mark.parametrize("shards", [1, 2])
def test_every_tensor_is_the_one_that_was_cut(tmp_path, tokenizer, shards):
    state = written(tmp_path / "meta", tokenizer, shards)
    manifest = convert(tmp_path / "store", tmp_path / "meta")
    checkpoint = Checkpoint(open_artifact(manifest.reference))
    assert checkpoint.tensors.keys() == state.keys()
    for name, wanted in state.items():
        assert torch.equal(checkpoint.read(name), wanted), name
    config = object_in(manifest, "config.json")
    said = {name: config[name] for name in ("rope_theta", "rope_scaling", "max_position_embeddings", "dtype")}
    assert said == {
        "rope_theta": 500_000.0, "rope_scaling": None, "max_position_embeddings": 8192, "dtype": "bfloat16",
    }  # fmt: skip
    assert (config["bos_token_id"], config["eos_token_id"]) == (544, 545)
    assert object_in(manifest, "generation_config.json")["eos_token_id"] == [545, 553]


@pytest.mark.parametrize(
    ("changes", "factor"),
    [({}, 8.0), ({"dim": 2048, "n_layers": 16}, 32.0), ({"rope_scaling_factor": 16}, 16.0)],
    ids=["3.1", "3.2", "said"],
)
def test_stretched_positions_are_llama_3_1s(changes, factor):
    params = MetaParams.from_json(json.dumps(PARAMS | {"use_scaled_rope": True} | changes).encode(), "here")
    assert params.rope_scaling == {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    assert MetaParams.from_json(params.to_json(), "here") == params


def test_a_tied_head_is_left_out(tmp_path, tokenizer):
    state = written(tmp_path / "meta", tokenizer, 2, tied=True, use_scaled_rope=True)
    manifest = convert(tmp_path / "store", tmp_path / "meta")
    checkpoint = Checkpoint(open_artifact(manifest.reference))
    assert checkpoint.tensors.keys() == state.keys() - {"lm_head.weight"}
    config = object_in(manifest, "config.json")
    assert config["tie_word_embeddings"]
    assert config["rope_scaling"]["rope_type"] == "llama3"
    assert config["max_position_embeddings"] == 131_072
    assert manifest.vocabulary.tied


def test_positions_that_are_asked_for_count(tmp_path, tokenizer):
    written(tmp_path / "meta", tokenizer)
    manifest = convert(tmp_path / "store", tmp_path / "meta", max_positions=4096)
    assert object_in(manifest, "config.json")["max_position_embeddings"] == 4096


@pytest.mark.parametrize("scaled", [False, True], ids=["3", "3.1"])
def test_it_comes_back_as_metas_files(tmp_path, tokenizer, scaled):
    written(tmp_path / "meta", tokenizer, 2, use_scaled_rope=scaled)
    first = convert(tmp_path / "store", tmp_path / "meta")
    given = ExportModel(store=str(tmp_path / "store"), model=first.reference, format="meta", shards=2)
    exported = run_stage(given, export_model)
    assert Path(exported.root, "tokenizer.model").read_bytes() == tokenizer
    for name in (shard_name(0), shard_name(1)):
        one, other = (torch.load(Path(root, name)) for root in (tmp_path / "meta", exported.root))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert MetaParams.from_json(Path(exported.root, "params.json").read_bytes(), "there").use_scaled_rope == scaled
    again = convert(tmp_path / "store", exported.reference)
    same = {file.path: file.sha256 for file in first.files}
    assert {file.path for file in again.files if same.get(file.path) != file.sha256} <= {"README.md", "blocks.json"}
    assert "tokenizer.json" in same


def test_a_tokenizer_of_another_size_is_refused(tmp_path, tokenizer):
    written(tmp_path / "meta", tokenizer)
    (tmp_path / "meta" / "tokenizer.model").write_bytes(tokenizer.rpartition(b"\n")[0].rpartition(b"\n")[0] + b"\n")
    with pytest.raises(InputError, match=rf"has {ROWS - 1} pieces and the weights have {ROWS} rows"):
        convert(tmp_path / "store", tmp_path / "meta")


def test_a_damaged_tokenizer_is_refused(tmp_path, tokenizer):
    written(tmp_path / "meta", tokenizer)
    (tmp_path / "meta" / "tokenizer.model").write_bytes(tokenizer[:2000])
    with pytest.raises(InputError, match=r"tokenizer\.model: no tokenizer of Llama 3's kind"):
        convert(tmp_path / "store", tmp_path / "meta")
