"""Merging: peft's result to the bit, streamed; what does not fit is refused before a weight is read."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from components.merge_adapters import proof
from components.merge_adapters.merger import merge_adapters
from components.merge_adapters.options import MergeAdapters
from tests.folders import add_folder
from tests.loaded_model import load_model
from tests.packed_data import quantise
from zhllama import storage
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.stage.run import run_stage
from zhllama.tokenizer.prompt import RECIPE
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from zhllama.tokenizer.vocabulary import load_encoder
from zhllama.weights import stream
from zhllama.weights.adapter import Adapter
from zhllama.weights.safetensors_io import Checkpoint

MODULES = ["embed_tokens", "lm_head"]
DOWN = "model.layers.0.mlp.down_proj.weight"


def merge(store: str | Path, model: str | Path, *adapters: str | Path, prove: bool = False) -> Manifest:
    options = MergeAdapters(store=str(store), model=str(model), adapters=",".join(map(str, adapters)), prove=prove)
    return run_stage(options, merge_adapters)


def tensors_of(manifest: Manifest) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(open_artifact(manifest.reference))
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype == torch.float16
        assert torch.equal(found[name], tensor), name


# --- the arithmetic is peft's -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"modules_to_save": MODULES},
        {"lora_alpha": 20},
        {"lora_alpha": 2},
        {"use_rslora": True, "r": 4},
        {"rank_pattern": {"q_proj": 4, "layers.1.mlp.down_proj": 2}, "alpha_pattern": {"up_proj": 3}},
        {"target_modules": ["q_proj", "v_proj", "embed_tokens"]},
        {"trainable_token_indices": [799, 3, 500]},
        {"trainable_token_indices": {"embed_tokens": [5, 6], "lm_head": [799, 7]}},
        {"target_modules": "all-linear"},
        {"target_modules": r".*layers\.1\..*(?:q|v)_proj"},
        {"layers_to_transform": [1], "exclude_modules": ["up_proj"], "modules_to_save": ["input_layernorm", "norm"]},
        {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    ],
    ids=[
        "projections",
        "modules-to-save",
        "scaled-by-2.5",
        "scaled-by-a-quarter",
        "rank-stabilised",
        "patterns",
        "embedding",
        "tokens",
        "tokens-by-module",
        "all-linear",
        "expression",
        "one-layer-and-norms",
        "orthogonal",
    ],
)
def test_one_adapter_merges_as_peft_merges_it(tmp_path, tiny_model, make_adapter, merged_by_peft, options):
    adapter = make_adapter(1, **options)
    assert_same(tensors_of(merge(tmp_path, tiny_model, adapter)), merged_by_peft([adapter]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_a_model_of_another_dtype_merges_as_peft_merges_it(tmp_path, tiny_folder, make_adapter, dtype):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = make_adapter(1, modules_to_save=MODULES)
    model = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=dtype).save_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    wanted = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    found = tensors_of(merge(tmp_path / "store", model, adapter))
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_two_adapters_of_a_growing_vocabulary_merge_as_peft_merges_them(
    store, tiny_model, make_adapter, merged_by_peft, llama_tokenizer, longer_tokenizer
):
    first = make_adapter(1, tokenizer=llama_tokenizer, modules_to_save=MODULES)
    second = make_adapter(2, rows=801, tokenizer=longer_tokenizer, modules_to_save=MODULES, r=16)
    manifest = merge(store, tiny_model, first, second)
    assert_same(tensors_of(manifest), merged_by_peft([first, second], [None, 801]))
    assert manifest.vocabulary is not None
    assert (manifest.vocabulary.size, manifest.vocabulary.pad, manifest.vocabulary.dtype) == (801, 800, "float16")
    artifact = open_artifact(manifest.reference)
    assert load_encoder(artifact, "").size == 801
    assert json.loads(artifact.read("config.json"))["vocab_size"] == 801


def test_merging_one_by_one_gives_the_weights_of_one_call(tmp_path, tiny_model, make_adapter):
    first, second = make_adapter(1), make_adapter(2, modules_to_save=MODULES)
    together = merge(tmp_path, tiny_model, first, second)
    apart = merge(tmp_path, merge(tmp_path, tiny_model, first).reference, second)
    assert together.facts["weights_digest"] == apart.facts["weights_digest"]
    assert together.facts["lineage"] == apart.facts["lineage"]
    reverse = merge(tmp_path, tiny_model, second, first)
    assert reverse.facts["weights_digest"] != together.facts["weights_digest"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"modules_to_save": MODULES},
        {"target_modules": ["embed_tokens"]},
        {"trainable_token_indices": [799, 63, 64, 5]},
    ],
    ids=["projections", "modules-to-save", "embedding", "tokens"],
)
def test_parts_of_a_tensor_have_the_bits_of_the_whole(tmp_path, tiny_model, make_adapter, monkeypatch, options):
    adapter = make_adapter(1, **options)
    whole = merge(tmp_path / "whole", tiny_model, adapter)
    monkeypatch.setattr(stream, "SPAN", 192 * 64)
    monkeypatch.setattr(stream, "TILE", 64 * 64)
    by_parts = merge(tmp_path / "parts", tiny_model, adapter)
    assert by_parts.facts["weights_digest"] == whole.facts["weights_digest"]


def test_memory_does_not_grow_with_the_number_of_spans(tmp_path, tiny_model, make_adapter, pools):
    merge(tmp_path, tiny_model, make_adapter(1, modules_to_save=MODULES))
    spans, tiles = (len(pool._free) for pool in pools)
    # of the model and of the adapter for each span that is merged, waits or is written
    assert 0 < spans <= 2 * (stream.MOST_THREADS + 3)
    assert 0 < tiles <= stream.MOST_THREADS


@given(st.integers(0, 300), st.integers(1, 1000), st.integers(1, 5000))
def test_parts_cover_every_row_once_and_none_is_small(begin, rows, width):
    parts = stream.parts(begin, begin + rows, (begin + rows, width), stream.TILE)
    assert [row for first, last in parts for row in range(first, last)] == list(range(begin, begin + rows))
    assert min(last - first for first, last in parts) >= min(rows, stream.FEWEST_ROWS)


def test_a_pickled_adapter_merges_as_its_safetensors_do(tmp_path, tiny_model, make_adapter):
    adapter = make_adapter(1, modules_to_save=MODULES)
    wanted = merge(tmp_path, tiny_model, adapter).facts["weights_digest"]
    for name, legacy in (("zip", False), ("legacy", True)):
        pickled = shutil.copytree(adapter, tmp_path / name)
        tensors = load_file(pickled / "adapter_model.safetensors")
        (pickled / "adapter_model.safetensors").unlink()
        torch.save(tensors, pickled / "adapter_model.bin", _use_new_zipfile_serialization=not legacy)
        assert merge(tmp_path, tiny_model, pickled).facts["weights_digest"] == wanted


def test_fan_in_fan_out_is_put_aside_for_linear_layers_as_peft_does(tmp_path, tiny_model, make_adapter, merged_by_peft):
    adapter = shutil.copytree(make_adapter(1, target_modules=["q_proj"], r=4, lora_alpha=2), tmp_path / "adapter")
    change_config(adapter, fan_in_fan_out=True)
    assert_same(tensors_of(merge(tmp_path, tiny_model, adapter)), merged_by_peft([adapter]))


SPELLINGS = {
    "without a prefix": lambda key: key.removeprefix("base_model.model."),
    "compiled": lambda key: f"_orig_mod.{key}",
    "older peft": lambda key: key.replace("lora_A", "lora_A.default").replace(
        "embed_tokens", "embed_tokens.modules_to_save"
    ),
    "sharded": lambda key: key.replace("self_attn", "_fsdp_wrapped_module.self_attn"),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_tensors_are_the_same_whatever_a_trainer_called_them(tmp_path, tiny_model, make_adapter, name):
    adapter = shutil.copytree(make_adapter(1, modules_to_save=MODULES), tmp_path / "adapter")
    wanted = merge(tmp_path / "store", tiny_model, adapter).facts["weights_digest"]
    change_tensors(adapter, lambda tensors: {SPELLINGS[name](key): tensor for key, tensor in tensors.items()})
    assert merge(tmp_path / "store", tiny_model, adapter, prove=True).facts["weights_digest"] == wanted


def test_a_pissa_adapter_is_refused_since_peft_changes_its_base(tmp_path, tiny_model, make_adapter):
    adapter = make_adapter(1, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa")
    with pytest.raises(InputError, match=r"sets init_lora_weights='pissa' \(it changes the base"):
        merge(tmp_path, tiny_model, adapter)


# --- what is written --------------------------------------------------------------------------------------------------


def test_the_embeddings_are_copied_when_no_adapter_touches_them(store, tiny_model, make_adapter):
    manifest = merge(store, tiny_model, make_adapter(1))
    before = {file.path: file.sha256 for file in open_artifact(tiny_model).manifest.files}
    after = {file.path: file.sha256 for file in manifest.files}
    assert after["model-00001-of-00002.safetensors"] == before["model-00001-of-00002.safetensors"]
    assert after["model-00002-of-00002.safetensors"] != before["model-00002-of-00002.safetensors"]


def test_the_report_names_every_changed_tensor_and_its_size(tmp_path, tiny_model, make_adapter, tiny_state):
    manifest = merge(tmp_path, tiny_model, make_adapter(1, target_modules=["down_proj"]))
    report = json.loads(open_artifact(manifest.reference).read("report.json"))
    assert set(report["changed"]) == {DOWN, DOWN.replace("layers.0", "layers.1")}
    assert report["unchanged"] == len(tiny_state) - 2
    before, after = tiny_state[DOWN].double(), tensors_of(manifest)[DOWN].double()
    wanted = float((after - before).norm() / before.norm())
    assert report["changed"][DOWN]["relative_change"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
def test_transformers_and_the_command_agree(tmp_path, tiny_folder, make_adapter, merged_by_peft):
    from transformers import AutoModelForCausalLM

    adapter = make_adapter(1)
    command = [sys.executable, "-m", "components.merge_adapters", "--store", str(tmp_path), "--model", str(tiny_folder)]
    command += [
        "--adapters",
        str(adapter),
        "--reference",
        str(tmp_path / "ref"),
        "--executor-output",
        str(tmp_path / "kfp"),
    ]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    folder = Path((tmp_path / "ref").read_text()).parent
    assert_same(dict(AutoModelForCausalLM.from_pretrained(folder).state_dict()), merged_by_peft([adapter]))
    metrics = json.loads((tmp_path / "kfp").read_text())["artifacts"]["metrics"]["artifacts"][0]["metadata"]
    assert metrics["changed_tensors"] == 14


# --- proof ------------------------------------------------------------------------------------------------------------


def test_the_merged_model_answers_as_the_model_with_its_adapters(
    store, tiny_model, make_adapter, llama_tokenizer, longer_tokenizer
):
    first = make_adapter(1, tokenizer=llama_tokenizer, modules_to_save=MODULES)
    second = make_adapter(2, rows=801, tokenizer=longer_tokenizer, modules_to_save=MODULES)
    manifest = merge(store, tiny_model, first, second, prove=True)
    found = json.loads(open_artifact(manifest.reference).read("report.json"))["proof"]
    assert found["positions"] > 50
    assert found["relative_difference"] < 0.002
    assert found["same_next_token"] > 0.95


def test_a_merge_that_is_wrong_does_not_prove(tmp_path, tiny_model, make_adapter, monkeypatch):
    update = Adapter._update

    def wrong(adapter, weight, parts):
        return update(adapter, weight, parts)._replace(**({"scale": 99.0} if weight == DOWN else {}))

    monkeypatch.setattr(Adapter, "_update", wrong)
    with pytest.raises(InputError, match=rf"the merged model is not the model with its adapters.* most {DOWN}, by \d"):
        merge(tmp_path, tiny_model, make_adapter(1), prove=True)
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_proof_that_does_not_fit_the_memory_is_refused_before_a_weight_is_read(
    tmp_path, tiny_model, make_adapter, monkeypatch
):
    monkeypatch.setattr(proof, "available_memory", lambda: 10**6)
    with pytest.raises(InputError, match=r"--prove: the model needs 1\.3 MB of memory .* 1\.0 MB are free"):
        merge(tmp_path, tiny_model, make_adapter(1), prove=True)
    assert not list(tmp_path.rglob("*.safetensors"))


# --- killed, and started again ----------------------------------------------------------------------------------------


@pytest.fixture
def six_files(tmp_path, tiny_folder) -> Path:
    """The tiny model in six files, each with some of its tensors."""
    checkpoint = Checkpoint(open_artifact(str(tiny_folder)))
    names = sorted(checkpoint.tensors)
    folder = tmp_path / "six"
    folder.mkdir()
    shutil.copy(tiny_folder / "config.json", folder)
    where = {}
    for index in range(6):
        part = {name: checkpoint.read(name) for name in names[index::6]}
        save_file(part, folder / f"model-{index}.safetensors")
        where |= dict.fromkeys(part, f"model-{index}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


@pytest.mark.slow
def test_a_killed_merge_goes_on_with_the_file_it_was_killed_in(tmp_path, store, six_files, make_adapter, monkeypatch):
    adapter = make_adapter(1)
    program = (
        "import os, signal, sys, time\n"
        "from components.merge_adapters.merger import merge_adapters\n"
        "from components.merge_adapters.options import MergeAdapters\n"
        "from zhllama import storage\n"
        "from zhllama.artifacts.writer import ArtifactWriter\n"
        "from zhllama.stage.run import run_stage\n"
        "whole = ArtifactWriter.writer\n"
        "def killed_in_the_fourth(out, name):\n"
        "    if name == 'model-3.safetensors':\n"
        "        while not storage.exists(f'{out.root}/.kept/model-2.safetensors.json'):\n"
        "            time.sleep(0.01)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return whole(out, name)\n"
        "ArtifactWriter.writer = killed_in_the_fourth\n"
        "run_stage(MergeAdapters(store=sys.argv[1], model=sys.argv[2], adapters=sys.argv[3]), merge_adapters)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, store, six_files, adapter], capture_output=True, text=True)
    assert ended.returncode == -9, ended.stderr
    written: dict[str, int] = {}
    writer = ArtifactWriter.writer

    @contextmanager
    def counting(out: ArtifactWriter, name: str):
        with writer(out, name) as stream:
            write = stream.write
            stream.write = lambda data: written.update({name: written.get(name, 0) + len(data)}) or write(data)
            yield stream

    with monkeypatch.context() as patched:
        patched.setattr(ArtifactWriter, "writer", counting)
        manifest = merge(store, six_files, adapter)
    sizes = {file.path: file.size for file in manifest.files}
    weights = {name: count for name, count in written.items() if name.endswith(".safetensors")}
    assert weights == {name: sizes[name] for name in (f"model-{index}.safetensors" for index in (3, 4, 5))}
    again = merge(tmp_path / "afresh", six_files, adapter)
    assert again.facts["weights_digest"] == manifest.facts["weights_digest"]
    reports = [json.loads(open_artifact(one.reference).read("report.json")) for one in (again, manifest)]
    assert reports[0] == reports[1]
    assert not [item for item in storage.listing(manifest.root) if "kept" in item.name]


# --- order and lineage ------------------------------------------------------------------------------------------------


def published_adapter(store: Path, folder: Path, trained_on: list[str]) -> Manifest:
    """A peft folder as our training publishes it, with the lineage of the model it was trained on."""
    out = ArtifactWriter(str(store), "finetune", folder.name)
    add_folder(out, folder)
    out.facts = {"base_digest": trained_on[0], "base_lineage": trained_on}
    return out.publish("adapter")


@pytest.fixture
def trained_pair(tmp_path, tiny_model, make_adapter) -> tuple[str, str]:
    """Two adapters: one trained on the model, one on the model with the first merged."""
    base = open_artifact(tiny_model).digest
    first = published_adapter(tmp_path, make_adapter(1), [base])
    second = published_adapter(tmp_path, make_adapter(2), [base, first.digest])
    return first.reference, second.reference


def test_adapters_in_the_order_of_their_training_are_merged(tmp_path, tiny_model, trained_pair):
    first, second = trained_pair
    together = merge(tmp_path, tiny_model, first, second)
    apart = merge(tmp_path, merge(tmp_path, tiny_model, first).reference, second)
    assert together.facts["weights_digest"] == apart.facts["weights_digest"]


def test_adapters_in_another_order_are_refused_and_the_right_one_is_named(tmp_path, tiny_model, trained_pair):
    first, second = trained_pair
    with pytest.raises(InputError, match=rf"the order is wrong .*give --adapters {first},{second}$"):
        merge(tmp_path, tiny_model, second, first)


def test_an_adapter_of_a_model_with_another_merged_is_refused(tmp_path, tiny_model, trained_pair):
    with pytest.raises(InputError, match=r"was trained on the model .* merged, and here"):
        merge(tmp_path, tiny_model, trained_pair[1])


def test_a_shrinking_vocabulary_is_refused_and_the_right_order_is_named(
    tmp_path, tiny_model, make_adapter, llama_tokenizer, longer_tokenizer
):
    plus = make_adapter(1, tokenizer=llama_tokenizer, modules_to_save=MODULES)
    alpaca = make_adapter(2, rows=801, tokenizer=longer_tokenizer, modules_to_save=MODULES)
    with pytest.raises(InputError, match=rf"800 pieces .*801 pieces .*shrinks.*give --adapters {plus},{alpaca}$"):
        merge(tmp_path, tiny_model, alpaca, plus)


CHATML = {"<|im_start|>": 800, "<|im_end|>": 801}


def test_more_pieces_without_their_rows_are_refused_by_their_names(tmp_path, tiny_model, make_adapter, llama_tokenizer):
    adapter = make_adapter(1, tokenizer=llama_tokenizer)
    (adapter / "added_tokens.json").write_text(json.dumps(CHATML))
    with pytest.raises(InputError, match=r"bring no embedding rows for <\|im_start\|>, <\|im_end\|>"):
        merge(tmp_path, tiny_model, adapter)


def of_fast(model: bytes) -> dict[str, bytes]:

    return {"tokenizer.json": SentencePieceEncoder(model).files()["tokenizer.json"]}


PADDING = {
    "in tokenizer.json": lambda own, longer: of_fast(longer),
    "a piece of tokenizer.model": lambda own, longer: {"tokenizer.model": longer},
    "added to tokenizer.model": lambda own, longer: {"tokenizer.model": own, "added_tokens.json": b'{"[PAD]": 800}'},
    "added to nothing": lambda own, longer: {"added_tokens.json": b'{"[PAD]": 800}'},
    "of another name": lambda own, longer: {
        "added_tokens.json": b'{"<pad>": 800}',
        "special_tokens_map.json": b'{"pad_token": "<pad>"}',
    },
}


@pytest.mark.parametrize("name", PADDING)
def test_padding_that_has_no_row_is_no_piece_of_the_merged_model(
    tmp_path, tiny_model, make_adapter, merged_by_peft, llama_tokenizer, longer_tokenizer, name
):
    adapter = make_adapter(1)
    wanted = merged_by_peft([adapter])
    for file, content in PADDING[name](llama_tokenizer, longer_tokenizer).items():
        (adapter / file).write_bytes(content)
    manifest = merge(tmp_path, tiny_model, adapter)
    assert_same(tensors_of(manifest), wanted)
    assert manifest.vocabulary is not None
    assert (manifest.vocabulary.size, manifest.vocabulary.pad) == (800, None)
    assert load_encoder(open_artifact(manifest.reference), "").size == 800


def test_tokens_that_an_adapter_gives_to_rows_of_padding_are_named(tmp_path, tiny_folder, make_adapter):
    from transformers import AutoModelForCausalLM

    padded = tmp_path / "model"
    shutil.copytree(tiny_folder, padded, ignore=shutil.ignore_patterns("manifest.json", "*.safetensors*"))
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    base.resize_token_embeddings(832, mean_resizing=False)
    base.save_pretrained(padded)
    adapter = make_adapter(1)
    (adapter / "added_tokens.json").write_text(json.dumps(CHATML))
    manifest = merge(tmp_path / "store", padded, adapter)
    assert manifest.vocabulary is not None
    assert (manifest.vocabulary.size, manifest.vocabulary.rows) == (802, 832)


def test_a_foreign_vocabulary_is_refused(tmp_path, tiny_model, make_adapter, llama_tokenizer):
    from zhllama.tokenizer.sentencepiece_model import parse_model

    proto = parse_model(llama_tokenizer)
    proto.pieces[700].piece, proto.pieces[701].piece = proto.pieces[701].piece, proto.pieces[700].piece
    with pytest.raises(InputError, match="foreign to the 800 pieces"):
        merge(tmp_path, tiny_model, make_adapter(1, tokenizer=proto.SerializeToString()))


# --- bad adapters -----------------------------------------------------------------------------------------------------


def change_config(adapter: Path, **changes: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(adapter: Path, change) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(change(tensors), path)


def cut_in_half(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


Q = "base_model.model.model.layers.0.self_attn.q_proj"
BAD = {
    "no configuration": (lambda a: (a / "adapter_config.json").unlink(), "no adapter_config.json in it"),
    "no weights": (lambda a: (a / "adapter_model.safetensors").unlink(), "neither adapter_model.safetensors nor"),
    "cut short": (cut_in_half, "does not lie in the file; it is cut short"),
    "empty": (lambda a: change_tensors(a, lambda _: {}), "no tensor in the adapter; it was saved empty"),
    "a factor lost": (
        lambda a: change_tensors(a, lambda t: {k: v for k, v in t.items() if k != f"{Q}.lora_B.weight"}),
        "has one of its two LoRA factors",
    ),
    "another architecture": (
        lambda a: change_tensors(a, lambda t: {k.replace("self_attn", "attn"): v for k, v in t.items()}),
        r"it changes model\.layers\.0\.attn\.\w+\.weight, which .* does not have",
    ),
    "another size": (
        lambda a: change_tensors(a, lambda t: t | {f"{Q}.lora_A.weight": torch.zeros(8, 32)}),
        r"q_proj\.weight is \(64, 32\) in the adapter and \(64, 64\) in the model",
    ),
    "another rank": (lambda a: change_config(a, r=4), "where rank 4 is configured"),
    "half of it": (
        lambda a: change_tensors(a, lambda t: {k: v for k, v in t.items() if "layers.1" not in k}),
        r"names model\.layers\.1\.\S+, and the adapter has no tensor of it",
    ),
    "other tokens": (
        lambda a: (a / "added_tokens.json").write_text('{"<|im_start|>": 800}'),
        r"bring no embedding rows for <\|im_start\|>",
    ),
    "a pointer": (
        lambda a: (a / "adapter_config.json").write_text("version https://git-lfs.github.com/spec/v1"),
        "adapter_config.json is no LoRA configuration",
    ),
    "DoRA": (lambda a: change_config(a, use_dora=True), r"sets use_dora \(DoRA\)"),
    "bias": (lambda a: change_config(a, bias="all"), "sets bias='all'"),
    "not LoRA": (lambda a: change_config(a, peft_type="IA3"), "a IA3 adapter; only LoRA"),
    "untrained": (
        lambda a: change_tensors(a, lambda t: {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in t.items()}),
        "merging changes no weight",
    ),
    "not finite": (
        lambda a: change_tensors(a, lambda t: t | {f"{Q}.lora_B.weight": torch.full((64, 8), float("nan"))}),
        r"q_proj\.weight is not finite after the merge",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_adapter_is_named_and_nothing_is_published(tmp_path, tiny_model, make_adapter, name):
    spoil, message = BAD[name]
    adapter = shutil.copytree(make_adapter(1), tmp_path / "adapter")
    spoil(adapter)
    with pytest.raises(InputError, match=message):
        merge(tmp_path / "store", tiny_model, adapter)
    assert not list((tmp_path / "store").rglob("manifest.json"))


def test_an_adapter_that_wants_to_run_code_is_refused(tmp_path, tiny_model, make_adapter):
    class Code:
        def __reduce__(self):
            return os.system, ("true",)

    adapter = shutil.copytree(make_adapter(1), tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"x": Code()}, adapter / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model\.bin: this pickle wants to run code \((posix|nt)\.system\)"):
        merge(tmp_path, tiny_model, adapter)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda path: path.write_bytes(path.read_bytes()[:-9]),
            r"model-00002-of-00002\.safetensors: tensor .* is cut short",
        ),
        (lambda path: path.unlink(), r"the shard model-00002-of-00002\.safetensors is missing"),
        (lambda path: quantise(path.parent), r"\.weight is int8, a quantised weight; give the model in float16"),
    ],
    ids=["cut short", "missing", "quantised"],
)
def test_a_damaged_model_is_named(tmp_path, tiny_folder, make_adapter, spoil, message):
    model = shutil.copytree(tiny_folder, tmp_path / "model", ignore=shutil.ignore_patterns("manifest.json"))
    spoil(model / "model-00002-of-00002.safetensors")
    with pytest.raises(InputError, match=message):
        merge(tmp_path / "store", model, make_adapter(1))


def test_a_model_given_as_an_adapter_is_refused(tmp_path, tiny_model):
    with pytest.raises(InputError, match="this is of kind hf-model; adapter is needed"):
        merge(tmp_path, tiny_model, tiny_model)


def test_tokens_that_the_folder_names_are_published(tmp_path, chatml_model, make_adapter):
    from transformers import AutoTokenizer

    manifest = merge(tmp_path / "store", chatml_model, make_adapter(1))
    merged = open_artifact(manifest.reference)
    encoder = load_encoder(merged, "")
    assert (encoder.size, encoder.eos, encoder.pieces[800:]) == (802, 801, ["<|im_start|>", "<|im_end|>"])
    assert manifest.vocabulary is not None
    assert (manifest.vocabulary.size, manifest.vocabulary.eos, manifest.vocabulary.rows) == (802, 801, 802)
    tokenizer = AutoTokenizer.from_pretrained(merged.root)
    assert tokenizer("<|im_start|>user")["input_ids"] == [1, 800, *encoder.encode("user")]
    assert tokenizer.eos_token_id == 801


def test_an_adapter_brings_the_tokens_that_its_folder_names(tmp_path, tiny_model, make_adapter, llama_tokenizer):
    adapter = make_adapter(1, rows=802, tokenizer=llama_tokenizer, modules_to_save=MODULES)
    (adapter / "added_tokens.json").write_text('{"<|im_start|>": 800, "<|im_end|>": 801}')
    (adapter / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    manifest = merge(tmp_path, tiny_model, adapter)
    assert manifest.vocabulary is not None
    assert (manifest.vocabulary.size, manifest.vocabulary.eos) == (802, 801)
    assert load_encoder(open_artifact(manifest.reference), "").eos == 801


# --- what is published beside the weights -----------------------------------------------------------------------------


@pytest.fixture
def model_folder(tmp_path: Path, tiny_folder: Path) -> Path:
    """A copy of the tiny model without its manifest, to be changed."""
    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "model" / "manifest.json").unlink()
    return tmp_path / "model"


def change_json(path: Path, **changes: object) -> None:
    value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(value | changes), encoding="utf-8")


def test_the_special_ids_that_are_published_are_the_tokenizers(tmp_path, model_folder, make_adapter, caplog):
    for name in ("config.json", "generation_config.json"):
        change_json(model_folder / name, bos_token_id=0, eos_token_id=1, pad_token_id=0)
    change_json(model_folder / "generation_config.json", top_p=0.5)
    artifact = open_artifact(merge(tmp_path / "store", model_folder, make_adapter(1)).reference)
    config, generation = (json.loads(artifact.read(name)) for name in ("config.json", "generation_config.json"))
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, 2, None]
    assert generation == {"top_p": 0.5, "bos_token_id": 1, "eos_token_id": 2}
    assert config["transformers_version"]
    (line,) = [line for line in caplog.messages if "the tokenizer counts" in line]
    assert "config.json says bos 0, eos 1, pad 0 and generation_config.json says bos 0, eos 1, pad 0" in line


def test_a_model_stops_where_its_chat_template_ends_an_answer(tmp_path, chatml_model, make_adapter):
    """As of a base that is not tuned: ChatML beside the end of a text as EOS."""
    from tests.byte_level_bases import CHATML

    for name in ("config.json", "generation_config.json"):
        change_json(chatml_model / name, eos_token_id=2)
    change_json(chatml_model / "tokenizer_config.json", eos_token="</s>")
    (chatml_model / "chat_template.jinja").write_text(CHATML)
    artifact = open_artifact(merge(tmp_path / "store", chatml_model, make_adapter(1)).reference)
    assert json.loads(artifact.read("generation_config.json"))["eos_token_id"] == [2, 801]
    assert json.loads(artifact.read("config.json"))["eos_token_id"] == 2
    assert load_model(str(artifact.root)).stops == (2, 801)
    # laid over its base too
    assert load_model(str(chatml_model), str(make_adapter(2))).stops == (2, 801)


def test_the_model_card_says_what_is_known(tmp_path, model_folder, make_adapter):
    front = "license: llama2\ntags: [zhllama]\nbase_model: owner/name"
    (model_folder / "README.md").write_text(f"---\n{front}\n---\n")
    (model_folder / "LICENSE").write_text("of the base")
    artifact = open_artifact(merge(tmp_path / "store", model_folder, make_adapter(1)).reference)
    card = artifact.read("README.md").decode()
    assert card.startswith("---\nbase_model: owner/name\nlicense: llama2\nlanguage:\n- zh\n- en\n")
    assert "1 adapter merged into it" in card
    assert "Chat template: the model's own" in card
    assert artifact.read("LICENSE") == b"of the base"


def published_template(manifest: Manifest) -> tuple[str, str, str]:
    """As transformers reads it, and what the report and the manifest say of it."""
    from transformers import AutoTokenizer

    artifact = open_artifact(manifest.reference)
    assert "chat_template.jinja" not in artifact
    written = json.loads(artifact.read("tokenizer_config.json"))["chat_template"]
    assert AutoTokenizer.from_pretrained(artifact.root).chat_template == written
    return written, json.loads(artifact.read("report.json"))["chat_template"], manifest.facts["chat_template"]


def test_the_models_own_chat_template_is_published_in_one_place(tmp_path, model_folder, make_adapter):
    (model_folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    found = published_template(merge(tmp_path / "store", model_folder, make_adapter(1)))
    assert found == ("{{ messages[0]['content'] }}", "the model's own", "the model's own")


def test_the_chat_template_that_a_finetuning_taught_is_published(tmp_path, model_folder, make_adapter):
    (model_folder / "chat_template.jinja").write_text("of the model")
    out = ArtifactWriter(str(tmp_path / "adapters"), "finetune", "key")
    add_folder(out, make_adapter(1))
    why = "Alpaca's: the adapter was trained with it"
    manifest = merge(tmp_path / "store", model_folder, out.publish("adapter").reference)
    assert published_template(manifest) == (RECIPE.template, why, why)


def test_a_foreign_adapters_own_chat_template_is_published(tmp_path, model_folder, make_adapter):
    adapter = shutil.copytree(make_adapter(1), tmp_path / "adapter")
    (adapter / "chat_template.jinja").write_text("{{ 'of the adapter' }}")
    (model_folder / "chat_template.jinja").write_text("of the model")
    found = published_template(merge(tmp_path / "store", model_folder, adapter))
    assert found == ("{{ 'of the adapter' }}", "the one beside the adapter", "the one beside the adapter")


def test_a_tokenizer_that_is_none_of_ours_is_carried_whole(tmp_path, model_folder, make_adapter):
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        (model_folder / name).unlink(missing_ok=True)
    (model_folder / "additional_chat_templates").mkdir()
    files = (
        "vocab.json",
        "merges.txt",
        "added_tokens.json",
        "chat_template.jinja",
        "additional_chat_templates/t.jinja",
    )
    for name in files:
        (model_folder / name).write_text("{}")
    assert set(files) <= set(open_artifact(merge(tmp_path / "store", model_folder, make_adapter(1)).reference).names)
