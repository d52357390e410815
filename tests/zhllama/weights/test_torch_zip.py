"""PyTorch checkpoints by the tensor: what torch.save writes is read, what is written torch.load reads."""

import io
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zhllama import storage
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.weights.torch_zip import PthFile, PthStream, load_tensors

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool]


def test_views_strides_and_scalars_are_read_as_torch_loads_them(store):
    whole = torch.randn(40, 30)
    tensors = {
        "whole": whole,
        "columns": whole[:, 3:9],
        "turned": whole.T,
        "row": whole[7],
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "half": whole.half(),
    }
    out = ArtifactWriter(store, "stage", "key")
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    out.add_bytes("x.pth", buffer.getvalue())
    file = PthFile(open_artifact(out.publish("files").reference), "x.pth")
    assert list(file.tensors) == list(tensors)
    for name, wanted in tensors.items():
        found = file.read(name)
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted), name
        if wanted.ndim == 2 and len(wanted) > 5:
            assert torch.equal(file.read(name, 2, 3), wanted[2:5]), name


def test_a_file_that_is_cut_short_anywhere_is_named(tmp_path):
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(4000), "b": torch.ones(4000)}, buffer)
    whole = buffer.getvalue()
    for length in [*range(0, len(whole), 997), *range(len(whole) - 30, len(whole))]:
        (tmp_path / "x.pth").write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"x\.pth: not a (checkpoint in PyTorch's zip|PyTorch checkpoint)"):
            PthFile(open_artifact(str(tmp_path)), "x.pth")


@pytest.mark.parametrize("by", ["torch", "stream"])
def test_indexing_reads_next_to_nothing_between_the_ends(tmp_path, monkeypatch, by):
    tensors = {str(number): torch.zeros(2**20) for number in range(16)}
    if by == "torch":
        torch.save(tensors, tmp_path / "x.pth")
    else:
        with open(tmp_path / "x.pth", "wb") as file:
            stream = PthStream(file, dict.fromkeys(tensors, ("float32", (2**20,))))
            for name, tensor in tensors.items():
                stream.write(name, tensor)
            stream.close()
    artifact = open_artifact(str(tmp_path))
    moved = []
    read_bytes = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda *given: moved.append(given[2]) or read_bytes(*given))
    assert len(PthFile(artifact, "x.pth").tensors) == 16
    # of 64 MiB: the last block (8 MiB), and windows of 16 KiB
    assert sum(moved) <= 10 * 2**20


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3), st.booleans()),
        min_size=1,
        max_size=5,
    )
)
def test_what_is_streamed_is_what_torch_would_save(described):
    tensors = {}
    for number, (dtype, shape, as_view) in enumerate(described):
        made = torch.randint(0, 2, [2, *shape]).to(dtype)
        tensors[f"t{number}"] = made[1] if as_view else made[1].clone()
    buffer = io.BytesIO()
    stream = PthStream(buffer, {n: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items()})
    for name, tensor in tensors.items():
        stream.write(name, tensor)
    stream.close()
    found = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    assert list(found) == list(tensors)
    for name, wanted in tensors.items():
        assert found[name].dtype == wanted.dtype
        assert torch.equal(found[name], wanted)
    saved = io.BytesIO()
    torch.save({name: tensor.clone() for name, tensor in tensors.items()}, saved)
    with zipfile.ZipFile(buffer) as ours, zipfile.ZipFile(saved) as theirs:
        assert ours.testzip() is None
        assert ours.read("archive/data.pkl") == theirs.read("archive/data.pkl")


def test_a_stream_refuses_what_was_not_declared():
    stream = PthStream(io.BytesIO(), {"a": ("float16", (2, 2)), "b": ("float16", (2, 2))})
    with pytest.raises(ValueError, match=r"b .* written where a"):
        stream.write("b", torch.zeros(2, 2).half())
    stream = PthStream(io.BytesIO(), {"a": ("float16", (2, 2))})
    with pytest.raises(ValueError, match="declared and not written"):
        stream.close()


def rezipped(content: bytes, pickled: bytes | None = None) -> bytes:
    """The records of a checkpoint, compressed; the pickle is another one."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, pickled if pickled and name.endswith("data.pkl") else old.read(name))
    return made.getvalue()


def test_a_file_that_unpacks_to_far_more_than_it_has_is_not_unpacked(tmp_path):
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(4)}, buffer)
    (tmp_path / "x.pth").write_bytes(rezipped(buffer.getvalue(), b"." * (65 * 2**20)))
    with pytest.raises(InputError, match=r"x\.pth: it unpacks to 68,157,507 bytes, which no state dict does"):
        load_tensors(open_artifact(str(tmp_path)).open("x.pth"), "x.pth")


def test_a_checkpoint_that_was_compressed_is_loaded_whole_and_never_read_in_place(tmp_path):
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(4)}, buffer)
    assert load_tensors(io.BytesIO(rezipped(buffer.getvalue())), "x")["a"].tolist() == [1, 1, 1, 1]
    (tmp_path / "x.pth").write_bytes(rezipped(buffer.getvalue()))
    with pytest.raises(InputError, match=r"x\.pth: its records are compressed"):
        PthFile(open_artifact(str(tmp_path)), "x.pth")


def test_a_tensor_that_is_one_number_many_times_is_refused(tmp_path):
    torch.save({"a": torch.ones(1).expand(2**30, 2**29)}, tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"tensor a has 576,460,752,303,423,488 elements in a file of"):
        PthFile(open_artifact(str(tmp_path)), "x.pth")


def test_a_pointer_in_place_of_a_checkpoint_is_named(tmp_path):
    (tmp_path / "x.pth").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match=r"x\.pth: it is a git-lfs pointer in place of the file"):
        PthFile(open_artifact(str(tmp_path)), "x.pth")
