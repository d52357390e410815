"""Transformers is given what was checked: from .bin files, of other spellings, beside whatever else lies there."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from zhllama.artifacts.open import open_artifact
from zhllama.errors import InputError
from zhllama.inference.load import load_model
from zhllama.training.model import load_base
from zhllama.weights.model_folder import lay_out
from zhllama.weights.safetensors_io import INDEX, PICKLED, PICKLED_INDEX, SINGLE, Checkpoint

IDS = torch.arange(3, 43)[None]


@pytest.fixture
def model(tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny model in one file."""
    monkeypatch.setenv("ZHLLAMA_CACHE", str(tmp_path / "cache"))
    folder = shutil.copytree(Path(tiny_model).parent, tmp_path / "model")
    tensors: dict[str, torch.Tensor] = {}
    for path in (*folder.glob("*.safetensors"), folder / INDEX, folder / "manifest.json"):
        tensors |= load_file(path) if path.suffix == ".safetensors" else {}
        path.unlink()
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


def logits(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits


def ours(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        return load_model(open_artifact(str(folder))).model(IDS).logits


def pickled(folder: Path, names: list[str], inside: str = "") -> None:
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    place_of = {key: names[number % len(names)] for number, key in enumerate(tensors)}
    for name in names:
        held = {key: tensors[key] for key in tensors if place_of[key] == name}
        torch.save({inside: held} if inside else held, folder / name)
    if len(names) > 1:
        (folder / PICKLED_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": place_of}))


@pytest.mark.parametrize(
    ("names", "inside"),
    [([PICKLED], ""), ([f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)], ""), ([PICKLED], "state_dict")],
    ids=["one", "shards", "nested"],
)
def test_pickled_weights_are_loaded_as_their_safetensors(model: Path, names: list[str], inside: str) -> None:
    wanted = logits(model)
    pickled(model, names, inside)
    assert torch.equal(ours(model), wanted)
    with torch.inference_mode():
        hidden = load_base(open_artifact(str(model)), torch.float32).eval().model(IDS, use_cache=False)
    head = Checkpoint(open_artifact(str(model))).read("lm_head.weight").float()
    assert torch.allclose(hidden.last_hidden_state @ head.T, wanted, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 5e3},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    ],
    ids=["linear", "dynamic", "yarn"],
)
def test_the_rotary_positions_are_those_of_transformers(model: Path, changes: dict[str, Any]) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not None}))
    assert torch.equal(ours(model), logits(model))


def test_nothing_that_lies_beside_the_tensors_is_seen(model: Path, tmp_path: Path) -> None:
    wanted = logits(model)
    tensors = load_file(model / SINGLE)
    torch.save({name: one * 0 for name, one in tensors.items()}, model / PICKLED)
    (model / "modeling_llama.py").write_text("raise SystemExit")
    (model / "other.safetensors").write_bytes(b"")
    assert torch.equal(ours(model), wanted)
    folder = tmp_path / "laid-out"
    folder.mkdir()
    lay_out(Checkpoint(open_artifact(str(model))), folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "model-00001-of-00001.safetensors", INDEX,
    ]  # fmt: skip


def test_a_whole_file_that_is_a_shard_too_is_read_with_the_others(model: Path) -> None:
    wanted = logits(model)
    tensors = load_file(model / SINGLE)
    names = sorted(tensors)
    for file, part in ((SINGLE, names[:5]), ("b.safetensors", names[5:])):
        save_file({name: tensors[name] for name in part}, model / file, metadata={"format": "pt"})
    places = {name: SINGLE if name in names[:5] else "b.safetensors" for name in names}
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert torch.equal(ours(model), wanted)


def test_quantised_weights_are_refused_by_their_method(model: Path) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(InputError, match=r"has a quantization_config \(gptq\), and there is no arithmetic"):
        load_model(open_artifact(str(model)))
