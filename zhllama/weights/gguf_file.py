"""GGUF, llama.cpp's file, as a source of weights: what it says of itself, and its tensors' rows as numbers.

A header (typed fields, then name, shape, type and place of each tensor), then the tensors' bytes. It is read in one
pass, from any stream, and nothing in it is believed: counts, lengths and places are held against the file's size before
memory is taken for them. Blocks are dequantised by `gguf`'s own functions, bit for bit, a few rows at a time: 16 MiB of
float32 (CHUNK), about three times that in memory.
"""

import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import IO, TYPE_CHECKING, Any

from zhllama.artifacts.json_file import LARGEST, stand_in
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError

if TYPE_CHECKING:
    import torch

SUFFIX = ".gguf"
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
"""A file that llama.cpp's splitting has cut: stem, number from 1, how many there are."""
MOST_PARTS = 1000
CHUNK = 16 * 2**20
"""Bytes of a tensor's rows, as float32, that are in memory at once."""
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types that are numbers as they are → torch's name."""
PACKED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
"""Types that are dequantised, to float32."""

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_NUMBERS = "BbHhIif?__QqD".replace("_", " ").replace("D", "d")
"""Codes of struct by GGUF's types of fields; 8 is a text, 9 a list."""
_TEXT, _LIST = 8, 9
_ALIGNMENT = 32
_MOST_FIELDS, _MOST_TENSORS, _MOST_VALUES, _MOST_AXES = 10_000, 100_000, 2_000_000, 4
_MEND = "fetch it again"


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies. `type`: gguf's name; `shape` as torch has it; `start`, `length`: bytes in `file`."""

    name: str
    file: str
    type: str
    shape: tuple[int, ...]
    start: int
    length: int

    @property
    def dtype(self) -> str:
        """Of what is read: torch's name of the narrowest that holds every value."""
        return PLAIN.get(self.type, "float32")


class GgufHeader:
    """`fields` (name → number, text or list) and `tensors` (name → place) of one file."""

    def __init__(self, stream: IO[bytes], size: int, where: str, file: str = "") -> None:
        """`stream` stands at the file's beginning and is read up to its tensors' bytes, in order. InputError for what
        is no GGUF, or cannot be as it says."""
        self.where, self._stream, self._size = where, stream, size
        self._at, self._most = 0, min(size, LARGEST)
        self.fields: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        try:
            self._read(file)
        except (ValueError, struct.error, OverflowError) as error:
            raise InputError(f"{where}: not a GGUF file, or damaged ({error}); {_MEND}") from error

    def _read(self, file: str) -> None:
        head = self._take(8)
        if head[:4] != _MAGIC:
            raise ValueError(stand_in(head + self._stream.read(256)) or f"it begins with {head[:4]!r}")
        (version,) = struct.unpack("<I", head[4:])
        if version not in _VERSIONS:
            said = "is big-endian" if version >> 24 in _VERSIONS else f"is of version {version}"
            raise InputError(f"{self.where}: this GGUF {said}, and 2 and 3, little-endian, are read; convert it anew")
        tensors, fields = self._numbers("Q", 2)
        if fields > _MOST_FIELDS or tensors > _MOST_TENSORS:
            raise ValueError(f"it says that it has {fields:,} fields and {tensors:,} tensors")
        for _ in range(fields):
            name = self._text()
            if name in self.fields:
                raise ValueError(f"it has {name:.80} twice")
            (kind,) = self._numbers("I")
            self.fields[name] = self._value(kind, name)
        alignment = self.fields.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or not 8 <= alignment <= 2**16 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment!r:.20}")
        infos = [self._info() for _ in range(tensors)]
        begin = -(-self._at // alignment) * alignment
        for name, axes, number, offset in infos:
            if name in self.tensors:
                raise ValueError(f"it has the tensor {name:.80} twice")
            kind, shape, length = self._extent(name, axes, number)
            if offset % alignment or begin + offset + length > self._size:
                raise ValueError(f"{name:.80} ({kind}, {shape}) does not lie in it, at {offset:,}: it is cut short")
            self.tensors[name] = GgufTensor(name, file, kind, shape, begin + offset, length)
        for one, two in pairwise(sorted(self.tensors.values(), key=lambda tensor: tensor.start)):
            if one.start + one.length > two.start:
                raise ValueError(f"{one.name:.80} and {two.name:.80} lie in one place")

    def _extent(self, name: str, axes: tuple[int, ...], number: int) -> tuple[str, tuple[int, ...], int]:
        """Type, shape and bytes of a tensor; of a type that gguf does not know, as if it had none."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        known = number in set(GGMLQuantizationType)
        kind = GGMLQuantizationType(number).name if known else f"of type {number}"
        elements, (block, bytes_of_it) = (
            math.prod(axes),
            GGML_QUANT_SIZES[GGMLQuantizationType(number)] if known else (1, 0),
        )
        if not 0 < elements < 2**60 or axes[0] % block:
            raise ValueError(f"{name:.80} is {kind} of {axes}")
        return kind, tuple(reversed(axes)), elements // block * bytes_of_it

    def require_read(self) -> None:
        """InputError for a tensor of a type that is not read."""
        for name, tensor in self.tensors.items():
            if tensor.type not in PLAIN and tensor.type not in PACKED:
                done = ", ".join((*PLAIN, *PACKED))
                raise InputError(f"{self.where}: {name:.80} is {tensor.type}, which is not read; give a file of {done}")

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text()
        (count,) = self._numbers("I")
        if not 0 < count <= _MOST_AXES:
            raise ValueError(f"{name:.80} has {count} axes")
        axes = self._numbers("Q", count)
        (number,), (offset,) = self._numbers("I"), self._numbers("Q")
        return name, axes, number, offset

    def _value(self, kind: int, name: str) -> Any:
        if kind == _LIST:
            (kind,), (count,) = self._numbers("I"), self._numbers("Q")
            if count > _MOST_VALUES or kind == _LIST:
                raise ValueError(f"{name:.80} is a list of {count:,} values of type {kind}")
            return (
                [self._text() for _ in range(count)] if kind == _TEXT else list(self._numbers(self._code(kind), count))
            )
        return self._text() if kind == _TEXT else self._numbers(self._code(kind))[0]

    def _code(self, kind: int) -> str:
        if kind >= len(_NUMBERS) or _NUMBERS[kind] == " ":
            raise ValueError(f"a field is of type {kind}")
        return _NUMBERS[kind]

    def _numbers(self, code: str, count: int = 1) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{code}", self._take(count * struct.calcsize(f"<{code}")))

    def _text(self) -> str:
        return self._take(self._numbers("Q")[0]).decode()

    def _take(self, count: int) -> bytes:
        if count > self._most - self._at:
            raise ValueError(
                f"{count:,} bytes are to follow byte {self._at:,}, of {self._most:,} that its header can have"
            )
        self._at += count
        content = self._stream.read(count)
        if len(content) < count:
            raise ValueError(f"it ends at byte {self._at - count + len(content):,}")
        return content


class GgufFile:
    """The fields and tensors of a model: of one file, or of all that it was cut into."""

    def __init__(self, artifact: Artifact, option: str) -> None:
        self.artifact = artifact
        self.names = gguf_files(artifact.names, f"{option} {artifact.root}")
        headers = []
        for name in self.names:
            with artifact.open(name) as stream:
                headers.append(GgufHeader(stream, artifact.file(name).size, f"{option} {artifact.root}/{name}", name))
        self.where = headers[0].where
        self.fields: Mapping[str, Any] = headers[0].fields
        self.tensors: dict[str, GgufTensor] = {}
        for header in headers:
            header.require_read()
            if twice := sorted(self.tensors.keys() & header.tensors.keys()):
                raise InputError(f"{header.where}: another part has {twice[0]} as well; {_MEND}")
            self.tensors |= header.tensors

    def read(self, tensor: GgufTensor, first: int, count: int) -> "torch.Tensor":
        """Rows of a tensor (of one axis: all of it) in `tensor.dtype`, dequantised where they are packed."""
        import torch

        rows = tensor.shape[0]
        if first < 0 or count < 1 or first + count > rows:
            raise ValueError(f"{tensor.name}: rows {first} to {first + count} asked of {rows}")
        row = tensor.length // rows
        content = torch.empty(count * row, dtype=torch.uint8)
        self.artifact.read_into(tensor.file, tensor.start + first * row, content.numpy().data)
        shape = (count, *tensor.shape[1:])
        if tensor.type in PLAIN:
            return content.view(getattr(torch, tensor.dtype)).reshape(shape)
        import numpy as np
        from gguf import GGMLQuantizationType, dequantize

        packed = content.numpy().reshape(*shape[:-1], -1)
        with np.errstate(all="ignore"):  # pieces() says what is not finite
            return torch.from_numpy(dequantize(packed, GGMLQuantizationType[tensor.type]))

    def pieces(self, tensor: GgufTensor, step: int = 1) -> Iterator["torch.Tensor"]:
        """All rows, in order, in multiples of `step` rows, about CHUNK at a time. InputError for what is not finite."""
        import numpy as np

        rows = tensor.shape[0]
        if rows % step:
            raise ValueError(f"{tensor.name}: {rows} rows are no multiple of {step}")
        whole = max(1, CHUNK // (4 * math.prod(tensor.shape[1:]) * step)) * step
        for first in range(0, rows, whole):
            piece = self.read(tensor, first, min(whole, rows - first))
            if not np.isfinite(piece.float().numpy()).all():
                raise InputError(f"{self.where}: {tensor.name} holds NaN or infinity; {_MEND}")
            yield piece


def parts_of(name: str) -> list[str]:
    """The files that a model of this one is in: itself, or all that it was cut into."""
    found = PART.fullmatch(name)
    if not found or not 0 < int(found[3]) <= MOST_PARTS:
        return [name]
    return [f"{found[1]}-{number:05d}-of-{found[3]}.gguf" for number in range(1, int(found[3]) + 1)]


def gguf_files(names: Iterable[str], where: str) -> list[str]:
    """The one model's files among these names. InputError for none, several, or a part that is missing."""
    there = sorted(name for name in names if name.endswith(SUFFIX) and "/" not in name)
    models = list(dict.fromkeys(tuple(parts_of(name)) for name in there))
    if len(models) != 1:
        said = f"several models in it ({', '.join(there[:8])})" if models else f"no {SUFFIX} in it"
        raise InputError(f"{where}: {said}; give one, by its own address")
    if missing := [name for name in models[0] if name not in there]:
        raise InputError(f"{where}: the part {missing[0]} is missing; fetch it too")
    return list(models[0])
