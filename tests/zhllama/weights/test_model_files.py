"""Which files are a model's weights, and .bin files read as safetensors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from zhllama.artifacts.open import open_artifact
from zhllama.errors import InputError
from zhllama.storage.parallel import STEP
from zhllama.weights.safetensors_io import INDEX, PICKLED, PICKLED_INDEX, SINGLE, Checkpoint


def test_a_whole_file_beside_an_index_of_others_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / SINGLE)
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "other.safetensors"}}))
    with pytest.raises(InputError, match=r"model\.safetensors lies beside .*; remove the one that is not the model"):
        Checkpoint(open_artifact(str(tmp_path)))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": SINGLE}}))
    assert Checkpoint(open_artifact(str(tmp_path))).read("a").tolist() == [0, 0]


@pytest.mark.parametrize("shards", [1, 2])
def test_pickled_weights_are_read_and_copied_as_safetensors(tmp_path: Path, shards: int) -> None:
    base = torch.randn(6, 4).half()
    tensors = {
        "a": base,
        "tied": base,
        "turned": base.T,
        "part": base[2:4],
        "b": torch.randn(3),
        "n": torch.zeros(0, 2),
    }
    names = list(tensors)
    where = {name: f"pytorch_model-0000{index % 2 + 1}-of-00002.bin" for index, name in enumerate(names)}
    if shards == 1:
        where = dict.fromkeys(names, PICKLED)
    else:
        (tmp_path / PICKLED_INDEX).write_text(json.dumps({"weight_map": where}))
    for file in set(where.values()):
        told = {name: tensors[name] for name in names if where[name] == file}
        torch.save(
            {**told, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)} if shards == 1 else told,
            tmp_path / file,
        )
    checkpoint = Checkpoint(open_artifact(str(tmp_path)))
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor)
    assert torch.equal(checkpoint.read("turned", 1, 2), base.T[1:3])
    checkpoint.artifact.fetch(tmp_path / "copy", checkpoint.files)
    copied = {name: one for file in checkpoint.files for name, one in load_file(tmp_path / "copy" / file).items()}
    assert all(torch.equal(copied[name], tensor) for name, tensor in tensors.items())
    assert (INDEX in checkpoint.artifact) == (shards == 2)


@pytest.mark.parametrize(("index", "file"), [(INDEX, "w.bin"), (PICKLED_INDEX, "w.safetensors")])
def test_an_index_of_files_of_the_other_kind_is_refused(tmp_path: Path, index: str, file: str) -> None:
    (tmp_path / file).write_bytes(b"")
    (tmp_path / index).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(InputError, match=r"its weight_map names no \.\w+ files alone"):
        Checkpoint(open_artifact(str(tmp_path)))


@pytest.mark.parametrize("tensor", [torch.eye(2).to_sparse(), torch.zeros(2, device="meta")], ids=["sparse", "meta"])
def test_a_tensor_without_numbers_of_its_own_is_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    torch.save({"a": tensor}, tmp_path / PICKLED)
    with pytest.raises(InputError, match=r"not a dictionary of tensors \(dense ones\)"):
        Checkpoint(open_artifact(str(tmp_path)))


def test_what_is_longer_than_a_piece_is_copied_piece_by_piece(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(STEP // 3).float(), "b": torch.arange(STEP).float()}
    torch.save(tensors, tmp_path / PICKLED)
    (tmp_path / "tokenizer.json").write_bytes(bytes(range(256)) * (STEP // 128))
    artifact = Checkpoint(open_artifact(str(tmp_path))).artifact
    artifact.fetch(tmp_path / "copy")
    copied = load_file(tmp_path / "copy" / SINGLE)
    assert all(torch.equal(copied[name], tensor) for name, tensor in tensors.items())
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_a_pickle_that_runs_code_is_not_opened(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1), "b": print}, tmp_path / PICKLED)
    with pytest.raises(InputError, match=r"wants to run code|holds more than tensors"):
        Checkpoint(open_artifact(str(tmp_path)))
