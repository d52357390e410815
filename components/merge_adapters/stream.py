"""Merging as a stream: some rows of a tensor are read, passed through the adapters in order, rounded after each to the
model's dtype, and written; reading, arithmetic and writing run side by side. Memory: some rows, whatever the model. No
local copy; files that no adapter touches are copied. A file that is whole when the process is killed is kept for the
next start.

Rows are read in large spans (several requests side by side) and merged in small tiles, whose float32 stays in the
processor's cache: the arithmetic of a GB of float16 is 1.1 CPU-seconds, of which the product takes 0.8; in tiles of 4
million elements it is 2.
"""

import logging
import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from components.merge_adapters.lora import Adapter, Change
from components.shared.ahead import ahead, in_order
from components.shared.artifact import ArtifactWriter
from components.shared.errors import InputError
from components.shared.progress import Progress
from components.shared.safetensors_io import INDEX, Checkpoint, SafetensorsStream, TensorInfo, index_json

log = logging.getLogger("merge")

SPAN = 2**24
"""Elements of a tensor that are read at once."""
TILE = 2**19
"""Elements that are merged at once."""
FEWEST_ROWS = 64
"""Products of few rows or columns are made by other kernels, whose last bits differ: measured at ranks 2 to 128 and
widths to 2048, parts of 64 and more had the bits of the whole, parts of 7 had not."""


@dataclass(frozen=True)
class _Rows:
    """Rows `first` to `first + count` of a tensor, as the model has them; None for rows that only adapters bring.

    brought: what the adapters put in their place, one entry for each of the tensor's changes.
    """

    first: int
    count: int
    before: torch.Tensor | None
    changes: Sequence[Change]
    brought: Sequence[torch.Tensor | None]
    dtype: torch.dtype

    def tiles(self) -> Iterator["_Rows"]:
        """The same rows in parts of about TILE elements."""
        shape = next(rows.shape for rows in (self.before, *self.brought) if rows is not None)
        for begin, end in _parts(0, self.count, shape, TILE):
            before, *brought = (None if rows is None else rows[begin:end] for rows in (self.before, *self.brought))
            yield _Rows(self.first + begin, end - begin, before, self.changes, brought, self.dtype)

    def merged(self) -> torch.Tensor:
        rows = self.before
        for change, brought in zip(self.changes, self.brought):
            rows = rows if brought is None else brought
            if rows is not None:
                rows = change.apply(self.first, rows, self.dtype)
        assert rows is not None, "rows that neither the model nor an adapter has"
        return rows


def merge_weights(
    checkpoint: Checkpoint, adapters: Sequence[Adapter], shapes: Mapping[str, tuple[int, ...]], out: ArtifactWriter
) -> dict[str, dict[str, Any]]:
    """Writes every file of weights, and returns the report of what the adapters touched."""
    touched = set().union(*(adapter.touched for adapter in adapters))
    report: dict[str, dict[str, Any]] = {}
    with (
        _one_thread_each() as threads,
        Progress("merging", sum(info.length for info in checkpoint.tensors.values())) as bar,
    ):
        for file in checkpoint.files:
            infos = sorted(
                (info for info in checkpoint.tensors.values() if info.file == file), key=lambda info: info.start
            )
            found = out.kept(file)
            if found is None:
                if touched.intersection(info.name for info in infos):
                    found = _merge_file(checkpoint, file, infos, adapters, shapes, out, bar, threads)
                else:
                    out.copy(checkpoint.artifact, file)
                    found = {}
                    bar.advance(sum(info.length for info in infos))
                out.keep(file, found)
            else:
                log.info("%s: kept from a run that was ended", file)
                bar.advance(sum(info.length for info in infos))
            report |= found
    if INDEX in checkpoint.artifact:
        out.add_bytes(INDEX, index_json(checkpoint.tensors, bytes_after(checkpoint, shapes)))
    return report


@contextmanager
def _one_thread_each() -> Iterator[int]:
    """Tiles are what runs side by side, not the operations in them (threads that wait for each other spin); how many
    at a time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _merge_file(
    checkpoint: Checkpoint,
    file: str,
    infos: Sequence[TensorInfo],
    adapters: Sequence[Adapter],
    shapes: Mapping[str, tuple[int, ...]],
    out: ArtifactWriter,
    bar: Progress,
    threads: int,
) -> dict[str, dict[str, Any]]:
    report: dict[str, dict[str, Any]] = {}
    with (
        out.writer(file) as stream,
        closing(_merged_rows(checkpoint, infos, adapters, shapes, report, threads)) as parts,
    ):
        tensors = SafetensorsStream(stream, {info.name: (info.dtype, shapes[info.name]) for info in infos})
        for name, rows in parts:
            tensors.write(name, rows)
            bar.advance(rows.nbytes)
        tensors.close()
    return report


def _merged_rows(
    checkpoint: Checkpoint,
    infos: Sequence[TensorInfo],
    adapters: Sequence[Adapter],
    shapes: Mapping[str, tuple[int, ...]],
    report: dict[str, dict[str, Any]],
    threads: int,
) -> Generator[tuple[str, torch.Tensor], None, None]:
    """The rows of a file's tensors after the merge, with the tensor's name; what changed is put into `report`."""
    with (
        closing(ahead(_all_rows(checkpoint, infos, adapters, shapes))) as spans,
        closing(in_order(_merge_tile, _tiles(spans), threads)) as tiles,
    ):
        for info in infos:
            compared = _Compared()
            rows = 0
            while rows < shapes[info.name][0]:
                weight, of_tile = next(tiles)
                compared.add(of_tile)
                rows += weight.shape[0]
                yield info.name, weight
            if any(info.name in adapter.touched for adapter in adapters):
                report[info.name] = entry = compared.entry(shapes[info.name])
                if not math.isfinite(entry["relative_change"]) or not compared.finite:
                    raise InputError(
                        f"--adapters: {info.name} is not finite after the merge; an adapter holds NaN or overflows "
                        f"{info.dtype}, train it again"
                    )


def _tiles(spans: Iterable["_Rows"]) -> Iterator["_Rows"]:
    for span in spans:
        yield from span.tiles()


def _merge_tile(tile: "_Rows") -> tuple[torch.Tensor, "_Compared"]:
    """A tile after the merge, and what changed."""
    weight = tile.merged()
    compared = _Compared()
    if tile.changes:
        compared.compare(tile.before, weight)
    return weight, compared


def _all_rows(
    checkpoint: Checkpoint,
    infos: Sequence[TensorInfo],
    adapters: Sequence[Adapter],
    shapes: Mapping[str, tuple[int, ...]],
) -> Iterator[_Rows]:
    """The tensors' rows in the order of the file, in like parts of about SPAN elements, with what adapters do to them.

    A part never goes over the number of rows that the model or an adapter has.
    """
    for info in infos:
        rows, dtype = shapes[info.name][0], getattr(torch, info.dtype)
        changes = [adapter.change(info.name) for adapter in adapters if info.name in adapter.touched]
        has = {info.shape[0], *(a.stored[a.replaced[info.name]].shape[0] for a in adapters if info.name in a.replaced)}
        for begin, end in pairwise(sorted({0, rows, *(count for count in has if count < rows)})):
            for first, last in _parts(begin, end, info.shape, SPAN):
                known = last <= info.shape[0]
                before = checkpoint.read_rows(info.name, first, last - first) if known else None
                brought = [change.brought(first, last - first) for change in changes]
                yield _Rows(first, last - first, before, changes, brought, dtype)


def _parts(begin: int, end: int, shape: Sequence[int], elements: int) -> list[tuple[int, int]]:
    """`begin` to `end` in parts of about so many elements: multiples of FEWEST_ROWS, what is over in the last one."""
    rows = elements // max(1, math.prod(shape[1:])) // FEWEST_ROWS * FEWEST_ROWS
    step = max(FEWEST_ROWS, rows)
    starts = list(range(begin, max(begin + 1, end - FEWEST_ROWS + 1), step))
    return list(pairwise([*starts, end]))


class _Compared:
    """‖after − before‖ / ‖before‖ (Frobenius) over the rows that both have, summed up part by part."""

    def __init__(self) -> None:
        self._changed = self._whole = 0.0
        self._new = 0
        self.finite = True

    def add(self, other: "_Compared") -> None:
        self._changed += other._changed
        self._whole += other._whole
        self._new += other._new
        self.finite = self.finite and other.finite

    def compare(self, before: torch.Tensor | None, after: torch.Tensor) -> None:
        if before is None:
            self._new += after.shape[0]
            self.finite = self.finite and bool(torch.isfinite(after).all())
            return
        old = before.float()
        self._whole += _square(old)
        self._changed += _square(old.sub_(after))

    def entry(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """Of the report: the tensor's shape, its relative change and, where rows are new, how many."""
        relative = (self._changed / self._whole) ** 0.5 if self._whole else float(self._changed > 0)
        relative = relative if math.isfinite(self._changed) else self._changed
        new = {"new_rows": self._new} if self._new else {}
        return {"shape": list(shape), "relative_change": relative, **new}


def _square(values: torch.Tensor) -> float:
    """The sum of squares: of parts in float32, of the parts' sums in float64."""
    return float(torch.linalg.vector_norm(values).double().square())


def bytes_after(checkpoint: "Checkpoint", shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of all tensors once they have these shapes."""
    return sum(
        info.length // max(1, math.prod(info.shape)) * math.prod(shapes[name])
        for name, info in checkpoint.tensors.items()
    )
