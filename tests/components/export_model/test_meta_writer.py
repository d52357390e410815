"""Export to Meta's format: there and back without a changed bit, for any number of shards."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from components.convert_weights.converter import convert_weights
from components.convert_weights.options import ConvertWeights
from components.export_model.exporter import export_model
from components.export_model.meta_writer import with_width
from components.export_model.options import ExportModel
from tests.components.export_model.conftest import configure
from tests.packed_data import quantise
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.open import open_artifact
from zhllama.errors import InputError
from zhllama.stage.run import run_stage
from zhllama.tokenizer.vocabulary import load_encoder
from zhllama.weights.chat_template import template_in
from zhllama.weights.meta_format import MetaParams
from zhllama.weights.safetensors_io import Checkpoint


def export(store: str | Path, model: str | Path, shards: int = 0) -> Manifest:
    return run_stage(ExportModel(store=str(store), model=str(model), shards=shards), export_model)


def load(manifest: Manifest, index: int) -> dict[str, torch.Tensor]:
    with open_artifact(manifest.reference).open(f"consolidated.{index:02d}.pth") as stream:
        return torch.load(stream, weights_only=True)


def test_metas_own_shards_come_back_tensor_for_tensor(store, tiny_model, tiny_meta):
    manifest = export(store, tiny_model, shards=2)
    for index in range(2):
        wanted = torch.load(tiny_meta / f"consolidated.{index:02d}.pth", weights_only=True)
        found = load(manifest, index)
        assert set(found) == set(wanted)
        assert all(torch.equal(found[name], wanted[name]) and found[name].dtype == torch.float16 for name in wanted)
    artifact = open_artifact(manifest.reference)
    assert artifact.read("tokenizer.model") == (tiny_meta / "tokenizer.model").read_bytes()
    read = [
        MetaParams.from_json(content, "")
        for content in (artifact.read("params.json"), (tiny_meta / "params.json").read_bytes())
    ]
    assert read[0].width == read[1].width == 192


@pytest.fixture
def eight_heads(tmp_path, tiny_state, llama_tokenizer) -> str:
    """The tiny model's weights as a model of eight heads, which eight shards can hold."""
    from zhllama.weights.meta_format import meta_files

    (tmp_path / "meta").mkdir()
    params = MetaParams(dim=64, n_layers=2, n_heads=8, norm_eps=1e-6, multiple_of=32)
    for name, content in meta_files(tiny_state, params, llama_tokenizer, 1).items():
        (tmp_path / "meta" / name).write_bytes(content)
    weights = ConvertWeights(store=str(tmp_path / "converted"), weights=str(tmp_path / "meta"))
    return run_stage(weights, convert_weights).reference


def test_eight_shards_there_and_back_change_no_bit(store, eight_heads, tiny_state):
    exported = export(store, eight_heads, 8)
    assert len([file for file in exported.files if file.path.endswith(".pth")]) == 8
    back = run_stage(ConvertWeights(store=store, weights=exported.root), convert_weights)
    checkpoint = Checkpoint(open_artifact(back.reference))
    assert set(checkpoint.tensors) == set(tiny_state)
    assert all(torch.equal(checkpoint.read(name), wanted) for name, wanted in tiny_state.items())


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_there_and_back_changes_no_bit(store, tiny_model, tiny_state, shards):
    exported = export(store, tiny_model, shards)
    back = run_stage(ConvertWeights(store=store, weights=exported.root), convert_weights)
    checkpoint = Checkpoint(open_artifact(back.reference))
    for name, wanted in tiny_state.items():
        assert torch.equal(checkpoint.read(name), wanted), name
    assert back.vocabulary == open_artifact(tiny_model).manifest.vocabulary


def test_the_last_shard_takes_the_remainder_of_the_vocabulary(tmp_path, model, longer_model):
    manifest = export(tmp_path / "store", longer_model, shards=4)
    assert [load(manifest, index)["output.weight"].shape[0] for index in range(4)] == [200, 200, 200, 203]
    assert {load(manifest, index)["tok_embeddings.weight"].shape for index in range(4)} == {(803, 16)}
    back = run_stage(ConvertWeights(store=str(tmp_path / "store"), weights=manifest.root), convert_weights)
    before, after = Checkpoint(open_artifact(str(longer_model))), Checkpoint(open_artifact(back.reference))
    assert torch.equal(after.read("lm_head.weight"), before.read("lm_head.weight"))


@pytest.fixture
def longer_model(model, llama_tokenizer) -> Path:
    """The tiny model with three pieces and rows more: 803."""
    from safetensors.torch import load_file, save_file

    from zhllama.tokenizer.sentencepiece_model import parse_model

    proto = parse_model(llama_tokenizer)
    for text in ("中文", "你好", "[PAD]"):
        proto.pieces.add(piece=text, score=0.0)
    (model / "tokenizer.model").write_bytes(proto.SerializeToString())
    path = model / "model-00001-of-00002.safetensors"
    rows = {name: torch.cat([tensor, tensor[5:8] * 2]) for name, tensor in load_file(path).items()}
    save_file(rows, path)
    configure(model, vocab_size=803)
    return model


def test_rows_that_only_pad_are_left_out(tmp_path, longer_model, llama_tokenizer):
    (longer_model / "tokenizer.model").write_bytes(llama_tokenizer)
    assert load(export(tmp_path / "store", longer_model), 0)["output.weight"].shape == (800, 64)


def test_a_tied_model_gets_a_head_of_its_own(tmp_path, model):
    from safetensors.torch import load_file, save_file

    path = model / "model-00001-of-00002.safetensors"
    tensors = load_file(path)
    save_file({"model.embed_tokens.weight": tensors["model.embed_tokens.weight"]}, path)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    del index["weight_map"]["lm_head.weight"]
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    configure(model, tie_word_embeddings=True)
    found = load(export(tmp_path / "store", model), 0)
    assert torch.equal(found["output.weight"], found["tok_embeddings.weight"])


def test_the_export_can_be_fetched_again_verified(tmp_path, tiny_model):
    exported = export(tmp_path, tiny_model, shards=4)
    command = [sys.executable, "-m", "components.fetch_weights", "--store", str(tmp_path / "again")]
    ended = subprocess.run([*command, "--source", exported.root, "--size", "tiny"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "6 verified" in ended.stderr


@pytest.mark.slow
def test_the_command_exports(tmp_path, tiny_model):
    command = [sys.executable, "-m", "components.export_model", "--store", str(tmp_path), "--model", tiny_model]
    command += ["--format", "meta", "--shards", "0", "--reference", str(tmp_path / "ref")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert open_artifact((tmp_path / "ref").read_text()).manifest.facts["shards"] == 1


@pytest.mark.parametrize(
    ("dim", "width"),
    [(4096, 11008), (5120, 13824), (6656, 17920), (8192, 22016)],
    ids=["7b", "13b", "30b", "65b"],
)
def test_llamas_widths_are_said_as_meta_says_them(dim, width):
    params = with_width(MetaParams(dim, 1, 1, 1e-6), width)
    assert (params.multiple_of, params.ffn_dim_multiplier) == (256, None)


@pytest.mark.slow
@given(st.integers(1, 1024), st.integers(1, 20_000))
def test_any_width_is_said_and_read_back(pairs, width):
    params = with_width(MetaParams(2 * pairs, 1, 1, 1e-6), width)
    assert MetaParams.from_json(params.to_json(), "").width == width


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma2"}, "a gemma2 model"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, r"stretches the rotary positions \(yarn\)"),
        ({"attention_bias": True}, "no tensor .*_proj.bias"),
        ({"hidden_size": "wide"}, "not a LLaMA model's"),
    ],
    ids=["architecture", "rope", "bias", "damaged"],
)
def test_what_metas_format_cannot_say_is_refused(tmp_path, model, changes, message):
    configure(model, **changes)
    with pytest.raises(InputError, match=message):
        export(tmp_path / "store", model)


def test_a_quantised_model_is_refused(tmp_path, model):
    quantise(model)
    with pytest.raises(InputError, match=r"\.weight is int8, a quantised weight; give the model in float16"):
        export(tmp_path / "store", model)


def test_shards_that_do_not_divide_the_heads_are_refused(tmp_path, tiny_model):
    with pytest.raises(InputError, match="3 shards do not divide"):
        export(tmp_path, tiny_model, shards=3)
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_tokenizer_of_another_model_is_refused(tmp_path, longer_model, tiny_model):
    model = shutil.copytree(
        Path(tiny_model).parent, tmp_path / "shorter", ignore=shutil.ignore_patterns("manifest.json")
    )
    shutil.copy(longer_model / "tokenizer.model", model)
    with pytest.raises(InputError, match="has 803 pieces and the model 800 rows"):
        export(tmp_path / "store", model)


def test_tokens_that_the_folder_names_are_exported_with_their_rows(tmp_path, chatml_model):
    manifest = export(tmp_path / "store", chatml_model)
    assert load(manifest, 0)["tok_embeddings.weight"].shape[0] == 802
    encoder = load_encoder(open_artifact(manifest.reference), "")
    assert (encoder.size, encoder.eos, encoder.pieces[800]) == (802, 801, "<|im_start|>")


def test_the_models_own_template_and_further_ends_come_back(tmp_path, chatml_model):
    (chatml_model / "chat_template.jinja").write_text("{{ 'mine' }}")
    (chatml_model / "generation_config.json").write_text('{"eos_token_id": [801, 2]}')
    exported = export(tmp_path / "store", chatml_model)
    options = ConvertWeights(store=str(tmp_path / "store"), weights=exported.reference)
    back = run_stage(options, convert_weights)
    assert template_in(open_artifact(back.reference), "") == "{{ 'mine' }}"
    assert back.facts["chat_template"] == "the model's own"
    generation = json.loads(open_artifact(back.reference).read("generation_config.json"))
    assert generation == {"bos_token_id": 1, "eos_token_id": [801, 2]}


def test_padding_that_is_eos_comes_back(tmp_path, chatml_model):
    config = json.loads((chatml_model / "tokenizer_config.json").read_text()) | {"pad_token": "<|im_end|>"}
    (chatml_model / "tokenizer_config.json").write_text(json.dumps(config))
    exported = export(tmp_path / "store", chatml_model)
    back = run_stage(ConvertWeights(store=str(tmp_path / "store"), weights=exported.reference), convert_weights)
    assert json.loads(open_artifact(back.reference).read("config.json"))["pad_token_id"] == 801


def test_room_is_asked_for_before_anything_is_written(tmp_path, tiny_model, full_disk):
    with pytest.raises(InputError, match=r"--store .* will be needed and 1\.0 kB are free"):
        export(tmp_path / "store", tiny_model)
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []
