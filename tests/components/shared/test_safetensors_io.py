"""The safetensors container: what the library writes is read, what is written the library reads, damage is named."""

import io
import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save_file

from components.shared.artifact import ArtifactWriter, open_artifact
from components.shared.errors import InputError
from components.shared.safetensors_io import Checkpoint, SafetensorsStream

TENSORS = {
    "a": torch.randn(50, 30).half(),
    "b": torch.arange(12).view(3, 4),
    "c": torch.tensor(1.5),
    "d": torch.randn(7).bfloat16(),
    "e": torch.empty(0, 3),
}


@pytest.fixture
def checkpoint(store, tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    out = ArtifactWriter(store, "stage", "key")
    out.add_file("model.safetensors", tmp_path / "model.safetensors")
    return Checkpoint(open_artifact(out.publish("hf-model").reference))


def test_what_the_library_wrote_is_read(checkpoint):
    assert set(checkpoint.tensors) == set(TENSORS)
    for name, wanted in TENSORS.items():
        found = checkpoint.read(name)
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted), name


def test_rows_are_read_alone(checkpoint):
    assert torch.equal(checkpoint.read_rows("a", 10, 5), TENSORS["a"][10:15])
    assert torch.equal(checkpoint.read_rows("a", 48, None), TENSORS["a"][48:])
    assert checkpoint.read_rows("a", 3, 0).shape == (0, 30)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([torch.float16, torch.bfloat16, torch.float32]), st.lists(st.integers(0, 4), max_size=3)
        ),
        min_size=1,
        max_size=4,
    )
)
def test_the_library_reads_what_is_streamed(described):
    tensors = {f"t{number}": torch.randn(shape).to(dtype) for number, (dtype, shape) in enumerate(described)}
    buffer = io.BytesIO()
    declared = {
        name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    stream = SafetensorsStream(buffer, declared)
    for name, tensor in tensors.items():
        stream.write(name, tensor)
    found = load(buffer.getvalue())
    assert set(found) == set(tensors)
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )


def header(**entries: object) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"short", "5 bytes is no safetensors file"),
        (struct.pack("<Q", 10**9) + b"{}", "not a safetensors file, or cut short"),
        (struct.pack("<Q", 2) + b"{x", "header is damaged"),
        (struct.pack("<Q", 2) + b"[]", "no tensor x"),
        (header(x={"dtype": "F16"}), "header is damaged"),
        (header(x={"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}), "F4, which this program does not read"),
        (header(x={"dtype": "F16", "shape": [8], "data_offsets": [0, 16]}), "does not lie in the file"),
        (header(x={"dtype": "F16", "shape": [3], "data_offsets": [0, 8]}), "does not lie in the file"),
    ],
    ids=["short", "length", "JSON", "empty", "fields", "dtype", "cut", "shape"],
)
def test_a_damaged_file_is_named(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=message):
        Checkpoint(open_artifact(str(tmp_path))).read("x")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{}", "is damaged"),
        ('{"weight_map": {"x": "model-2.safetensors"}}', r"the shard model-2\.safetensors is missing"),
        ('{"weight_map": {"x": "model-1.safetensors", "y": "model-1.safetensors"}}', "the index names y"),
    ],
    ids=["damaged", "shard", "tensor"],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path, index, message):
    save_file({"x": torch.zeros(2)}, tmp_path / "model-1.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match=message):
        Checkpoint(open_artifact(str(tmp_path)))
