"""PyTorch checkpoints (.pth, .bin), one tensor at a time, from S3 or a folder to S3 or a folder.

torch.save writes a zip of stored records: a pickle that describes the tensors, then their bytes. Reading: the pickle is
loaded (always weights_only) under FakeTensorMode, which allocates nothing and records where each storage begins; then
the tensors are range-read. Headers between them are read unverified (16 KiB a read, where a verified one is of 8 MiB),
and verified with the tensors. Writing: torch's own zip writer on a stream. Memory: one tensor, each way.
"""

import io
import itertools
import pickle
import re
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import IO, TYPE_CHECKING, Any, cast

from zhllama.artifacts.blocks import BLOCK
from zhllama.artifacts.json_file import LARGEST, stand_in
from zhllama.artifacts.reader import Artifact, RangeStream
from zhllama.errors import InputError
from zhllama.weights.tensors import Sink, TensorInfo, read_rows

if TYPE_CHECKING:
    import torch

    from zhllama.weights.tensors import Room

_ZIP = b"PK\x03\x04"
_WINDOW = 16 * 2**10
"""Bytes of a read while a file is indexed."""
_NESTED = ("state_dict", "model_state_dict", "module", "model")
"""Where Lightning, trainers of one's own and DeepSpeed put the state dict in their file."""
_WRONG = (
    RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError,
    MemoryError, struct.error,
)  # fmt: skip
"""What torch ends in where a pickle is damaged; of memory, where it says that more follows than there is."""


def load_tensors(stream: Any, where: str, in_place: bool = False) -> dict[str, Any]:
    """`torch.load(weights_only=True)` on the CPU of a dictionary of tensors, or of one inside another. InputError
    for its refusals, and for anything else. `in_place`: the tensors are to be found in the file as they are, so that no
    record is compressed."""
    import torch

    _check_size(stream, where, in_place)
    try:
        found = torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted:
            raise InputError(
                f"{where}: this pickle wants to run code ({wanted[1]}) and is not opened; fetch the weights from a "
                "source you trust"
            ) from error
        raise InputError(f"{where}: the pickle is damaged or holds more than tensors; fetch it again") from error
    except _WRONG as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{where}: not a PyTorch checkpoint, or cut short ({said}); fetch it again") from error
    if isinstance(found, dict) and len(inside := [found[name] for name in _NESTED if name in found]) == 1:
        # beside it lie the state of an optimizer, counters and the like
        found = inside[0] if isinstance(inside[0], dict) else found
    if not isinstance(found, dict) or not all(
        isinstance(one, torch.Tensor) and one.layout is torch.strided and one.device.type != "meta"
        for one in found.values()
    ):
        raise InputError(f"{where}: not a dictionary of tensors (dense ones); a state dict is needed")
    return found


def _check_size(stream: Any, where: str, in_place: bool) -> None:
    """InputError for a file that unpacks to far more than it has: torch unpacks before it looks."""
    try:
        with zipfile.ZipFile(stream) as records:
            held = records.infolist()
            aligned = [records.open(one).read(20) for one in held if one.filename.endswith(".storage_alignment")]
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError):
        # an older format, or no checkpoint: torch says so
        held, aligned = [], []
    # by nothing, torch would divide by it, which ends the process
    if any(not re.fullmatch(rb"[1-9][0-9]{0,8}", one) for one in aligned):
        raise InputError(f"{where}: its tensors are aligned to {aligned[0]!r:.40}; load it and save it again")
    if hasattr(stream, "seek"):
        stream.seek(0)
    if in_place and any(record.compress_type != zipfile.ZIP_STORED for record in held):
        raise InputError(f"{where}: its records are compressed, as torch.save writes none; load it and save it again")
    pickled = max((record.file_size for record in held if record.filename.endswith(".pkl")), default=0)
    packed, plain = (sum(getattr(record, name) for record in held) for name in ("compress_size", "file_size"))
    if pickled > LARGEST or plain > 4 * packed + LARGEST:
        raise InputError(
            f"{where}: it unpacks to {max(pickled, plain):,} bytes, which no state dict does; fetch it again"
        )


class PthFile:
    """The tensors of one checkpoint, readable one by one. InputError for what is not a dictionary of tensors."""

    def __init__(self, artifact: Artifact, name: str) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        self._artifact = artifact
        self.name = name
        self.where = where = f"{artifact.root}/{name}"
        self.tensors: dict[str, TensorInfo] = {}
        self._strides: dict[str, tuple[int, ...]] = {}
        if not is_zip(artifact, name):
            raise InputError(
                f"{where}: not a checkpoint in PyTorch's zip format; load it and save it again with torch 1.6 or "
                "newer, or fetch it again"
            )
        size = artifact.file(name).size
        # the last block holds the zip's directory; is_zip has verified the first, which holds the pickle
        artifact.read_range(name, max(0, size - BLOCK), min(BLOCK, size))

        def window(start: int, most: int) -> bytes:
            return artifact.read_stored(name, start, min(most, size - start))

        with io.BufferedReader(RangeStream(size, window), _WINDOW) as stream, FakeTensorMode():
            found = load_tensors(stream, where, in_place=True)
        for key, tensor in found.items():
            span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
            width = tensor.element_size()
            start = tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * width
            length = span * width if tensor.numel() else 0
            if tensor.numel() * width > 64 * size + 2**20:
                raise InputError(f"{where}: tensor {key} has {tensor.numel():,} elements in a file of {size:,} bytes")
            if start + length > size:
                raise InputError(f"{where}: tensor {key} does not lie in the file; it is cut short, fetch it again")
            dtype = str(tensor.dtype).removeprefix("torch.")
            self.tensors[str(key)] = TensorInfo(str(key), name, dtype, tuple(tensor.shape), start, length)
            if not tensor.is_contiguous():
                self._strides[str(key)] = tuple(tensor.stride())

    def read(self, key: str, first: int = 0, count: int | None = None, room: "Room | None" = None) -> "torch.Tensor":
        """As Checkpoint.read; what does not lie row after row is read whole for it."""
        info, strides = self.tensors[key], self._strides.get(key)
        if strides is None:
            return read_rows(self._artifact, info, first, count, room)
        import torch

        span = (info.length // getattr(torch, info.dtype).itemsize,)
        whole = read_rows(self._artifact, replace(info, shape=span)).as_strided(info.shape, strides)
        return whole[first:] if count is None else whole[first : first + count].clone()


def is_zip(artifact: Artifact, name: str) -> bool:
    """Whether the file begins as PyTorch's zip format does (older torch wrote bare pickles). InputError for what only
    lies in its place."""
    head = artifact.read_range(name, 0, min(1024, artifact.file(name).size))
    if said := stand_in(head):
        raise InputError(f"{artifact.root}/{name}: {said}")
    return bytes(head[:4]) == _ZIP


class PthStream:
    """Writes a state dict as a stream: declare every tensor first, then write them, whole, in that order. `tensors`
    maps name → (torch dtype name, shape). The file is what `torch.save` would write."""

    def __init__(self, sink: Sink, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        import torch

        self._left = [(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
        self._at = 0
        self._zip = torch._C.PyTorchFileWriter(cast(IO[bytes], sink))
        keys = map(str, itertools.count())

        def contiguous(tensor: torch.Tensor) -> Any:
            """It and its storage, which holds nothing else, as torch pickles them."""
            legacy = getattr(torch, torch.storage._dtype_to_storage_type_map()[tensor.dtype])
            held = ["storage", legacy, next(keys), "cpu", tensor.numel()]
            shape, strides = tuple(tensor.shape), tensor.stride()
            return torch._utils._rebuild_tensor_v2, (held, 0, shape, strides, False, OrderedDict())

        pickler = _Pickler(buffer := io.BytesIO(), protocol=2)
        pickler.dispatch_table = {torch.Tensor: contiguous}
        kinds = {name: getattr(torch, dtype) for name, (dtype, _) in tensors.items()}
        pickler.dump({name: torch.empty(tensors[name][1], dtype=kind, device="meta") for name, kind in kinds.items()})
        # the records that torch.save writes, in its order: from them a reader computes where the tensors lie
        records = {
            "data.pkl": buffer.getvalue(),
            ".format_version": b"1",
            ".storage_alignment": str(torch.serialization._get_storage_alignment()).encode(),
            "byteorder": sys.byteorder.encode(),
        }
        for name, content in records.items():
            self._zip.write_record(name, content, len(content))

    def write(self, name: str, tensor: "torch.Tensor") -> None:
        """The next tensor. ValueError when order, dtype or shape are not as declared (a bug)."""
        import torch

        wanted, dtype, shape = self._left.pop(0)
        if name != wanted or tensor.dtype != getattr(torch, dtype) or tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} ({tensor.dtype}, {tuple(tensor.shape)}) written where {wanted} ({dtype}, {shape}) was declared"
            )
        content = tensor.detach().cpu().contiguous()
        held = content.untyped_storage()
        if held.nbytes() != content.nbytes:
            held = content.clone().untyped_storage()
        self._zip.write_record(f"data/{self._at}", cast(Any, held), held.nbytes())
        self._at += 1

    def close(self) -> None:
        """Writes the zip's directory. ValueError when a declared tensor was not written (a bug)."""
        if self._left:
            raise ValueError(f"{self._left[0][0]} was declared and not written")
        self._zip.write_end_of_file()


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        """torch's, of a storage: a list here (kind, class, key, device, elements), since nothing else is one."""
        return tuple(value) if isinstance(value, list) else None
