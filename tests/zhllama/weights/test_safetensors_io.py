"""Safetensors by range and as a stream: what the library writes we read, what we write the library reads."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.weights.safetensors_io import (
    DTYPES,
    INDEX,
    SINGLE,
    Checkpoint,
    SafetensorsStream,
    index_json,
    read_header,
)

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
declared = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(st.sampled_from(sorted(DTYPES.values())), shapes),
    min_size=1,
    max_size=5,
)


def made(dtype: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Arbitrary bytes as a tensor: NaNs and infinities are carried like everything else (bool: 0 and 1)."""
    kind = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(seed)
    if kind is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    count = torch.Size(shape).numel() * kind.itemsize
    return torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8).view(kind).reshape(shape)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    def content(tensor: torch.Tensor) -> bytes:
        return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return one.dtype == other.dtype and one.shape == other.shape and content(one) == content(other)


def stream_to(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with open(path, "wb") as file:
        kinds = {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()}
        stream = SafetensorsStream(file, kinds)
        for name, tensor in tensors.items():
            stream.write(name, tensor)
        stream.close()


@given(declared, st.integers(0, 1000))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_library_reads_what_we_write_and_we_read_what_it_writes(tmp_path, kinds, seed):
    tensors = {name: made(dtype, shape, seed + index) for index, (name, (dtype, shape)) in enumerate(kinds.items())}
    stream_to(tmp_path / SINGLE, tensors)
    theirs = load_file(tmp_path / SINGLE)
    assert theirs.keys() == tensors.keys()
    assert all(same(theirs[name], tensor) for name, tensor in tensors.items())

    save_file(tensors, tmp_path / SINGLE)
    ours = Checkpoint(open_artifact(str(tmp_path)))
    assert ours.tensors.keys() == tensors.keys()
    assert all(same(ours.read(name), tensor) for name, tensor in tensors.items())


@given(st.integers(0, 7), st.integers(0, 7))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_are_read_without_the_others(rows_of_seven, first, count):
    checkpoint, tensor = rows_of_seven
    if first + count <= 7:
        assert same(checkpoint.read("w", first, count), tensor[first : first + count])
    assert same(checkpoint.read("w", first, None), tensor[first:])
    room = torch.full((1000,), 7, dtype=torch.uint8)
    rows = checkpoint.read("w", first, None, lambda length: room[:length])
    assert same(rows, tensor[first:])
    assert not rows.numel() or rows.data_ptr() == room.data_ptr()


@pytest.fixture(scope="module")
def rows_of_seven(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, torch.Tensor]:
    folder = tmp_path_factory.mktemp("rows")
    tensor = made("bfloat16", (7, 3), 1)
    save_file({"before": made("float32", (5,), 2), "w": tensor, "z": made("int8", (3,), 3)}, folder / SINGLE)
    return Checkpoint(open_artifact(str(folder))), tensor


@pytest.mark.parametrize(("first", "count"), [(6, 2), (8, None), (-1, 1), (0, -1), (0, 8)])
def test_rows_that_are_not_there_are_a_bug_and_never_a_neighbours_bytes(rows_of_seven, first, count):
    with pytest.raises(ValueError, match="rows"):
        rows_of_seven[0].read("w", first, count)


def test_a_tensor_may_be_written_in_pieces(tmp_path):
    tensor = made("float16", (10, 4), 1)
    with open(tmp_path / SINGLE, "wb") as file:
        stream = SafetensorsStream(file, {"w": ("float16", (10, 4))})
        for start in range(0, 10, 3):
            stream.write("w", tensor[start : start + 3])
        stream.close()
    assert same(load_file(tmp_path / SINGLE)["w"], tensor)


def test_a_tensor_that_is_not_contiguous_is_written_as_it_reads(tmp_path):
    tensor = made("float32", (4, 6), 1).t()
    stream_to(tmp_path / SINGLE, {"w": tensor})
    assert same(load_file(tmp_path / SINGLE)["w"], tensor)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("b", torch.zeros(2, 2)), ("a", torch.zeros(2, 2).half()), ("a", torch.zeros(3, 2))],
    ids=["order", "dtype", "too much"],
)
def test_what_is_not_as_declared_is_a_bug(tmp_path, name, tensor):
    with open(tmp_path / SINGLE, "wb") as file:
        stream = SafetensorsStream(file, {"a": ("float32", (2, 2)), "b": ("float32", (2, 2))})
        with pytest.raises(ValueError, match=r"declared"):
            stream.write(name, tensor)


def test_a_declared_tensor_that_is_not_written_whole_is_a_bug(tmp_path):
    with open(tmp_path / SINGLE, "wb") as file:
        stream = SafetensorsStream(file, {"a": ("float32", (2, 2))})
        stream.write("a", torch.zeros(1, 2))
        with pytest.raises(ValueError, match=r"a was declared and not written"):
            stream.close()


# --- published checkpoints --------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(store: str) -> tuple[str, dict[str, torch.Tensor]]:
    """A model of two shards and an index, published."""
    tensors = {"a": made("float16", (300, 7), 1), "b": made("bfloat16", (11,), 2), "c": made("float32", (), 3)}
    out = ArtifactWriter(store, "stage", "key")
    where = {}
    for number, names in enumerate((["a"], ["b", "c"]), start=1):
        file = f"model-{number:05}.safetensors"
        with out.writer(file) as sink:
            stream = SafetensorsStream(
                sink, {n: (str(tensors[n].dtype).removeprefix("torch."), tuple(tensors[n].shape)) for n in names}
            )
            for name in names:
                stream.write(name, tensors[name])
                where[name] = file
            stream.close()
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    out.add_bytes(INDEX, index_json(where, total))
    return out.publish("hf-model").reference, tensors


def test_a_sharded_model_is_read_tensor_by_tensor(sharded):
    reference, tensors = sharded
    checkpoint = Checkpoint(open_artifact(reference))
    assert checkpoint.tensors.keys() == tensors.keys()
    assert all(same(checkpoint.read(name), tensor) for name, tensor in tensors.items())


def test_the_index_is_the_one_that_transformers_reads(sharded):
    index = json.loads(open_artifact(sharded[0]).read(INDEX))
    assert index["weight_map"] == {
        "a": "model-00001.safetensors",
        "b": "model-00002.safetensors",
        "c": "model-00002.safetensors",
    }
    assert index["metadata"]["total_size"] == 300 * 7 * 2 + 11 * 2 + 4


# --- damaged files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    save_file({"a": torch.arange(12.0).reshape(3, 4), "b": torch.zeros(5)}, tmp_path / SINGLE)
    return tmp_path / SINGLE


def test_a_file_that_is_cut_anywhere_is_refused(whole):
    content = whole.read_bytes()
    for length in range(len(content)):
        whole.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"model\.safetensors"):
            Checkpoint(open_artifact(str(whole.parent)))


@given(st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_header_is_refused_or_read_never_a_crash(whole_content, tmp_path, data):
    content = bytearray(whole_content)
    (length,) = struct.unpack("<Q", content[:8])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 7 + length))] = data.draw(st.integers(0, 255))
    (tmp_path / SINGLE).write_bytes(content)
    try:
        found = read_header(open_artifact(str(tmp_path)), SINGLE)
    except InputError:
        return
    # what is read here, transformers can read
    assert {name: info.shape for name, info in found.items()} == {
        name: tuple(one.shape) for name, one in load_file(tmp_path / SINGLE).items()
    }


def entry(begin: int, end: int) -> dict[str, object]:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(0, 8), "b": entry(0, 8)},
        {"a": entry(0, 6), "b": entry(4, 8)},
        {"a": entry(0, 2), "b": entry(4, 8)},
        {"a": entry(0, 4)},
        {"a": entry(0, 8), "b": entry(3, 3)},
        {"a": entry(0, 8), "__metadata__": {"step": 1}},
        {},
    ],
    ids=["the same bytes", "overlap", "hole", "bytes left over", "empty one inside", "notes", "no tensor"],
)
def test_a_header_that_the_library_refuses_is_refused(tmp_path, header):
    text = json.dumps(header).encode()
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(SafetensorError):
        load_file(tmp_path / SINGLE)
    with pytest.raises(InputError, match=r"model\.safetensors: "):
        read_header(open_artifact(str(tmp_path)), SINGLE)


@pytest.fixture(scope="module")
def whole_content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / SINGLE
    save_file({"a": torch.arange(12.0).reshape(3, 4), "b": torch.zeros(5)}, path)
    return path.read_bytes()


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [3, 4], "data_offsets": [0]},
        {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48, 68]},
        {"dtype": "F32", "shape": [3.0, 4], "data_offsets": [0, 48]},
        {"dtype": "F32", "shape": [-3, -4], "data_offsets": [0, 48]},
        {"dtype": "F32", "shape": [3, 4], "data_offsets": ["0", "48"]},
        {"dtype": ["F32"], "shape": [3, 4], "data_offsets": [0, 48]},
        {"dtype": "F32", "shape": None, "data_offsets": [0, 48]},
        {"dtype": "F32", "shape": [3, 4]},
        {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48], "more": 1},
        {"dtype": "F32", "shape": [0, 2**60], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [0, 2**30, 2**30], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]},
        [],
        "F32",
    ],
    ids=str,
)
def test_an_entry_that_is_none_is_refused(tmp_path, entry):
    header = json.dumps({"a": entry}).encode()
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + bytes(68))
    with pytest.raises(InputError, match="the safetensors header is damaged"):
        read_header(open_artifact(str(tmp_path)), SINGLE)


def test_a_pointer_in_place_of_the_weights_is_named(tmp_path):
    (tmp_path / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(InputError, match=r"model\.safetensors: it is a git-lfs pointer in place of the file"):
        read_header(open_artifact(str(tmp_path)), SINGLE)


def test_a_dtype_that_we_do_not_read_is_named(tmp_path):
    save_file({"a": torch.zeros(4, dtype=torch.float8_e4m3fn)}, tmp_path / SINGLE)
    with pytest.raises(InputError, match="tensor a is F8_E4M3, which this program does not read"):
        Checkpoint(open_artifact(str(tmp_path)))


@pytest.mark.parametrize(
    ("index", "line"),
    [
        ({"weight_map": {"a": "gone.safetensors"}}, r"the shard gone\.safetensors is missing"),
        ({"weight_map": {"x": SINGLE}}, r"the index names x, but no shard has it"),
        ({"metadata": {}}, r"model\.safetensors\.index\.json"),
        ([], r"model\.safetensors\.index\.json"),
        ({"weight_map": ["a"]}, r"model\.safetensors\.index\.json"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(whole, index, line):
    (whole.parent / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match=line):
        Checkpoint(open_artifact(str(whole.parent)))


def test_an_index_that_is_no_json_is_refused(whole):
    (whole.parent / INDEX).write_text("{")
    with pytest.raises(InputError, match=r"index\.json"):
        Checkpoint(open_artifact(str(whole.parent)))


def test_a_folder_without_a_model_is_refused(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(InputError, match=r"--adapter .*: no model\.safetensors and no "):
        Checkpoint(open_artifact(str(tmp_path)), "--adapter")


def test_a_tensor_that_the_model_has_not_is_named(whole):
    with pytest.raises(InputError, match=r"no tensor model\.norm"):
        Checkpoint(open_artifact(str(whole.parent))).read("model.norm")
