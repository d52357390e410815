"""Merging as a stream: spans of a tensor's rows are read, passed through the adapters in order, rounded after each to
the model's dtype, and written. Some threads read and merge spans, this one hashes and writes them in order; a file's
last bytes are on their way while the next is merged. Memory: some spans, whatever the model. Untouched files are
copied; a file that is whole when the process is killed is kept. Spans are merged where they lie, in tiles whose float32
stays in the processor's cache, and rooms are used again: a GB of float16 at rank 64 takes 1.1 CPU-seconds, 0.7 of them
for the product, where new memory at each step made it 1.6 times as dear.
"""

import logging
import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from itertools import pairwise
from typing import Any

import torch

from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.progress import Progress
from zhllama.storage.prefetch import map_ordered
from zhllama.weights.adapter import Adapter, Change
from zhllama.weights.safetensors_io import INDEX, Checkpoint, SafetensorsStream, TensorInfo, index_json

log = logging.getLogger("merge")

SPAN = 2**24
"""Elements of a tensor that are read at once."""
TILE = 2**19
"""Elements that are merged at once."""
MOST_THREADS = 3
"""The most spans that are merged side by side: so many keep the thread busy that writes, and more would take memory."""
FEWEST_ROWS = 64
"""Products of few rows or columns are made by other kernels, whose last bits differ: measured at ranks 2 to 128 and
widths to 2048, parts of 64 and more had the bits of the whole, parts of 7 had not."""

Shapes = Mapping[str, tuple[int, ...]]
Report = dict[str, dict[str, Any]]


class _Pool:
    """Memory that is used again and again, by any thread. Rooms too small for what is asked are given up."""

    def __init__(self, least: int) -> None:
        """least: bytes of a room; what is not written to takes no memory."""
        self._least = least
        self._free: list[torch.Tensor] = []
        self._lock = threading.Lock()

    def take(self, length: int) -> torch.Tensor:
        """A room of so many bytes, or more."""
        with self._lock:
            while self._free:
                room = self._free.pop()
                if len(room) >= length:
                    return room
        return torch.empty(max(length, self._least), dtype=torch.uint8)

    def give(self, rooms: Iterable[torch.Tensor]) -> None:
        with self._lock:
            self._free += rooms


_Figures = Sequence[float]
"""Of rows: ‖after − before‖² and ‖before‖² (Frobenius) where there were some before; how many are new; parts of these
that are not finite."""
_Span = tuple[TensorInfo, int, int, Sequence[Change]]
"""A tensor, the first of some of its rows, how many, and the changes of that tensor in order."""
_Merged = tuple[torch.Tensor, _Figures, list[torch.Tensor]]
"""A span's rows after the merge, their figures, and the rooms that are free once they are written."""


def merge_weights(checkpoint: Checkpoint, adapters: Sequence[Adapter], shapes: Shapes, out: ArtifactWriter) -> Report:
    """Writes every file of weights, and returns the report of what the adapters touched."""
    touched = set().union(*(adapter.touched for adapter in adapters))
    reports: dict[str, Report] = {}
    left: dict[str, list[TensorInfo]] = {}
    pool, tiles = _Pool(5 * SPAN), _Pool(5 * 4 * TILE)

    def finish(written: ExitStack, file: str) -> None:
        written.close()
        out.record_complete(file, reports[file])

    with ExitStack() as after:
        bar = after.enter_context(Progress("merging", sum(info.length for info in checkpoint.tensors.values())))
        for file in checkpoint.files:
            infos = [info for info in checkpoint.tensors.values() if info.file == file]
            found = out.resume_record(file)
            if found is not None:
                log.info("%s: kept from a run that was ended", file)
            elif file not in checkpoint.partly and touched.isdisjoint(info.name for info in infos):
                out.copy(checkpoint.artifact, file)
                out.record_complete(file, found := {})
            else:
                left[file] = sorted(infos, key=lambda info: info.start)
                continue
            reports[file] = found
            bar.advance(sum(info.length for info in infos))

        # spans are what is merged side by side, not the operations on them: threads that wait for each other spin
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        after.callback(torch.set_num_threads, threads)
        finisher = after.enter_context(ThreadPoolExecutor(1))
        ending: Future[None] = finisher.submit(lambda: None)
        spans = (span for infos in left.values() for span in _spans(infos, adapters, shapes))
        # two at least: one may wait for the network
        threads = max(2, min(threads, MOST_THREADS))
        work = map_ordered(lambda span: _merge_span(checkpoint, pool, tiles, *span), spans, threads)
        merged = after.enter_context(closing(work))
        for file, infos in left.items():
            with ExitStack() as stack:
                stream = stack.enter_context(out.writer(file))
                tensors = SafetensorsStream(stream, {info.name: (info.dtype, shapes[info.name]) for info in infos})
                reports[file] = {}
                for info in infos:
                    figures, count = [0.0] * 4, 0
                    while count < shapes[info.name][0]:
                        rows, more, rooms = next(merged)
                        tensors.write(info.name, rows)
                        figures = _sum(figures, more)
                        count += rows.shape[0]
                        bar.advance(rows.nbytes)
                        pool.give(rooms)
                    if info.name in touched:
                        reports[file][info.name] = _entry(info, shapes[info.name], figures)
                tensors.close()
                written = stack.pop_all()
            ending.result()
            ending = finisher.submit(finish, written, file)
        ending.result()
    if INDEX in checkpoint.artifact:
        out.add_bytes(INDEX, index_json(checkpoint.tensors, bytes_after(checkpoint, shapes)))
    return {name: entry for file in checkpoint.files for name, entry in reports[file].items()}


def _entry(info: TensorInfo, shape: tuple[int, ...], figures: _Figures) -> dict[str, Any]:
    """Of the report: the tensor's shape, its relative change and, where rows are new, how many. InputError for numbers
    that are not finite."""
    changed, whole, new, broken = figures
    relative = (changed / whole) ** 0.5 if whole else float(changed > 0)
    if broken or not math.isfinite(changed) or not math.isfinite(relative):
        raise InputError(
            f"--adapters: {info.name} is not finite after the merge; an adapter holds NaN or overflows {info.dtype}, "
            "train it again"
        )
    return {"shape": list(shape), "relative_change": relative, **({"new_rows": int(new)} if new else {})}


def _spans(infos: Sequence[TensorInfo], adapters: Sequence[Adapter], shapes: Shapes) -> Iterator[_Span]:
    """The tensors' rows in the order of the file, in like parts of about SPAN elements. A part never goes over the
    number of rows that the model or an adapter has."""
    for info in infos:
        rows = shapes[info.name][0]
        changes = [Change(adapter, info.name) for adapter in adapters if info.name in adapter.touched]
        has = {info.shape[0], *(a.stored[a.replaced[info.name]].shape[0] for a in adapters if info.name in a.replaced)}
        for begin, end in pairwise(sorted({0, rows, *(count for count in has if count < rows)})):
            for first, last in _parts(begin, end, info.shape, SPAN):
                yield info, first, last - first, changes


def _merge_span(
    checkpoint: Checkpoint, pool: _Pool, tiles: _Pool, info: TensorInfo, first: int, count: int, every: Sequence[Change]
) -> _Merged:
    rooms: list[torch.Tensor] = []

    def take(length: int) -> torch.Tensor:
        rooms.append(pool.take(length))
        return rooms[-1][:length]

    before = checkpoint.read(info.name, first, count, take) if first < info.shape[0] else None
    # rows that an adapter brings make void what the adapters before it did
    bringing = [index for index, change in enumerate(every) if change.brings(first)]
    changes = every[bringing[-1] :] if bringing else every
    if bringing:
        rows = changes[0].adapter.read(changes[0].replaced, first, count, take)
        dtype: torch.dtype = getattr(torch, info.dtype)
        if rows.dtype != dtype:
            rows = take(rows.numel() * dtype.itemsize).view(dtype).view(rows.shape).copy_(rows)
    else:
        assert before is not None, "rows that neither the model nor an adapter has"
        rows = before
    figures = [0.0] * 4
    if changes:
        parts = _parts(0, count, rows.shape, TILE)
        most = max(end - begin for begin, end in parts) * rows[0].numel()
        work = tiles.take(3 * 4 * most)
        room = work[: 3 * 4 * most].view(torch.float32).view(3, most)
        for begin, end in parts:
            tile = rows[begin:end]
            old, other, product = (part[: tile.numel()].view(tile.shape) for part in room)
            if before is not None:
                old.copy_(before[begin:end])
            values = old if rows is before else other.copy_(tile)
            for change in changes:
                change.apply(first + begin, tile, values, product)
                if change is not changes[-1]:
                    values = other.copy_(tile)
            figures = _sum(figures, _compared(tile, None if before is None else old, product))
        tiles.give([work])
    return rows, figures, rooms


def _compared(after: torch.Tensor, old: torch.Tensor | None, room: torch.Tensor) -> _Figures:
    """old: the rows before, in float32. room: as large, and written over. Parts' squares are summed in float32."""
    if old is None:
        return 0, 0, after.shape[0], not torch.isfinite(after).all()
    before, change = old.view(-1), room.copy_(after).sub_(old).view(-1)
    return float(torch.dot(change, change)), float(torch.dot(before, before)), 0, 0


def _sum(figures: _Figures, more: _Figures) -> list[float]:
    return [one + other for one, other in zip(figures, more, strict=True)]


def _parts(begin: int, end: int, shape: Sequence[int], elements: int) -> list[tuple[int, int]]:
    """`begin` to `end` in parts of about so many elements: multiples of FEWEST_ROWS, what is over in the last one."""
    rows = elements // max(1, math.prod(shape[1:])) // FEWEST_ROWS * FEWEST_ROWS
    step = max(FEWEST_ROWS, rows)
    starts = list(range(begin, max(begin + 1, end - FEWEST_ROWS + 1), step))
    return list(pairwise([*starts, end]))


def bytes_after(checkpoint: Checkpoint, shapes: Shapes) -> int:
    """Bytes of all tensors once they have these shapes."""
    return sum(
        info.length // max(1, math.prod(info.shape)) * math.prod(shapes[name])
        for name, info in checkpoint.tensors.items()
    )
