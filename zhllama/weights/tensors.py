"""Where a tensor lies in a file of an artifact, whatever the format, and its rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from zhllama.artifacts.reader import Artifact

if TYPE_CHECKING:
    import torch

    Room = Callable[[int], torch.Tensor]


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: file, dtype (torch's name), shape, first byte in the file, bytes."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    length: int


class Sink(Protocol):
    def write(self, data: bytes | bytearray | memoryview) -> int: ...


def read_rows(
    artifact: Artifact, info: TensorInfo, first: int = 0, count: int | None = None, room: "Room | None" = None
) -> "torch.Tensor":
    """Rows of a tensor of a file, verified; as Checkpoint.read."""
    import torch

    kind = getattr(torch, info.dtype)
    rows = info.shape[0] if info.shape else 1
    count = rows - first if count is None else count
    if first < 0 or count < 0 or first + count > rows:
        raise ValueError(f"{info.name}: rows {first} to {first + count} asked of {rows}")
    row = info.length // max(rows, 1)
    shape = (count, *info.shape[1:]) if info.shape else ()
    if count == 0 or row == 0:
        return torch.empty(shape, dtype=kind)
    content = room(count * row) if room else torch.empty(count * row, dtype=torch.uint8)
    artifact.read_into(info.file, info.start + first * row, content.numpy().data)
    return content.view(kind).reshape(shape)
