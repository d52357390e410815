"""Export to GGUF: llama.cpp loads it, encodes as SentencePiece does and computes what transformers computes."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components.export_model import gguf_export, gguf_writer, llama_cpp_tools
from components.export_model.exporter import export_model
from components.export_model.gguf_export import probe_lines, split_kinds
from components.export_model.options import ExportModel
from tests.components.export_model.conftest import configure
from tests.folders import add_folder
from tests.packed_data import quantise
from tests.texts import mixed_lines
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.open import open_artifact
from zhllama.errors import InputError, StorageFault
from zhllama.stage.run import run_stage
from zhllama.tokenizer.prompt import RECIPE
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make gguf")
gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.gguf

KINDS = "f16,bf16,q8_0,q4_k_m"


def export(store: str | Path, model: str | Path, kinds: str = "", **options: str) -> Manifest:
    given = ExportModel(store=str(store), model=str(model), format="gguf", quantization=kinds, **options)
    return run_stage(given, export_model)


def metadata(path: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def rows_of(path: Path, name: str) -> torch.Tensor:
    (found,) = [tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name]
    if found.tensor_type == gguf.GGMLQuantizationType.BF16:
        return torch.from_numpy(found.data.copy()).view(torch.bfloat16).float()
    return torch.from_numpy(found.data.astype(np.float32))


@pytest.fixture(scope="module")
def exported(trained_model, tmp_path_factory) -> Manifest:
    return export(tmp_path_factory.mktemp("exported"), trained_model, KINDS)


@pytest.fixture(scope="module")
def folder(exported) -> Path:
    return Path(exported.root)


# --- the tokenizer inside ---------------------------------------------------------------------------------------------


def test_llama_cpp_gives_sentencepieces_ids_on_the_parity_corpus(folder, chinese_text, english_text):
    encoder = SentencePieceEncoder((folder / "tokenizer.model").read_bytes())
    texts = [*chinese_text, *english_text[:500], *probe_lines(encoder), *mixed_lines(20_000)]
    found = llama_cpp_tools.encode(folder / "model-f16.gguf", texts)
    assert found == [[encoder.bos, *ids] for ids in encoder.encode_batch(texts)]


def test_tied_scores_give_sentencepieces_ids_too(tmp_path, model, llama_tokenizer, chinese_tokenizer, chinese_text):
    from zhllama.tokenizer.sentencepiece_model import parse_model

    proto = parse_model(llama_tokenizer)
    there = {piece.piece for piece in proto.pieces}
    for piece in parse_model(chinese_tokenizer).pieces:
        if piece.piece not in there:
            proto.pieces.add(piece=piece.piece, score=0.0)
    encoder = SentencePieceEncoder(proto.SerializeToString())
    (model / "tokenizer.model").write_bytes(encoder.model)
    lengthen(model, encoder.size)
    manifest = export(tmp_path / "store", model)
    found = llama_cpp_tools.encode(Path(manifest.root, "model-f16.gguf"), chinese_text)
    assert found == [[encoder.bos, *ids] for ids in encoder.encode_batch(chinese_text)]
    assert manifest.facts["tokenizer_lines_differing"] == 0


def lengthen(model: Path, rows: int) -> None:
    """Zero rows below the embedding and the head, up to `rows`."""
    from safetensors.torch import load_file, save_file

    path = model / "model-00001-of-00002.safetensors"
    tensors = load_file(path)
    save_file({name: torch.cat([t, t.new_zeros(rows - len(t), t.shape[1])]) for name, t in tensors.items()}, path)
    configure(model, vocab_size=rows)


def test_a_tokenizer_that_gguf_cannot_say_is_counted(tmp_path, model, llama_tokenizer):
    from zhllama.tokenizer.sentencepiece_model import parse_model

    proto = parse_model(llama_tokenizer)
    proto.normalizer_spec.remove_extra_whitespaces = True
    (model / "tokenizer.model").write_bytes(proto.SerializeToString())
    assert export(tmp_path / "store", model).facts["tokenizer_lines_differing"] > 0


def test_the_metadata_is_complete(folder, exported):
    encoder = SentencePieceEncoder((folder / "tokenizer.model").read_bytes())
    found = metadata(folder / "model-f16.gguf")
    wanted = {
        "general.architecture": "llama",
        "general.name": "zhllama",
        "general.type": "model",
        "general.file_type": 1,
        "general.quantization_version": 2,
        "general.languages": ["zh", "en"],
        "llama.vocab_size": encoder.size,
        "llama.context_length": 256,
        "llama.embedding_length": 256,
        "llama.block_count": 2,
        "llama.feed_forward_length": 512,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 64,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": encoder.pieces,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": encoder.pad,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.chat_template": RECIPE.plain,
    }
    assert {name: found.get(name) for name in wanted} == wanted
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert len(found["tokenizer.ggml.scores"]) == len(found["tokenizer.ggml.token_type"]) == encoder.size
    assert exported.kind == "gguf"
    assert exported.vocabulary is not None
    assert exported.vocabulary.size == encoder.size
    quantised = metadata(folder / "model-q4_k_m.gguf")
    assert quantised["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_K_M
    assert quantised["tokenizer.ggml.tokens"] == encoder.pieces


# --- the weights ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lines(folder, chinese_text, english_text) -> list[list[int]]:
    encoder = SentencePieceEncoder((folder / "tokenizer.model").read_bytes())
    return [[encoder.bos, *encoder.encode(text)][:48] for text in chinese_text[:12] + english_text[:12]]


@pytest.fixture(scope="module")
def wanted(trained_model, lines) -> list[torch.Tensor]:
    """transformers' logits of each line, in float32."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(trained_model, dtype=torch.float32)
    with torch.inference_mode():
        return [model(torch.tensor([ids])).logits[0] for ids in lines]


def load(path: Path, **settings: int) -> Any:
    from llama_cpp import Llama

    return Llama(str(path), verbose=False, **settings)


def logits(path: Path, lines: list[list[int]]) -> list[torch.Tensor]:
    """llama.cpp's logits of each line."""
    model = load(path, n_ctx=256, logits_all=True, n_threads=1, n_threads_batch=1)
    found = []
    for ids in lines:
        model.reset()
        model.eval(ids)
        found.append(torch.tensor(np.array(model.scores[: len(ids)])))
    return found


# where transformers' own winner leads by less, either could win: llama.cpp rounds activations to the weights' precision
CLEAR = 0.01


@pytest.mark.parametrize(("kind", "error"), [("f16", 0.001), ("bf16", 0.005)])
def test_llama_cpp_predicts_what_transformers_predicts(folder, lines, wanted, kind, error):
    found, right = torch.cat(logits(folder / f"model-{kind}.gguf", lines)), torch.cat(wanted)
    best = right.topk(2).values
    clear = best[:, 0] - best[:, 1] > CLEAR
    assert clear.float().mean() > 0.95
    assert torch.equal(found.argmax(-1)[clear], right.argmax(-1)[clear])
    assert float((found - right).norm() / right.norm()) < error


# docs/export.md states these
@pytest.mark.parametrize(("kind", "error", "agreement"), [("q8_0", 0.01, 0.96), ("q4_k_m", 0.06, 0.88)])
def test_a_quantised_model_stays_within_the_stated_tolerance(folder, lines, wanted, kind, error, agreement):
    found, right = torch.cat(logits(folder / f"model-{kind}.gguf", lines)), torch.cat(wanted)
    assert float((found - right).norm() / right.norm()) < error
    assert float((found.argmax(-1) == right.argmax(-1)).float().mean()) > agreement


def test_k_quants_are_k_quants_and_sizes_are_reported(exported, folder):
    files = exported.facts["files"]
    assert files["q4_k_m"]["tensors"].keys() == {"F32", "Q4_K", "Q6_K"}
    assert files["q8_0"]["tensors"].keys() == {"F32", "Q8_0"}
    for kind in KINDS.split(","):
        assert files[kind]["bytes"] == (folder / f"model-{kind}.gguf").stat().st_size
    assert files["q4_k_m"]["bits_per_weight"] < files["q8_0"]["bits_per_weight"] < files["f16"]["bits_per_weight"] < 17


def test_every_weight_is_the_models(folder, trained_model):
    from safetensors.torch import load_file

    state = load_file(trained_model / "model.safetensors")
    for kind, exact in (("f16", True), ("bf16", False)):
        path = folder / f"model-{kind}.gguf"
        for ours, theirs in (("token_embd", "model.embed_tokens"), ("output", "lm_head")):
            found, right = rows_of(path, f"{ours}.weight"), state[f"{theirs}.weight"].float()
            assert torch.equal(found, right if exact else right.bfloat16().float())
        down = state["model.layers.1.mlp.down_proj.weight"].float()
        assert torch.equal(rows_of(path, "blk.1.ffn_down.weight"), down if exact else down.bfloat16().float())


def test_from_s3_to_s3_in_small_pieces_the_file_is_the_same(s3_store, trained_model, folder, monkeypatch):
    from zhllama.artifacts.writer import ArtifactWriter

    out = ArtifactWriter(s3_store, "model", "key")
    add_folder(out, trained_model)
    model = out.publish("hf-model")
    monkeypatch.setattr(gguf_writer, "CHUNK", 5000)
    exported = export(s3_store, model.reference, "f16")
    found = open_artifact(exported.reference).read("model-f16.gguf")
    ours, theirs = (Path(folder, "model-f16.gguf").read_bytes(), found)
    # the digest of the source stands in the metadata: of a folder in one, of a manifest in the other
    assert ours.replace(open_artifact(str(trained_model)).digest.encode(), b"") == theirs.replace(
        model.digest.encode(), b""
    )


def test_the_models_own_precision_is_the_default_and_padding_rows_are_left_out(tmp_path, model):
    lengthen(model, 832)
    manifest = export(tmp_path / "store", model, name="Padded")
    path = Path(manifest.root, "model-f16.gguf")
    assert rows_of(path, "token_embd.weight").shape == (800, 64)
    assert metadata(path)["general.name"] == "Padded"
    assert manifest.vocabulary is not None
    assert manifest.vocabulary.rows == 800
    load(path, n_ctx=64)


def test_a_tied_model_has_no_head_of_its_own(tmp_path, model):
    from safetensors.torch import load_file, save_file

    (path,) = (path for path in model.glob("*.safetensors") if "lm_head.weight" in load_file(path))
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    configure(model, tie_word_embeddings=True)
    path = Path(export(tmp_path / "store", model).root, "model-f16.gguf")
    assert "output.weight" not in [tensor.name for tensor in gguf.GGUFReader(path).tensors]
    load(path, n_ctx=64)


def test_linear_stretching_is_said(tmp_path, model):
    configure(model, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0})
    found = metadata(Path(export(tmp_path / "store", model).root, "model-f16.gguf"))
    assert (found["llama.rope.scaling.type"], found["llama.rope.scaling.factor"]) == ("linear", 4.0)
    assert found["llama.rope.freq_base"] == 5000.0


ROPES = {
    "base": {"rope_theta": 5e5},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_llama_cpp_turns_positions_as_transformers_does(tmp_path, model, rope):
    from transformers import LlamaForCausalLM

    configure(model, rope_parameters={"rope_theta": 1e4, **rope})
    ids = torch.randint(3, 800, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    (found,) = logits(Path(export(tmp_path / "store", model, "f32").root, "model-f32.gguf"), [ids])
    with torch.inference_mode():
        right = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    # llama.cpp keeps keys and values in float16; another rope is 10% off
    assert float((found - right).norm() / right.norm()) < 1e-3


@pytest.mark.parametrize("name", ["attention_factor", "beta_fast"])
def test_settings_of_yarn_that_llama_cpp_reads_otherwise_are_refused(tmp_path, model, name):
    configure(model, rope_scaling={"type": "yarn", "factor": 4.0, name: 1.5})
    with pytest.raises(InputError, match=f"sets {name} of its rope, which is not exported to GGUF"):
        export(tmp_path / "store", model)


# --- what cannot be exported ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma2"}, "a gemma2 model"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, r"stretches the rotary positions \(yarn\)"),
        ({"hidden_size": "wide"}, "not a LLaMA model's"),
        ({"intermediate_size": 200}, r"gate_proj\.weight is \(192, 64\) where config\.json .* \(200, 64\)"),
        ({"num_hidden_layers": 3}, r"the model has no tensor model\.layers\.2"),
        ({"num_hidden_layers": 1}, r"tensor model\.layers\.1\.\S+ is none of a LLaMA model"),
    ],
    ids=["architecture", "rope", "damaged", "width", "too few layers", "too many layers"],
)
def test_a_model_that_does_not_fit_is_refused_and_nothing_is_written(tmp_path, model, changes, message):
    configure(model, **changes)
    with pytest.raises(InputError, match=message):
        export(tmp_path / "store", model)
    assert not list((tmp_path / "store").rglob("*.gguf"))


def test_a_quantised_model_is_refused(tmp_path, model):
    quantise(model)
    with pytest.raises(InputError, match=r"\.weight is int8, a quantised weight; give the model in float16"):
        export(tmp_path / "store", model)


def test_a_missing_shard_a_cut_file_and_a_foreign_tokenizer_are_named(tmp_path, model, chinese_tokenizer):
    shard = model / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-9])
    with pytest.raises(InputError, match="is cut short"):
        export(tmp_path / "store", model)
    shard.unlink()
    with pytest.raises(InputError, match=r"the shard model-00002-of-00002\.safetensors is missing"):
        export(tmp_path / "store", model)
    shard.write_bytes(whole)
    (model / "tokenizer.model").write_bytes(more_pieces(chinese_tokenizer))
    with pytest.raises(InputError, match="give a folder whose tokenizer files belong together"):
        export(tmp_path / "store", model)
    (model / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="has 801 pieces and the model 800 rows"):
        export(tmp_path / "store", model)


def more_pieces(tokenizer: bytes) -> bytes:
    from zhllama.tokenizer.sentencepiece_model import parse_model

    proto = parse_model(tokenizer)
    proto.pieces.add(piece="[PAD]", score=0.0)
    return bytes(proto.SerializeToString())


@pytest.mark.parametrize(("value", "message"), [(1e6, "give --quantization bf16"), (float("nan"), "holds NaN")])
def test_a_weight_that_the_precision_cannot_hold_is_named(tmp_path, model, value, message):
    from safetensors.torch import load_file, save_file

    path = model / "model-00001-of-00002.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    tensors["lm_head.weight"][3, 4] = value
    save_file(tensors, path)
    with pytest.raises(InputError, match=rf"lm_head\.weight is not finite.*{message}"):
        export(tmp_path / "store", model, "f16")
    assert not list((tmp_path / "store").rglob("manifest.json"))


def test_room_is_asked_for_before_a_weight_is_read(tmp_path, model, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr(gguf_export, "write_gguf", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(InputError, match=r"--store .* will be needed and 1\.0 kB are free"):
        export(tmp_path / "store", model)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(gguf_export, "require_space", lambda uri, need, what: refuse(what))
    with pytest.raises(InputError, match="TMPDIR, where llama"):
        export(tmp_path / "store", model, "q8_0")


def refuse(what: str) -> None:
    raise InputError(what)


def test_what_llama_cpp_refuses_is_a_fault_with_its_words(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF and nothing more")
    with pytest.raises(StorageFault, match=r"could not quantise to q4_k_m \(exit .*\): .*\w"):
        llama_cpp_tools.quantise(tmp_path / "x.gguf", tmp_path / "y.gguf", "q4_k_m")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "gguf", "quantization": "q9"}, "--quantization q9: no such type; give some of f32, f16"),
        ({"format": "gguf", "shards": 2}, "a GGUF is one file"),
        ({"format": "meta", "quantization": "f16"}, "give --format gguf"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        ExportModel(store="x", model="y", **options)


def test_types_are_taken_in_any_case_and_once():
    assert split_kinds(" Q4_K_M, f16 ,q4_k_m,") == ["q4_k_m", "f16"]


def test_the_command_exports_and_a_cancelled_one_leaves_nothing(tmp_path, trained_model):
    command = [sys.executable, "-m", "components.export_model", "--store", str(tmp_path / "store"), "--model"]
    command += [str(trained_model), "--format", "gguf", "--quantization", "q8_0", "--reference", str(tmp_path / "ref")]
    (tmp_path / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    running = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    # no rglob: other temporary folders come and go while it walks
    while not any((entry / "source.gguf").exists() for entry in (tmp_path / "tmp").iterdir()):
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 143, said
    assert not list((tmp_path / "tmp").iterdir())
    assert not list((tmp_path / "store").rglob("manifest.json"))
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 0
    assert open_artifact((tmp_path / "ref").read_text()).names == ["model-q8_0.gguf", "tokenizer.model"]


def test_tokens_that_the_folder_names_are_in_the_file(tmp_path, chatml_model):
    from components.serve.check import check_gguf

    manifest = export(tmp_path / "store", chatml_model, "f16")
    (path,) = Path(manifest.root).glob("*.gguf")
    fields = metadata(path)
    assert fields["tokenizer.ggml.tokens"][800:] == ["<|im_start|>", "<|im_end|>"]
    assert fields["tokenizer.ggml.token_type"][800:] == [3, 3]
    assert fields["tokenizer.ggml.eos_token_id"] == 801
    assert rows_of(path, "token_embd.weight").shape == (802, 64)
    assert manifest.facts["tokenizer_lines_differing"] == 0
    encoder, _, _ = check_gguf(path, manifest.vocabulary, "m")
    assert (encoder.size, encoder.eos) == (802, 801)


def test_the_models_own_template_further_end_and_origin_are_in_the_file(tmp_path, model):
    from zhllama.tokenizer.sentencepiece_model import CONTROL, parse_model

    proto = parse_model((model / "tokenizer.model").read_bytes())
    proto.pieces[700].type = CONTROL
    (model / "tokenizer.model").write_bytes(proto.SerializeToString())
    (model / "generation_config.json").write_text('{"eos_token_id": [1, 700]}')
    (model / "chat_template.jinja").write_text("{{ 'mine' }}")
    front = "license: other\nlicense_name: mine\nlicense_link: LICENSE\nbase_model: owner/name\ntags: [zhllama]"
    (model / "README.md").write_text(f"---\n{front}\n---\n")
    found = metadata(Path(export(tmp_path / "store", model).root, "model-f16.gguf"))
    assert found["tokenizer.chat_template"] == "{{ 'mine' }}"
    assert [found[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "eot")] == [1, 2, 700]
    general = {name.removeprefix("general."): value for name, value in found.items() if name.startswith("general.")}
    assert [general[name] for name in ("license", "license.name", "license.link")] == ["other", "mine", "LICENSE"]
    assert general["base_model.count"] == 1
    base = [general[f"base_model.0.{name}"] for name in ("name", "organization", "repo_url")]
    assert base == ["name", "owner", "https://huggingface.co/owner/name"]
