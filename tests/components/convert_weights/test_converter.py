"""Conversion: the same model under other names, bit for bit, and what is no such model is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from components.convert_weights.converter import convert_weights, files_of
from components.convert_weights.options import ConvertWeights
from tests.bench.measure import run
from tests.folders import add_folder
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.stage.run import run_stage
from zhllama.weights.meta_format import MetaParams, meta_files
from zhllama.weights.safetensors_io import Checkpoint


def convert(store: str | Path, weights: str | Path) -> Manifest:
    return run_stage(ConvertWeights(store=str(store), weights=str(weights)), convert_weights)


@pytest.fixture
def weights(tmp_path, tiny_meta) -> Path:
    """A copy of the tiny Meta weights that a test may spoil."""
    return shutil.copytree(tiny_meta, tmp_path / "weights")


# --- Meta's architecture, written from its description ----------------------------------------------------------------


def joined(folder: Path) -> dict[str, torch.Tensor]:
    """The whole model of a Meta folder in float32, its shards put together without our code."""
    shards = [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pth"))]
    along_columns = ("wo", "w2", "tok_embeddings")
    whole = {}
    for name in shards[0]:
        parts = [shard[name].float() for shard in shards]
        if "norm" in name:
            whole[name] = parts[0]
        else:
            whole[name] = torch.cat(parts, dim=1 if name.split(".")[-2] in along_columns else 0)
    return whole


def meta_logits(weights: dict[str, torch.Tensor], params: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """Logits (time, pieces) of Meta's LLaMA: RMSNorm, rotary over neighbouring pairs, causal attention, SwiGLU."""
    heads, dim, eps = params["n_heads"], params["dim"], params["norm_eps"]
    width = dim // heads

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weights[f"{name}.weight"]

    # one complex turn per position and pair of neighbouring dimensions
    frequencies = 10000.0 ** (-torch.arange(0, width, 2).double() / width)
    angles = torch.outer(torch.arange(len(ids)).double(), frequencies)
    turns = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)

    def turned(x: torch.Tensor) -> torch.Tensor:  # (time, heads, width)
        pairs = torch.view_as_complex(x.reshape(len(ids), heads, width // 2, 2))
        return torch.view_as_real(pairs * turns[:, None, :]).flatten(2)

    x = weights["tok_embeddings.weight"][ids]
    unseen = torch.full((len(ids), len(ids)), float("-inf")).triu(1)
    for layer in range(params["n_layers"]):
        at = f"layers.{layer}"
        h = norm(x, f"{at}.attention_norm")
        q, k, v = (
            (h @ weights[f"{at}.attention.{w}.weight"].T).view(len(ids), heads, width) for w in ("wq", "wk", "wv")
        )
        scores = torch.einsum("qhd,khd->hqk", turned(q), turned(k)) / width**0.5 + unseen
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        x = x + mixed @ weights[f"{at}.attention.wo.weight"].T
        h = norm(x, f"{at}.ffn_norm")
        w1, w2, w3 = (weights[f"{at}.feed_forward.{w}.weight"] for w in ("w1", "w2", "w3"))
        x = x + (F.silu(h @ w1.T) * (h @ w3.T)) @ w2.T
    return norm(x, "norm") @ weights["output.weight"].T


@pytest.mark.slow
def test_logits_are_those_of_metas_architecture(tiny_model, tiny_meta):
    from transformers import AutoModelForCausalLM

    ids = torch.randint(0, 800, (60,), generator=torch.Generator().manual_seed(5))
    params = json.loads((tiny_meta / "params.json").read_text())
    wanted = meta_logits(joined(tiny_meta), params, ids)
    model = AutoModelForCausalLM.from_pretrained(Path(tiny_model).parent, dtype=torch.float32)
    with torch.no_grad():
        found = model(ids[None]).logits[0]
    assert wanted.std() > 0.5
    assert (found - wanted).abs().max() < 1e-5


# --- the files --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("shards", "rows"), [(1, 800), (2, 800), (4, 800), (8, 800), (4, 803), (8, 803)], ids=str)
def test_every_tensor_is_the_one_that_was_cut_into_shards(
    store, tmp_path, tiny_state, llama_tokenizer, longer_tokenizer, shards, rows
):
    state = dict(tiny_state)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], state[name][: rows - 800] * 2])
    # a shard holds whole heads
    params = MetaParams(dim=64, n_layers=2, n_heads=8, norm_eps=1e-6, multiple_of=32)
    tokenizer = llama_tokenizer if rows == 800 else longer_tokenizer
    (tmp_path / "meta").mkdir()
    for name, content in meta_files(state, params, tokenizer, shards).items():
        (tmp_path / "meta" / name).write_bytes(content)
    manifest = convert(store, tmp_path / "meta")
    checkpoint = Checkpoint(open_artifact(manifest.reference))
    assert set(checkpoint.tensors) == set(state)
    for name, wanted in state.items():
        found = checkpoint.read(name)
        assert found.dtype == torch.float16
        assert torch.equal(found, wanted), name
    assert manifest.vocabulary is not None
    assert (manifest.vocabulary.rows, manifest.vocabulary.tied, manifest.vocabulary.dtype) == (rows, False, "float16")


@pytest.fixture(scope="session")
def longer_tokenizer(llama_tokenizer: bytes) -> bytes:
    """Three pieces more, so that four shards cannot have equal parts of the vocabulary."""
    from zhllama.tokenizer.sentencepiece_model import parse_model

    proto = parse_model(llama_tokenizer)
    for text in ("中文", "你好", "世界"):
        proto.pieces.add(piece=text, score=-40_000.0 - len(proto.pieces))
    return bytes(proto.SerializeToString())


def random_weights(folder: Path, tokenizer: bytes, layers: int) -> int:
    """Weights 1,024 wide in Meta's layout, two shards of 16-bit floats; returns their bytes."""
    from zhllama.weights.meta_format import extents, places, shard_name
    from zhllama.weights.torch_zip import PthStream

    folder.mkdir()
    params = MetaParams(dim=1024, n_layers=layers, n_heads=8, norm_eps=1e-6)
    rows = {"tok_embeddings": 800, "output": 800, "w1": params.width, "w3": params.width}
    for index in range(2):
        declared: dict[str, tuple[str, tuple[int, ...]]] = {}
        for place in places(layers, 8, 8):
            kind = place.meta.split(".")[-2]
            shape = [rows.get(kind, 1024)]
            if place.axis is not None:
                shape.append(params.width if kind == "w2" else 1024)
                shape[place.axis] = extents(shape[place.axis], 2)[index]
            declared[place.meta] = ("float16", tuple(shape))
        with open(folder / shard_name(index), "wb") as file:
            stream = PthStream(file, declared)
            for name, (_, shape) in declared.items():
                stream.write(name, torch.ones(shape).half())
            stream.close()
    (folder / "params.json").write_bytes(params.to_json())
    (folder / "tokenizer.model").write_bytes(tokenizer)
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.slow
def test_memory_is_bounded_by_the_largest_tensor_and_not_by_the_model(tmp_path, llama_tokenizer):
    """The bar of the design: three times the largest tensor and 600 MB; the peak does not grow with the model."""
    largest_mb = 2816 * 1024 * 2 / 2**20
    sizes, peaks = [], []
    for layers in (2, 12):
        sizes.append(random_weights(tmp_path / f"meta-{layers}", llama_tokenizer, layers))
        command = [sys.executable, "-m", "components.convert_weights", "--store", str(tmp_path / "store")]
        peaks.append(run([*command, "--weights", str(tmp_path / f"meta-{layers}")]).peak_mb)
        shutil.rmtree(tmp_path / f"meta-{layers}")
    assert sizes[1] - sizes[0] > 250e6
    assert max(peaks) < 3 * largest_mb + 600
    assert peaks[1] - peaks[0] < 60, peaks


def test_transformers_loads_the_folder(tiny_model, tiny_state):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    folder = Path(tiny_model).parent
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float16
    assert model.config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert model.config.rms_norm_eps == 1e-6
    assert not model.config.tie_word_embeddings
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in tiny_state.items()
    }
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.bos_token_id, generation.eos_token_id) == (1, 2)
    assert AutoTokenizer.from_pretrained(folder)("A line.").input_ids[0] == 1


def test_the_embeddings_have_a_file_of_their_own(tiny_model):
    checkpoint = Checkpoint(open_artifact(tiny_model))
    alone = {name for name, info in checkpoint.tensors.items() if info.file == "model-00001-of-00002.safetensors"}
    assert alone == {"model.embed_tokens.weight", "lm_head.weight"}


def test_files_are_filled_in_order_up_to_their_limit():
    sizes = {"model.embed_tokens.weight": 500, "lm_head.weight": 500, "a": 40, "b": 60, "c": 70, "d": 40, "e": 200}
    assert files_of(sizes, limit=100) == {
        "model-00001-of-00005.safetensors": ["model.embed_tokens.weight", "lm_head.weight"],
        "model-00002-of-00005.safetensors": ["a", "b"],
        "model-00003-of-00005.safetensors": ["c"],
        "model-00004-of-00005.safetensors": ["d"],
        "model-00005-of-00005.safetensors": ["e"],
    }


@pytest.mark.slow
def test_the_command_converts_a_prefix_in_s3(s3_store, tmp_path, tiny_meta, tiny_model):
    out = ArtifactWriter(s3_store, "fetch_weights", "tiny")
    add_folder(out, tiny_meta)
    weights = out.publish("meta-weights").reference
    command = [sys.executable, "-m", "components.convert_weights", "--store", s3_store, "--weights", weights]
    ended = subprocess.run([*command, "--output", str(tmp_path / "manifest")], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    manifest = Manifest.from_json((tmp_path / "manifest").read_bytes(), "")
    assert manifest.files == open_artifact(tiny_model).manifest.files


# --- what is refused --------------------------------------------------------------------------------------------------


class Code:
    """A pickle that would run a command when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def test_a_pickle_that_wants_to_run_code_is_refused_and_does_not_run(tmp_path, weights):
    torch.save({"norm.weight": Code(tmp_path / "ran")}, weights / "consolidated.01.pth")
    with pytest.raises(
        InputError, match=r"consolidated\.01\.pth: this pickle wants to run code \((posix|nt)\.system\)"
    ):
        convert(tmp_path / "store", weights)
    assert not (tmp_path / "ran").exists()
    assert not list((tmp_path / "store").rglob("manifest.json"))


def change(name: str, edit):
    """Loads a shard, lets `edit` change its tensors, and saves it."""

    def spoil(folder: Path) -> None:
        tensors = torch.load(folder / name, weights_only=True)
        edit(tensors)
        torch.save(tensors, folder / name)

    return spoil


def cut(name: str, share: float):
    def spoil(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return spoil


def configure(**changes: object):
    def spoil(folder: Path) -> None:
        path = folder / "params.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def use_other_tokenizer(folder: Path) -> None:
    from zhllama.tokenizer.sentencepiece_model import parse_model

    proto = parse_model((folder / "tokenizer.model").read_bytes())
    proto.pieces.add(piece="中", score=-50_000.0)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())


ONE = "consolidated.01.pth"
BAD = {
    "a missing shard": (lambda f: (f / "consolidated.00.pth").unlink(), r"consolidated\.00\.pth is missing"),
    "the last shard missing": (lambda f: (f / ONE).unlink(), r"consolidated\.00\.pth: tensor .* is expected"),
    "no shard": (lambda f: [p.unlink() for p in f.glob("*.pth")], r"no consolidated\.00\.pth in it"),
    "no params.json": (lambda f: (f / "params.json").unlink(), r"no params\.json in it"),
    "another vocabulary": (configure(vocab_size=700), "vocab_size is 700, and the weights have 800 rows"),
    "params.json without end": (lambda f: os.truncate(f / "params.json", 2**30), r"1,073,741,824 bytes, which no"),
    "params.json that is none": (lambda f: (f / "params.json").write_text("[]"), r"not LLaMA's params\.json"),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), r"no tokenizer\.model in it"),
    "another tokenizer": (use_other_tokenizer, "has 801 pieces and the weights have 800 rows"),
    "a shard cut short": (cut(ONE, 0.5), rf"{ONE}: not a PyTorch checkpoint, or cut short"),
    "an empty shard": (cut(ONE, 0), rf"{ONE}: not a checkpoint in PyTorch's zip format"),
    "a shard that is no dictionary": (
        lambda f: torch.save([torch.zeros(3)], f / ONE),
        f"{ONE}: not a dictionary of tensors",
    ),
    "a tensor lost": (change(ONE, lambda t: t.pop("layers.1.attention.wo.weight")), rf"{ONE}: no tensor layers\.1"),
    "a tensor too many": (configure(n_layers=1), r"layers\.1.* is none of a LLaMA model with 1 layers"),
    "a layer too few": (configure(n_layers=3), r"no tensor layers\.2.*, where params\.json says 3 layers"),
    "another width": (configure(dim=128), r"tensor tok_embeddings\.weight is float16 \(800, 32\) where .* is expected"),
    "another dtype": (
        change(ONE, lambda t: t.update({"output.weight": t["output.weight"].float()})),
        rf"{ONE}: tensor output\.weight is float32",
    ),
    "a shard of another model": (
        change(ONE, lambda t: t["norm.weight"].add_(1)),
        rf"{ONE}: norm\.weight differs from the copy in consolidated\.00\.pth",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_weights_that_are_no_model_are_named_and_nothing_is_published(tmp_path, weights, name):
    spoil, message = BAD[name]
    spoil(weights)
    with pytest.raises(InputError, match=message):
        convert(tmp_path / "store", weights)
    assert not list((tmp_path / "store").rglob("manifest.json"))


def test_a_shard_that_changed_in_the_store_is_found(tmp_path, tiny_meta):
    out = ArtifactWriter(str(tmp_path), "fetch_weights", "tiny")
    add_folder(out, tiny_meta)
    manifest = out.publish("meta-weights")
    path = Path(manifest.root) / "consolidated.01.pth"
    content = bytearray(path.read_bytes())
    content[-5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"consolidated\.01\.pth: bytes 0 to .*expected, .* found"):
        convert(tmp_path / "store", manifest.reference)


def test_room_is_asked_for_before_anything_is_written(tmp_path, tiny_meta, full_disk):
    with pytest.raises(InputError, match=r"--store .* will be needed and 1\.0 kB are free"):
        convert(tmp_path / "store", tiny_meta)
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []
