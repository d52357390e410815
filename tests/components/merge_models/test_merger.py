"""Merging models: plain torch's arithmetic to the bit, tensor by tensor; rows that one model alone has are its own;
what does not fit is refused before a weight is read."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.merge_models.merger import merge_models
from components.merge_models.options import MergeModels
from tests.packed_data import quantise
from tests.small_models import KINDS, model_of, save
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.open import open_artifact
from zhllama.errors import InputError
from zhllama.stage.run import run_stage
from zhllama.tokenizer.prompt import RECIPE
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from zhllama.tokenizer.sentencepiece_model import parse_model
from zhllama.weights import stream
from zhllama.weights.chat_template import default_of, template_in

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WEIGHTS = {"weight": 0.5, "embeddings": 0.2, "attention": 0.3, "feed_forward": 0.6}
MORE = 5
"""Pieces that an extended vocabulary has more."""
Tensors = dict[str, torch.Tensor]


def weight_of(name: str, weights: dict[str, float] = WEIGHTS) -> float:
    """A tensor's, as the options' help says it."""
    found = {"embed_tokens": "embeddings", "lm_head": "embeddings", "self_attn": "attention", "mlp": "feed_forward"}
    return next((weights[group] for part, group in found.items() if part in name), weights["weight"])


def tensors_of(folder: Path | str) -> Tensors:
    return {
        name: tensor for path in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(path).items()
    }


def merge(store: Path | str, model: Path, other: Path, base: Path | None = None, **options: Any) -> Manifest:
    named = {"model": str(model), "other": str(other), "base": str(base or "")}
    return run_stage(MergeModels(store=str(store), **named, **options), merge_models)


def refused(store: Path, match: str, model: Path, other: Path, base: Path | None = None, **options: Any) -> None:
    with pytest.raises(InputError, match=match):
        merge(store, model, other, base, **options)
    assert not list(store.rglob("*.safetensors"))


@pytest.fixture(scope="session")
def extended_tokenizer(llama_tokenizer: bytes) -> bytes:
    proto = parse_model(llama_tokenizer)
    for index, piece in enumerate("甲乙丙丁戊"[:MORE]):
        proto.pieces.add(piece=piece, score=-40_000.0 - index)
    return bytes(proto.SerializeToString())


@pytest.fixture(scope="session")
def relative(tmp_path_factory: pytest.TempPathFactory, tiny_model: str) -> Callable[..., Path]:
    """`relative(seed, dtype, rows, tokenizer)` → the tiny model as a plain folder, every tensor some way off."""
    tiny = Path(tiny_model).parent

    def make(seed: int, dtype: torch.dtype = torch.float16, rows: int = 0, tokenizer: bytes = b"") -> Path:
        folder = tmp_path_factory.mktemp("relative") / "model"
        shutil.copytree(
            tiny, folder, ignore=shutil.ignore_patterns("manifest.json", "provenance.json", ".*", "blocks*")
        )
        chance = torch.Generator().manual_seed(seed)
        for path in folder.glob("*.safetensors"):
            tensors = load_file(path)
            for name, tensor in tensors.items():
                if rows and name in (EMBEDDING, HEAD):
                    tensor = torch.cat([tensor, torch.zeros(rows - len(tensor), tensor.shape[1])]).to(tensor.dtype)
                far = torch.randn(tensor.shape, generator=chance) * 0.05
                tensors[name] = (tensor.float() + far).to(dtype)
            save_file(tensors, path, metadata={"format": "pt"})
        change(folder, **({"vocab_size": rows} if rows else {}))
        if tokenizer:
            for name, content in SentencePieceEncoder(tokenizer).files(256).items():
                (folder / name).write_bytes(content)
        return folder

    return make


@pytest.fixture(scope="session")
def two(relative) -> tuple[Path, Path]:
    return relative(1), relative(2)


@pytest.fixture(scope="session")
def adapted(relative, extended_tokenizer) -> Path:
    return relative(3, rows=800 + MORE, tokenizer=extended_tokenizer)


def change(folder: Path, file: str = "config.json", **changes: Any) -> Path:
    said = json.loads((folder / file).read_text("utf-8"))
    (folder / file).write_text(json.dumps({key: v for key, v in (said | changes).items() if v is not ...}))
    return folder


@pytest.fixture
def copy_of(tmp_path) -> Callable[..., Path]:
    def copy(folder: Path, **changes: Any) -> Path:
        return change(shutil.copytree(folder, tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"), **changes)

    return copy


# --- the arithmetic ---------------------------------------------------------------------------------------------------


def linear(a: torch.Tensor, b: torch.Tensor, weight: float) -> torch.Tensor:
    return ((1 - weight) * a.float() + weight * b.float()).to(a.dtype)


def slerp(a: torch.Tensor, b: torch.Tensor, weight: float) -> torch.Tensor:
    """Shoemake's, of whole tensors as vectors."""
    one, two = a.double().flatten(), b.double().flatten()
    lengths = [1.0 if length <= 1e-8 else length for length in (float(one.norm()), float(two.norm()))]
    cosine = float(one @ two) / lengths[0] / lengths[1]
    if abs(cosine) > 0.9995:
        return linear(a, b, weight)
    angle = math.acos(cosine)
    shares = math.sin((1 - weight) * angle) / math.sin(angle), math.sin(weight * angle) / math.sin(angle)
    return (shares[0] * a.float() + shares[1] * b.float()).to(a.dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("method", ["linear", "slerp", "chat-vector"])
def test_the_bits_are_plain_torchs(tmp_path, relative, method, dtype):
    folders = [relative(seed, dtype) for seed in (1, 2, 3)]
    given = folders if method == "chat-vector" else folders[:2]
    found = tensors_of(merge(tmp_path, *given, method=method, **WEIGHTS).root)
    a, b, c = map(tensors_of, folders)
    for name, tensor in found.items():
        weight = weight_of(name)
        if method == "chat-vector":
            wanted = (a[name].float() + weight * (b[name].float() - c[name].float())).to(dtype)
        else:
            wanted = (linear if method == "linear" else slerp)(a[name], b[name], weight)
        assert tensor.dtype == dtype
        assert torch.equal(tensor, wanted), name
        assert not torch.equal(tensor, a[name]), name
    assert found.keys() == a.keys()


def test_a_model_of_another_precision_is_rounded_once_to_the_first_ones(tmp_path, relative):
    half, whole = relative(1, torch.bfloat16), relative(2, torch.float32)
    a, b = tensors_of(half), tensors_of(whole)
    found = tensors_of(merge(tmp_path, half, whole, weight=0.3).root)
    assert all(torch.equal(tensor, linear(a[name], b[name], 0.3)) for name, tensor in found.items())
    double = relative(3, torch.float64)
    c = tensors_of(double)
    found = tensors_of(merge(tmp_path, half, double, weight=0.3).root)
    wanted = {name: (0.7 * a[name].double() + 0.3 * c[name]).bfloat16() for name in a}
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_the_ends_are_the_models_themselves(tmp_path, two, method):
    a, b = map(tensors_of, two)
    found = tensors_of(merge(tmp_path, *two, method=method, weight=1, attention=0).root)
    for name, tensor in found.items():
        kept = a if "self_attn" in name else b
        assert torch.equal(tensor.view(torch.int16), kept[name].view(torch.int16)), name


def test_slerp_goes_along_the_arc_but_between_parallels(tmp_path, relative, copy_of):
    """Between vectors of one length what is between has that length too; those with one line, or none, go straight."""
    model = relative(1, torch.float32)
    other = copy_of(model)
    a = tensors_of(model)
    names = list(a)
    turned, same, against, nothing = names[:4]
    b = a | {turned: a[turned].flip(0), same: a[same] * 2, against: -a[against], nothing: torch.zeros_like(a[nothing])}
    for path in other.glob("*.safetensors"):
        save_file({name: b[name].contiguous() for name in load_file(path)}, path)
    found = tensors_of(merge(tmp_path / "store", model, other, method="slerp", weight=0.3).root)
    assert float(found[turned].norm()) == pytest.approx(float(a[turned].norm()), rel=1e-5)
    assert torch.equal(found[same], linear(a[same], b[same], 0.3))
    assert torch.equal(found[against], linear(a[against], b[against], 0.3))
    assert torch.equal(found[nothing], slerp(a[nothing], b[nothing], 0.3))


def test_a_chat_vector_added_whole_makes_the_base_the_instruct_model(tmp_path, relative):
    base, instruct = relative(1, torch.float64), relative(2, torch.float64)
    found, wanted = tensors_of(merge(tmp_path, base, instruct, base, method="chat-vector").root), tensors_of(instruct)
    assert all(torch.allclose(tensor, wanted[name], rtol=0, atol=1e-15) for name, tensor in found.items())


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_merges_and_is_loaded_by_transformers(tmp_path, kind, llama_tokenizer):
    from transformers import AutoModelForCausalLM

    model, other = (save(tmp_path / name, kind, llama_tokenizer) for name in ("model", "other"))
    for path in other.glob("*.safetensors"):
        save_file({name: tensor + 0.25 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    manifest = merge(tmp_path / "store", model, other, **WEIGHTS)
    a, b, found = tensors_of(model), tensors_of(other), tensors_of(manifest.root)
    assert found.keys() == a.keys()
    assert all(torch.equal(tensor, linear(a[name], b[name], weight_of(name))) for name, tensor in found.items())
    loaded = AutoModelForCausalLM.from_pretrained(manifest.root)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in found.items())
    tied = bool(KINDS[kind][1].get("tie_word_embeddings"))
    assert (loaded.config.tie_word_embeddings, HEAD not in found) == (tied, tied)
    assert manifest.vocabulary is not None
    assert manifest.vocabulary.tied is tied


def test_parts_of_a_tensor_have_the_bits_of_the_whole(tmp_path, two, adapted, monkeypatch):
    def digests(store: Path) -> list[str]:
        made = [merge(store, adapted, *two, method="chat-vector"), merge(store, two[0], adapted, method="slerp")]
        return [one.facts["weights_digest"] for one in made]

    whole = digests(tmp_path / "whole")
    monkeypatch.setattr(stream, "SPAN", 192 * 64)
    monkeypatch.setattr(stream, "TILE", 64 * 64)
    assert digests(tmp_path / "parts") == whole


def test_memory_does_not_grow_with_the_number_of_spans(tmp_path, two, adapted, pools):
    merge(tmp_path, adapted, *two, method="chat-vector")
    spans, tiles = (len(pool._free) for pool in pools)
    # of one model for each span that waits or is written, of three for each that is merged
    assert 0 < spans <= 3 * (stream.MOST_THREADS + 3)
    assert 0 < tiles <= stream.MOST_THREADS


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "slerp"])
@pytest.mark.parametrize("first", ["extended", "plain"])
def test_rows_that_one_alone_has_are_its_own(tmp_path, two, adapted, first, method):
    pair = (adapted, two[0]) if first == "extended" else (two[0], adapted)
    manifest = merge(tmp_path, *pair, method=method, weight=0.3)
    found, a, b = map(tensors_of, (manifest.root, *pair))
    between = linear if method == "linear" else slerp
    for name in (EMBEDDING, HEAD):
        assert torch.equal(found[name][:800], between(a[name][:800], b[name][:800], 0.3))
        assert torch.equal(found[name][800:], tensors_of(adapted)[name][800:])
    assert manifest.vocabulary is not None
    assert (manifest.vocabulary.size, manifest.vocabulary.rows) == (800 + MORE, 800 + MORE)
    assert json.loads(Path(manifest.root, "config.json").read_text("utf-8"))["vocab_size"] == 800 + MORE
    for name in ("tokenizer.model", "tokenizer.json"):
        assert (Path(manifest.root) / name).read_bytes() == (adapted / name).read_bytes()
    report = json.loads(Path(manifest.root, "report.json").read_text("utf-8"))["changed"]
    assert report[EMBEDDING].get("new_rows") == (None if first == "extended" else MORE)
    before, after = a[EMBEDDING].double(), found[EMBEDDING][: len(a[EMBEDDING])].double()
    wanted = float((after - before).norm() / before.norm())
    assert report[EMBEDDING]["relative_change"] == pytest.approx(wanted, rel=1e-4)


def test_a_chat_vector_leaves_the_rows_that_only_the_adapted_model_has(tmp_path, store, two, adapted):
    manifest = merge(store, adapted, *two, method="chat-vector", weight=0.7)
    made = tmp_path / "made"
    made.mkdir()
    artifact = open_artifact(manifest.reference)
    for name in artifact.names:
        if name.endswith(".safetensors"):
            (made / name).write_bytes(artifact.read(name))
    found, a, b, c = map(tensors_of, (made, adapted, *two))
    for name in (EMBEDDING, HEAD):
        moved = (a[name][:800].float() + 0.7 * (b[name].float() - c[name].float())).half()
        assert torch.equal(found[name], torch.cat([moved, a[name][800:]]))


def test_a_chat_vector_of_a_model_with_more_tokens_than_its_base_brings_their_rows(tmp_path, two, adapted):
    model, base = two
    manifest = merge(tmp_path, model, adapted, base, method="chat-vector")
    found, a, b, c = map(tensors_of, (manifest.root, model, adapted, base))
    moved = (a[HEAD].float() + (b[HEAD][:800].float() - c[HEAD].float())).half()
    assert torch.equal(found[HEAD], torch.cat([moved, b[HEAD][800:]]))
    # and where both have them, and the base has not, there is no difference to add
    both = tensors_of(merge(tmp_path, adapted, adapted, base, method="chat-vector").root)
    assert torch.equal(both[HEAD][800:], b[HEAD][800:])


def test_padding_rows_are_no_rows_of_pieces(tmp_path, relative, adapted):
    padded = relative(5, rows=832)
    manifest = merge(tmp_path, padded, adapted, weight=0.5)
    found, a, b = map(tensors_of, (manifest.root, padded, adapted))
    assert found[HEAD].shape[0] == 800 + MORE
    assert torch.equal(found[HEAD][800:], b[HEAD][800:])
    assert torch.equal(found[HEAD][:800], linear(a[HEAD][:800], b[HEAD][:800], 0.5))
    manifest = merge(tmp_path, padded, relative(6), weight=0.5)
    assert torch.equal(tensors_of(manifest.root)[HEAD][800:], a[HEAD][800:])
    assert manifest.vocabulary is not None
    assert (manifest.vocabulary.size, manifest.vocabulary.rows) == (800, 832)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_models_of_another_shape_or_arithmetic_are_refused_by_name(tmp_path, two, copy_of, llama_tokenizer):
    model, store = two[0], tmp_path / "store"
    qwen = save(tmp_path / "qwen", "qwen3", llama_tokenizer)
    refused(store, r"--other \S+: model_type is qwen3 where --model \S+ has llama; give models of one", model, qwen)
    other = copy_of(two[1], num_attention_heads=8, num_key_value_heads=8, head_dim=8)
    refused(store, r"num_attention_heads is 8 where --model \S+ has 4", model, other)
    refused(store, r"rms_norm_eps is 0.5 where", model, copy_of(two[1], rms_norm_eps=0.5))
    stretched = copy_of(two[1], rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4})
    refused(store, r"rope_scaling is \{'type': 'linear'.* where", model, stretched)
    layers = copy_of(two[1], num_hidden_layers=1)
    for path in layers.glob("*.safetensors"):
        kept = {name: tensor for name, tensor in load_file(path).items() if "layers.1" not in name}
        save_file(kept, path)
    (layers / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {name: p.name for p in layers.glob("*.safetensors") for name in load_file(p)}})
    )
    refused(store, r"num_hidden_layers is 1 where --model \S+ has 2", model, layers)
    refused(store, r"--base \S+: model_type is qwen3", model, two[1], qwen, method="chat-vector")


def test_a_tied_model_and_one_with_two_tables_are_refused(tmp_path, tied_model, two):
    refused(tmp_path, r"tie_word_embeddings is True where --model \S+ has False", two[0], Path(tied_model))


def test_quantised_models_are_refused(tmp_path, two, copy_of):
    quantised = copy_of(two[1])
    quantise(quantised)
    refused(tmp_path / "store", r"--other \S+: .*quantis", two[0], quantised)


def test_foreign_vocabularies_are_refused(tmp_path, relative, two, llama_tokenizer):
    proto = parse_model(llama_tokenizer)
    proto.pieces[700].piece = "別"
    foreign = relative(4, tokenizer=bytes(proto.SerializeToString()))
    refused(tmp_path, r"--other \S+ has 800 pieces \(\w+\), foreign to the 800 pieces", two[0], foreign)
    refused(tmp_path, r"--base \S+ has 800 pieces", *two, foreign, method="chat-vector")


def test_without_tokenizers_the_rows_must_be_as_many(tmp_path, two, adapted, copy_of):
    plain, longer = copy_of(two[0]), copy_of(adapted)
    for folder in (plain, longer):
        for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink(missing_ok=True)
    refused(tmp_path / "store", r"no tokenizer in it, and .* has 805 rows where .* has 800; give each", two[0], longer)
    manifest = merge(tmp_path / "store", plain, two[1])
    assert (Path(manifest.root) / "tokenizer.model").read_bytes() == (two[1] / "tokenizer.model").read_bytes()
    neither = merge(tmp_path / "store", plain, plain_of(two[1], tmp_path))
    assert neither.vocabulary is None
    assert neither.facts["weights_digest"] == manifest.facts["weights_digest"]


def plain_of(folder: Path, place: Path) -> Path:
    return shutil.copytree(folder, place / "plain", ignore=shutil.ignore_patterns("tokenizer*"))


def test_the_same_model_twice_is_refused(tmp_path, two):
    with pytest.raises(InputError, match=r"--other \S+: merging changes no weight of .*; they are the same"):
        merge(tmp_path, two[0], two[0])
    assert not list(tmp_path.rglob("manifest.json"))


def test_numbers_that_are_none_are_refused(tmp_path, two, copy_of):
    broken = copy_of(two[1])
    path = sorted(broken.glob("*.safetensors"))[-1]
    tensors = load_file(path)
    name = next(iter(tensors))
    tensors[name].view(-1)[3] = math.nan
    save_file(tensors, path)
    with pytest.raises(InputError, match=rf"--other: {name} is not finite after the merge"):
        merge(tmp_path / "store", two[0], broken)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weight": 1.2}, r"--weight 1.2: give a number from 0 to 1"),
        ({"weight": math.nan}, r"--weight nan: give a number"),
        ({"feed_forward": -0.1}, r"--feed-forward -0.1: give a number from 0 to 1"),
        ({"weight": 0}, r"--weight 0: every weight is 0"),
        ({"method": "chat-vector"}, r"give --base too"),
        ({"method": "chat-vector", "base": "b", "weight": math.inf}, r"--weight inf: give a number"),
        ({"base": "b"}, r"--base: --method linear merges two models"),
    ],
)
def test_options_that_say_nothing_are_refused(tmp_path, options, match):
    with pytest.raises(InputError, match=match):
        MergeModels(store=str(tmp_path), model="m", other="o", **options)


# --- what is published ------------------------------------------------------------------------------------------------


def test_files_in_which_nothing_changes_are_copied(tmp_path, two):
    manifest = merge(tmp_path, *two, weight=0.5, embeddings=0)
    before = {file.path: file.sha256 for file in open_artifact(str(two[0])).manifest.files}
    after = {file.path: file.sha256 for file in manifest.files}
    tables = "model-00001-of-00002.safetensors"
    assert set(load_file(two[0] / tables)) == {EMBEDDING, HEAD}
    assert (Path(manifest.root) / tables).read_bytes() == (two[0] / tables).read_bytes()
    assert before.keys() - {"tokenizer.json"} <= after.keys() | {"generation_config.json"}


def test_manifest_card_and_report_say_what_was_done(tmp_path, two):
    manifest = merge(tmp_path, *two, method="slerp", **WEIGHTS)
    wanted = {"norms": 0.5, "embeddings": 0.2, "attention": 0.3, "feed_forward": 0.6}
    assert (manifest.kind, manifest.facts["method"], manifest.facts["weights"]) == ("hf-model", "slerp", wanted)
    assert set(manifest.inputs) == {"model", "other"}
    assert manifest.facts["changed_tensors"] == len(tensors_of(two[0]))
    report = json.loads(Path(manifest.root, "report.json").read_text("utf-8"))
    assert (report["weights"], report["unchanged"]) == (wanted, 0)
    card = Path(manifest.root, "README.md").read_text("utf-8")
    assert "A LLaMA model between two, by spherical interpolation (SLERP)." in card
    assert "Weights of the other: norms 0.5, embeddings 0.2, attention 0.3, feed-forward 0.6" in card


def test_an_instruct_model_says_how_the_result_is_asked(tmp_path, two, adapted, copy_of):
    instruct = copy_of(two[0])
    change(instruct, "tokenizer_config.json", chat_template="{{ messages[0]['content'] }}")
    (instruct / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))

    def asked(manifest: Manifest) -> tuple[str, str]:
        said = json.loads(Path(manifest.root, "tokenizer_config.json").read_text("utf-8"))
        return said["chat_template"], manifest.facts["chat_template"]

    chat = merge(tmp_path / "store", adapted, instruct, two[1], method="chat-vector")
    assert asked(chat) == ("{{ messages[0]['content'] }}", "the other model's own")
    assert json.loads(Path(chat.root, "generation_config.json").read_text("utf-8"))["temperature"] == 0.6
    silent = change(copy_of(two[1]), "tokenizer_config.json", chat_template=...)
    assert asked(merge(tmp_path / "store", silent, instruct)) == asked(chat)
    assert asked(merge(tmp_path / "store", instruct, silent)) == ("{{ messages[0]['content'] }}", "the model's own")
    neither = merge(tmp_path / "store", silent, adapted)
    assert asked(neither)[0] == RECIPE.template


def test_the_same_pieces_with_another_end_are_one_vocabulary(tmp_path, byte_level_files):
    """A base ends with <|endoftext|>, its instruct model with <|im_end|>: the result stops at either."""
    model = model_of("qwen2", vocab_size=1600, num_hidden_layers=1).half()

    def folder(name: str, far: float, **said: Any) -> Path:
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(far)
        model.save_pretrained(tmp_path / name)
        for file, content in byte_level_files["qwen"].items():
            (tmp_path / name / file).write_bytes(content)
        return change(tmp_path / name, "tokenizer_config.json", **said)

    plain = {"eos_token": "<|endoftext|>", "chat_template": ...}
    base, adapted, instruct = folder("base", 0, **plain), folder("adapted", 0.1, **plain), folder("instruct", 0.2)
    manifest = merge(tmp_path / "store", adapted, instruct, base, method="chat-vector")
    ids = json.loads((base / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    known = {one["content"]: one["id"] for one in ids}
    ends = json.loads(Path(manifest.root, "generation_config.json").read_text("utf-8"))["eos_token_id"]
    assert set(ends) == {known["<|endoftext|>"], known["<|im_end|>"]}
    said = json.loads(Path(manifest.root, "tokenizer_config.json").read_text("utf-8"))
    assert (said["eos_token"], said["chat_template"]) == (
        "<|endoftext|>",
        default_of(template_in(open_artifact(str(instruct)), "")),
    )
