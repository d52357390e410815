"""GGUF read: every value is gguf's own, and what cannot be as it says is refused with a line."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from zhllama.artifacts.in_memory import in_memory
from zhllama.artifacts.open import open_artifact
from zhllama.errors import InputError
from zhllama.weights import gguf_file
from zhllama.weights.gguf_file import PACKED, GgufFile, parts_of

gguf = pytest.importorskip("gguf")
KINDS = [*gguf_file.PLAIN, *PACKED]


def written(path: Path, tensors: dict[str, tuple[np.ndarray, str]], **fields: object) -> Path:
    writer = gguf.GGUFWriter(str(path), "llama")
    for name, value in fields.items():
        writer.add_string(name, value) if isinstance(value, str) else writer.add_array(name, value)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def blocks(kind: str, rows: int, columns: int) -> np.ndarray:
    """Numbers in a type: quantised where gguf can, blocks of small numbers where it only reads."""
    wanted = gguf.GGMLQuantizationType[kind]
    chance = np.random.default_rng(rows)
    try:
        return gguf.quants.quantize(chance.standard_normal((rows, columns), np.float32), wanted)
    except NotImplementedError:
        size, count = gguf.GGML_QUANT_SIZES[wanted]
        return chance.integers(0, 60, (rows, columns // size * count), np.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_is_ggufs_own(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(gguf_file, "CHUNK", 4 * 256 * 24)
    packed = {
        "a": (blocks(kind, 50, 256), kind),
        "b": (blocks(kind, 8, 512), kind),
        "n": (np.ones(7, np.float32), "F32"),
    }
    path = written(tmp_path / "model.gguf", packed, note="é", list=["a", "b"])
    file = GgufFile(open_artifact(str(tmp_path)), "--weights")
    assert file.fields["note"] == "é"
    assert file.fields["list"] == ["a", "b"]
    for theirs in gguf.GGUFReader(path).tensors:
        tensor = file.tensors[theirs.name]
        wanted = gguf.dequantize(theirs.data, theirs.tensor_type)
        pieces = list(file.pieces(tensor, step=1 if theirs.name == "n" else 2))
        assert theirs.name != "a" or [len(piece) for piece in pieces] == [24, 24, 2]
        assert {str(piece.dtype) for piece in pieces} == {f"torch.{tensor.dtype}"}
        np.testing.assert_array_equal(torch.cat(pieces).float().numpy(), wanted)
    assert torch.equal(file.read(file.tensors["a"], 3, 4), torch.cat(list(file.pieces(file.tensors["a"])))[3:7])


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    written(tmp_path / "model.gguf", {"a": (np.full((2, 32), np.inf, np.float32), "F32")})
    file = GgufFile(open_artifact(str(tmp_path)), "--weights")
    with pytest.raises(InputError, match="a holds NaN or infinity"):
        list(file.pieces(file.tensors["a"]))


def test_a_model_of_several_parts_is_one(tmp_path):
    for number in (1, 2):
        name = f"m-0000{number}-of-00002.gguf"
        written(tmp_path / name, {f"t{number}": (np.ones((1, 32), np.float32), "F32")})
    artifact = open_artifact(str(tmp_path))
    assert set(GgufFile(artifact, "--weights").tensors) == {"t1", "t2"}
    assert parts_of("m-00002-of-00002.gguf") == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(InputError, match=r"the part m-00002-of-00002\.gguf is missing"):
        GgufFile(open_artifact(str(tmp_path)), "--weights")


# --- files that lie ---------------------------------------------------------------------------------------------------


def text(value: str | bytes) -> bytes:
    content = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(content)) + content


def header(tensors: list[bytes], fields: list[bytes], version: int = 3, counts: tuple[int, int] | None = None) -> bytes:
    said = counts or (len(tensors), len(fields))
    made = b"GGUF" + struct.pack("<IQQ", version, *said) + b"".join(fields) + b"".join(tensors)
    return made + bytes(-len(made) % 32)


def field(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def info(name: str, axes: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, kind, offset)


GOOD = field("general.architecture", 8, text("llama"))
DATA = bytes(256)
WRONG = {
    "empty": (b"", "ends at byte 0|are to follow"),
    "no GGUF": (b"PK\x03\x04" + bytes(60), "it begins with"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git-lfs pointer"),
    "version 1": (header([], [GOOD], version=1), "is of version 1"),
    "big-endian": (header([], [GOOD], version=3 << 24), "is big-endian"),
    "more fields than there are": (header([], [GOOD], counts=(0, 9)), "are to follow byte|not a GGUF"),
    "fields without end": (header([], [GOOD], counts=(0, 2**60)), "1,152,921,504,606,846,976 fields"),
    "tensors without end": (header([], [GOOD], counts=(2**60, 1)), "tensors"),
    "a text without end": (header([], [field("a", 8, struct.pack("<Q", 2**62))]), "are to follow byte"),
    "a list without end": (header([], [field("a", 9, struct.pack("<IQ", 4, 2**62))]), "is a list of"),
    "a list of lists": (header([], [field("a", 9, struct.pack("<IQ", 9, 1))]), "of type 9"),
    "a field of no type": (header([], [field("a", 13, bytes(8))]), "a field is of type 13"),
    "a field twice": (header([], [GOOD, GOOD]), "it has general.architecture twice"),
    "no UTF-8": (header([], [field("a", 8, text(b"\xff\xfe"))]), "codec can't decode"),
    "a tensor twice": (header([info("a"), info("a", offset=128)], [GOOD]) + DATA, "the tensor a twice"),
    "tensors in one place": (header([info("a"), info("b", offset=32)], [GOOD]) + DATA, "a and b lie in one place"),
    "cut short": (header([info("a", (32, 100))], [GOOD]) + DATA, r"a \(F32, \(100, 32\)\) does not lie in it"),
    "behind the end": (header([info("a", offset=2**63)], [GOOD]) + DATA, "does not lie in it"),
    "not aligned": (header([info("a", offset=8)], [GOOD]) + DATA, "does not lie in it"),
    "no axis": (header([info("a", ())], [GOOD]) + DATA, "a has 0 axes"),
    "five axes": (header([info("a", (1,) * 5)], [GOOD]) + DATA, "a has 5 axes"),
    "an empty axis": (header([info("a", (32, 0))], [GOOD]) + DATA, "a is F32 of"),
    "elements without end": (header([info("a", (2**40, 2**40))], [GOOD]) + DATA, "a is F32 of"),
    "half a block": (header([info("a", (33,), kind=2)], [GOOD]) + DATA, r"a is Q4_0 of \(33,\)"),
    "alignment 0": (header([], [GOOD, field("general.alignment", 4, bytes(4))]), "general.alignment is 0"),
    "alignment a text": (header([], [GOOD, field("general.alignment", 8, text("a"))]), "general.alignment is 'a'"),
    "a type of no name": (header([info("a", kind=99)], [GOOD]) + DATA, "a is of type 99, which is not read"),
    "a type that is not done": (header([info("a", (256,), kind=16)], [GOOD]) + DATA, "a is IQ2_XXS, which is not read"),
    "whole numbers": (header([info("a", kind=26)], [GOOD]) + DATA, "a is I32, which is not read"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_lies_is_refused(name):
    content, said = WRONG[name]
    with pytest.raises(InputError, match=said) as caught:
        GgufFile(in_memory({"model.gguf": content}, "/weights"), "--weights")
    assert str(caught.value).startswith("--weights /weights/model.gguf: ")


def test_alignment_is_the_files_own():
    fields = [GOOD, field("general.alignment", 4, struct.pack("<I", 64))]
    made = header([info("a", (8,))], fields)
    made += bytes(-len(made) % 64) + np.arange(8, dtype="<f4").tobytes()
    file = GgufFile(in_memory({"model.gguf": made}, "/weights"), "--weights")
    assert file.read(file.tensors["a"], 0, 8).tolist() == list(range(8))
