"""A model's weights written anew as a stream: spans of a tensor's rows are read, made into others and written in order.
Some threads read and work, this one hashes and writes; a file's last bytes are on their way while the next is made.
Memory: some spans, whatever the model. Untouched files are copied; a file that is whole when the process is killed is
kept. Spans are changed where they lie, in tiles whose float32 stays in the processor's cache, and rooms are used again:
where each step took new memory, a merge was 1.6 times as dear.
"""

import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.progress import Progress
from zhllama.storage.prefetch import map_ordered
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
Figures = Sequence[float]
"""Of rows: ‖after − before‖² and ‖before‖² (Frobenius) where there were some before; how many are new; parts of these
that are not finite."""
NONE: Figures = (0.0,) * 4


class Pool:
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


class Span(NamedTuple):
    """Some rows of a tensor, the first of them and how many, and what is to be done to them."""

    info: TensorInfo
    first: int
    rows: int
    work: Any


class Made(NamedTuple):
    """A span's rows, as they are written, their figures, and the rooms that are free once they are written."""

    rows: torch.Tensor
    figures: Figures
    rooms: list[torch.Tensor]


def rewrite(
    checkpoint: Checkpoint,
    touched: Set[str],
    shapes: Shapes,
    spans_of: Callable[[TensorInfo], Iterable[Span]],
    make: Callable[[Span, Pool, Pool], Made],
    out: ArtifactWriter,
    not_finite: str,
) -> Report:
    """Writes every file of weights, its tensors in their order, and returns the report of the touched ones.
    spans_of: of a tensor, all the rows that its shape among `shapes` has, in order. make: in any thread; the pools have
    rooms for spans and for what is computed with. not_finite: what an InputError says of numbers that are not, with
    {name} and {dtype}."""
    reports: dict[str, Report] = {}
    left: dict[str, list[TensorInfo]] = {}
    pool, tiles = Pool(5 * SPAN), Pool(5 * 4 * TILE)

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
        spans = (span for infos in left.values() for info in infos for span in spans_of(info))
        # two at least: one may wait for the network
        threads = max(2, min(threads, MOST_THREADS))
        every = after.enter_context(closing(map_ordered(lambda span: make(span, pool, tiles), spans, threads)))
        for file, infos in left.items():
            with ExitStack() as stack:
                stream = stack.enter_context(out.writer(file))
                tensors = SafetensorsStream(stream, {info.name: (info.dtype, shapes[info.name]) for info in infos})
                reports[file] = {}
                for info in infos:
                    figures, count = NONE, 0
                    while count < shapes[info.name][0]:
                        made = next(every)
                        tensors.write(info.name, made.rows)
                        figures = summed(figures, made.figures)
                        count += made.rows.shape[0]
                        bar.advance(made.rows.nbytes)
                        pool.give(made.rooms)
                    if info.name in touched:
                        entry = _entry(shapes[info.name], figures)
                        if entry is None:
                            raise InputError(not_finite.format(name=info.name, dtype=info.dtype))
                        reports[file][info.name] = entry
                tensors.close()
                written = stack.pop_all()
            ending.result()
            ending = finisher.submit(finish, written, file)
        ending.result()
    if INDEX in checkpoint.artifact:
        out.add_bytes(INDEX, index_json(checkpoint.tensors, bytes_after(checkpoint, shapes)))
    return {name: entry for file in checkpoint.files for name, entry in reports[file].items()}


def _entry(shape: tuple[int, ...], figures: Figures) -> dict[str, Any] | None:
    """Of the report: the tensor's shape, its relative change and, where rows are new, how many. None for numbers that
    are not finite."""
    changed, whole, new, broken = figures
    relative = (changed / whole) ** 0.5 if whole else float(changed > 0)
    if broken or not math.isfinite(changed) or not math.isfinite(relative):
        return None
    return {"shape": list(shape), "relative_change": relative, **({"new_rows": int(new)} if new else {})}


def compared(after: torch.Tensor, old: torch.Tensor | None, room: torch.Tensor) -> Figures:
    """old: the rows before, in float32. room: as large, and written over. Parts' squares are summed in float32."""
    if old is None:
        return 0, 0, after.shape[0], not torch.isfinite(after).all()
    before, change = old.view(-1), room.copy_(after).sub_(old).view(-1)
    return float(torch.dot(change, change)), float(torch.dot(before, before)), 0, 0


def summed(figures: Figures, more: Figures) -> Figures:
    return [one + other for one, other in zip(figures, more, strict=True)]


def spans_between(info: TensorInfo, rows: int, bounds: Iterable[int], work: Any) -> Iterator[Span]:
    """The `rows` rows of a tensor in like parts of about SPAN elements, of which none goes over one of the bounds."""
    for begin, end in pairwise(sorted({0, rows, *(bound for bound in bounds if bound < rows)})):
        for first, last in parts(begin, end, info.shape, SPAN):
            yield Span(info, first, last - first, work)


def tiles_of(rows: torch.Tensor) -> list[tuple[int, int]]:
    """The parts of some rows that are merged at once."""
    return parts(0, rows.shape[0], rows.shape, TILE)


def parts(begin: int, end: int, shape: Sequence[int], elements: int) -> list[tuple[int, int]]:
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
