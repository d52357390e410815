"""Hugging Face safetensors checkpoints, one tensor at a time, from S3 or a folder to S3 or a folder.

Format: eight bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the tensors'
bytes. The library builds whole files in memory; here the container is read by range and written as a stream. Memory:
one tensor.
"""

import json
import math
import struct
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from io import BytesIO
from typing import TYPE_CHECKING, Any

from zhllama import storage
from zhllama.artifacts.json_file import object_of, read_object, stand_in
from zhllama.artifacts.manifest import File, digest_of
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.weights.tensors import Sink, TensorInfo, read_rows
from zhllama.weights.torch_zip import PthFile

if TYPE_CHECKING:
    import torch

    from zhllama.weights.tensors import Room

PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""safetensors' names → torch's."""
_CODES = {name: code for code, name in DTYPES.items()}
_WIDTHS = {code: 1 if code == "BOOL" else int(code.lstrip("BFIU")) // 8 for code in DTYPES}
"""Bytes of an element."""
_FREQUENCIES = "rotary_emb.inv_freq"
"""Tensors of old .bin files that say nothing: config.json gives the frequencies."""
_MAX_HEADER = 100 * 2**20
_MOST_AXES = 8


def read_header(artifact: Artifact, file: str) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file; InputError when it is truncated or not one."""
    where = f"{artifact.root}/{file}"
    size = artifact.file(file).size
    if size < 8:
        raise InputError(f"{where}: {size} bytes is no safetensors file; fetch it again")
    (length,) = struct.unpack("<Q", artifact.read_range(file, 0, 8))
    if length > min(_MAX_HEADER, size - 8):
        if said := stand_in(artifact.read_range(file, 0, min(size, 1024))):
            raise InputError(f"{where}: {said}")
        raise InputError(f"{where}: not a safetensors file, or cut short; fetch it again")
    found: dict[str, TensorInfo] = {}
    try:
        header = object_of(artifact.read_range(file, 8, length).decode("utf-8"))
        notes, at = header.pop("__metadata__", {}), 0
        if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
            raise ValueError("not the notes of a safetensors header")
        for name, entry in header.items():
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            numbers = (*shape, begin, end)
            wrong = len(entry) > 3 or type(dtype) is not str or any(type(n) is not int or n < 0 for n in numbers)
            # torch counts elements, empty ones too, in 63 bits
            if wrong or len(shape) > _MOST_AXES or math.prod(max(n, 1) for n in shape) >= 2**60:
                raise ValueError("not an entry of a safetensors header")
            if dtype not in DTYPES:
                raise InputError(f"{where}: tensor {name} is {dtype}, which this program does not read")
            if not begin <= end <= size - 8 - length or end - begin != math.prod(shape) * _WIDTHS[dtype]:
                raise InputError(f"{where}: tensor {name} ({dtype}, {shape}) does not lie in the file; it is cut short")
            found[name] = TensorInfo(name, file, DTYPES[dtype], shape, 8 + length + begin, end - begin)
        for info in sorted(found.values(), key=lambda info: (info.start, info.length)):
            if info.start != 8 + length + at:
                raise InputError(f"{where}: tensor {info.name} begins not where the one before ends; fetch it again")
            at += info.length
        if 8 + length + at != size:
            raise InputError(f"{where}: its tensors end {size - 8 - length - at:,} bytes before it; fetch it again")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where}: the safetensors header is damaged; fetch it again") from error
    return found


def model_files(
    names: Collection[str], read: Callable[[str], dict[str, Any]], where: str
) -> tuple[list[str], dict[str, str]]:
    """The files of a model's weights, and what their index says (tensor → file; nothing without one): safetensors
    before .bin, as transformers. A whole file beside an index of others is refused: transformers reads the first, vLLM
    the others. `read`: the object in a file of `names`, or ValueError."""
    for index, single in ((INDEX, SINGLE), (PICKLED_INDEX, PICKLED)):
        if index in names:
            try:
                named = dict(read(index)["weight_map"])
                files = sorted(set(named.values()))
                suffix = single[single.index(".") :]
                if not files or not all(isinstance(file, str) and file.endswith(suffix) for file in files):
                    raise ValueError(f"its weight_map names no {suffix} files alone")
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{where}: {index} is damaged ({error}); fetch it again") from error
            if single in names and single not in files and all(file in names for file in files):
                said = f"{single} lies beside {index}, which names other files"
                raise InputError(f"{where}: {said}; remove the one that is not the model")
            return files, named
        if single in names:
            return [single], {}
    raise InputError(f"{where}: no {SINGLE} and no index in it; give a folder with safetensors, or a {PICKLED}")


def _as_safetensors(artifact: Artifact, files: Iterable[str]) -> Artifact:
    """The same model with its pickles (never run: torch_zip.py) as safetensors, which are made when they are read."""
    made: dict[str, tuple[bytes, list[int], list[tuple[PthFile, str]]]] = {}
    entries = [artifact.file(name) for name in artifact.names if not name.endswith((".bin", PICKLED_INDEX))]
    place_of: dict[str, str] = {}
    total = 0
    for file in files:
        pickled = PthFile(artifact, file)
        infos = {name: info for name, info in pickled.tensors.items() if not name.endswith(_FREQUENCIES)}
        if odd := [name for name, info in infos.items() if info.dtype not in _CODES]:
            raise InputError(f"{artifact.root}/{file}: {odd[0]} is {infos[odd[0]].dtype}, which is not read")
        head = BytesIO()
        SafetensorsStream(head, {name: (info.dtype, info.shape) for name, info in infos.items()})
        starts, at = [], len(head.getvalue())
        for info in infos.values():
            starts.append(at)
            at += math.prod(info.shape) * _WIDTHS[_CODES[info.dtype]]
        total += at - len(head.getvalue())
        name = file.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"
        made[name] = head.getvalue(), starts, [(pickled, key) for key in infos]
        place_of |= dict.fromkeys(infos, name)
        entries.append(File(name, at, ""))
    content = index_json(place_of, total) if len(made) > 1 else b""
    if content:
        made[INDEX] = content, [], []
        entries.append(File(INDEX, len(content), ""))

    @lru_cache(maxsize=2)
    def whole(pickled: PthFile, key: str) -> memoryview:
        import torch

        flat: memoryview = pickled.read(key).contiguous().reshape(-1).view(torch.uint8).numpy().data
        return flat

    def fill(name: str, start: int, buffer: memoryview) -> None:
        if name not in made:
            buffer[:] = artifact.read_range(name, start, len(buffer))
            return
        head, starts, tensors = made[name]
        at, end = start, start + len(buffer)
        while at < end:
            number = bisect_right(starts, at) - 1
            if number < 0:
                piece = memoryview(head)[at:end]
            else:
                first = at - starts[number]
                piece = whole(*tensors[number])[first : first + end - at]
            buffer[at - start : at - start + len(piece)] = piece
            at += len(piece)

    def read(name: str, start: int, length: int, buffer: memoryview, take: storage.Take | None) -> None:
        # as storage.read_piece: who takes the pieces may have room for one of them
        room = min(len(buffer), length) or 1
        for at in range(0, length, room):
            piece = buffer[: min(room, length - at)]
            fill(name, start + at, piece)
            if take:
                take(at, piece)

    digest = digest_of([artifact.digest, "safetensors"])
    same = Artifact(replace(artifact.manifest, files=tuple(entries), blocks=None, digest=digest), False, read)
    # its files lie in no folder: who needs one gets the node's copy
    same.remote = True
    return same


class Checkpoint:
    """The tensors of a model folder (`model.safetensors`, or an index and its shards), readable one by one."""

    def __init__(self, artifact: Artifact, option: str = "--model", single: str = SINGLE) -> None:
        """`single`: the file to read where there is no index (an adapter's is adapter_model.safetensors)."""
        self.artifact = artifact
        self.tensors: dict[str, TensorInfo] = {}
        self.where = where = f"{option} {artifact.root}"
        if single == SINGLE:
            files, named = model_files(artifact.names, lambda name: read_object(artifact, name), where)
        elif single in artifact:
            files, named = [single], {}
        else:
            raise InputError(f"{where}: no {single} in it; give a folder with safetensors")
        for file in files:
            if file not in artifact:
                raise InputError(f"{where}: the shard {file} is missing; publish or fetch the model again")
        if files[0].endswith(".bin"):
            self.artifact = artifact = _as_safetensors(artifact, files)
            named = {name: file for name, file in named.items() if not name.endswith(_FREQUENCIES)}
            files = sorted(name for name in artifact.names if name.endswith(".safetensors"))
        for file in files:
            for name, info in read_header(artifact, file).items():
                if name in self.tensors:
                    raise InputError(f"{where}: {name} lies in {file} and in {self.tensors[name].file}; remove one")
                self.tensors[name] = info
        if missing := sorted(set(named) - set(self.tensors)):
            raise InputError(f"{where}: the index names {missing[0]}, but no shard has it; fetch it again")
        self.files = files
        self.partly: set[str] = set()
        """Files that have a tensor more, which is left out."""

    def settings(self, name: str = "config.json") -> dict[str, Any]:
        """A JSON file of the model; InputError when it is none."""
        try:
            return read_object(self.artifact, name)
        except (ValueError, TypeError) as error:
            raise InputError(f"{self.where}: {name} is no JSON object ({error}); fetch the model again") from error

    def info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise InputError(f"{self.artifact.root}: the model has no tensor {name}; is it the whole model?")
        return self.tensors[name]

    def leave_out(self, name: str) -> None:
        """Whoever writes the model on writes it without this tensor."""
        info = self.tensors.pop(name, None)
        if info is None:
            return
        if any(other.file == info.file for other in self.tensors.values()):
            self.partly.add(info.file)
        else:
            self.files.remove(info.file)

    def refuse_quantised(self, names: Iterable[str] | None = None) -> None:
        """InputError when one of these tensors is not of floating-point numbers; of all (by default), when config.json
        says so. Integers with scales beside them, read as the numbers that they are not, would merge, export and extend
        without a complaint, to a model that is noise."""
        if names is None and (said := self.settings().get("quantization_config")):
            method = str(said.get("quant_method", ""))[:40] if isinstance(said, dict) else ""
            raise InputError(
                f"{self.where}: config.json has a quantization_config ({method or 'of no named method'}), and there is "
                "no arithmetic on such weights here; give the model in float16, bfloat16 or float32, without that"
            )
        for name in self.tensors if names is None else names:
            if not self.info(name).dtype.startswith(("float", "bfloat")):
                raise InputError(
                    f"{self.where}: {name} is {self.info(name).dtype}, a quantised weight; give the model in float16, "
                    "bfloat16 or float32"
                )

    def read(self, name: str, first: int = 0, count: int | None = None, room: "Room | None" = None) -> "torch.Tensor":
        """A tensor, or its rows `first` to `first + count` (to the last for None), verified, in its stored dtype. room:
        gives the memory (uint8) for so many bytes; fresh memory by default. ValueError for rows that the tensor has not
        (a bug): their bytes would be another tensor's."""
        return read_rows(self.artifact, self.info(name), first, count, room)


class SafetensorsStream:
    """Writes one safetensors file as a stream: declare every tensor first, then write them in that order. `tensors`
    maps name → (torch dtype name, shape). `write` takes a whole tensor, or pieces of one along axis 0."""

    def __init__(self, sink: Sink, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        import torch

        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._left: list[tuple[str, str, int]] = []
        at = 0
        for name, (dtype, shape) in tensors.items():
            length = getattr(torch, dtype).itemsize * math.prod(shape)
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [at, at + length]}
            self._left.append((name, dtype, length))
            at += length
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        sink.write(struct.pack("<Q", len(text)) + text)
        self._sink = sink
        self._written = 0

    def write(self, name: str, tensor: "torch.Tensor") -> None:
        """The next tensor, or its next rows. ValueError when order, dtype or size are not as declared (a bug)."""
        import torch

        wanted, dtype, length = self._left[0]
        content = tensor.detach().cpu().contiguous()
        count = content.nbytes
        if name != wanted or content.dtype != getattr(torch, dtype) or self._written + count > length:
            raise ValueError(
                f"{name} ({content.dtype}, {count} bytes) written where {wanted} ({dtype}, {length}) was declared"
            )
        if count:
            self._sink.write(content.reshape(-1).view(torch.uint8).numpy().data)
        self._written += count
        if self._written == length:
            self._left.pop(0)
            self._written = 0

    def close(self) -> None:
        """ValueError when a declared tensor was not written (a bug)."""
        if self._left:
            raise ValueError(f"{self._left[0][0]} was declared and not written")


def shard_file(number: int, count: int) -> str:
    """The name of a file of several, the first of which is 1."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def index_json(tensors: Mapping[str, TensorInfo | str], total_bytes: int) -> bytes:
    """The text of `model.safetensors.index.json`: name → file, and the sum of the tensors' bytes."""
    weight_map = {name: given if isinstance(given, str) else given.file for name, given in sorted(tensors.items())}
    value = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    return (json.dumps(value, indent=2) + "\n").encode()
