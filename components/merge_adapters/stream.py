"""Adapters merged into a model's tensors, some rows at a time (zhllama/weights/stream.py): spans are passed through the
adapters in order and rounded after each to the model's dtype. A GB of float16 at rank 64 takes 1.1 CPU-seconds, 0.7 of
them for the product.
"""

from collections.abc import Iterator, Sequence

import torch

from zhllama.artifacts.writer import ArtifactWriter
from zhllama.weights.adapter import Adapter, Change
from zhllama.weights.safetensors_io import Checkpoint, TensorInfo
from zhllama.weights.stream import (
    NONE,
    Made,
    Pool,
    Report,
    Shapes,
    Span,
    compared,
    rewrite,
    spans_between,
    summed,
    tiles_of,
)  # fmt: skip


def merge_weights(checkpoint: Checkpoint, adapters: Sequence[Adapter], shapes: Shapes, out: ArtifactWriter) -> Report:
    """Writes every file of weights, and returns the report of what the adapters touched."""

    def spans_of(info: TensorInfo) -> Iterator[Span]:
        # a part never goes over the number of rows that the model or an adapter has
        changes = [Change(adapter, info.name) for adapter in adapters if info.name in adapter.touched]
        bounds = {info.shape[0], *(c.adapter.stored[c.replaced].shape[0] for c in changes if c.replaced is not None)}
        return spans_between(info, shapes[info.name][0], bounds, changes)

    def make(span: Span, pool: Pool, tiles: Pool) -> Made:
        return _merge_span(checkpoint, pool, tiles, span)

    touched = set().union(*(adapter.touched for adapter in adapters))
    not_finite = (
        "--adapters: {name} is not finite after the merge; an adapter holds NaN or overflows {dtype}, train it again"
    )
    return rewrite(checkpoint, touched, shapes, spans_of, make, out, not_finite)


def _merge_span(checkpoint: Checkpoint, pool: Pool, tiles: Pool, span: Span) -> Made:
    info, first, count, every = span
    rooms: list[torch.Tensor] = []

    def take(length: int) -> torch.Tensor:
        rooms.append(pool.take(length))
        return rooms[-1][:length]

    before = checkpoint.read(info.name, first, count, take) if first < info.shape[0] else None
    changes, start = _counting(every, first, before is not None)
    rows = before if start is None else start.brought(first, count, take)
    assert rows is not None, "rows that neither the model nor an adapter has"
    dtype: torch.dtype = getattr(torch, info.dtype)
    if rows.dtype != dtype:
        rows = take(rows.numel() * dtype.itemsize).view(dtype).view(rows.shape).copy_(rows)
    # what stands only part of the way in the place of what was there
    brought = [None if change is start else change.brought(first, count, take) for change in changes]
    figures = NONE
    if changes:
        parts = tiles_of(rows)
        most = max(end - begin for begin, end in parts) * rows[0].numel()
        work = tiles.take(3 * 4 * most)
        room = work[: 3 * 4 * most].view(torch.float32).view(3, most)
        for begin, end in parts:
            tile = rows[begin:end]
            old, other, product = (part[: tile.numel()].view(tile.shape) for part in room)
            if before is not None:
                old.copy_(before[begin:end])
            values = old if rows is before else other.copy_(tile)
            for change, whole in zip(changes, brought, strict=True):
                change.apply(first + begin, tile, values, product, None if whole is None else whole[begin:end])
                if change is not changes[-1]:
                    values = other.copy_(tile)
            figures = summed(figures, compared(tile, None if before is None else old, product))
        tiles.give([work])
    return Made(rows, figures, rooms)


def _counting(every: Sequence[Change], first: int, known: bool) -> tuple[Sequence[Change], Change | None]:
    """The changes that count for the rows from `first` on, and the first of them where it brings these: that makes void
    what was before it, unless it has a scale and there were such rows (`known`: in the model)."""
    start = None
    for index, change in enumerate(every):
        if change.brings(first):
            if change.adapter.scale == 1 or not known:
                start = index
            known = True
    return (every, None) if start is None else (every[start:], every[start])
