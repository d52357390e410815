"""Models of one shape, blended: rows of a tensor between two models, or with a difference of two others added.

Arithmetic is in float32 (float64 where one of the models is), rounded once to the dtype of the model that is changed.
linear: (1 − w)·a + w·b, two products and a sum. slerp (Shoemake 1985): a·sin((1 − w)Ω)/sin Ω + b·sin(wΩ)/sin Ω with
the angle Ω between the two tensors as vectors, of float64 sums; linear where they are as good as parallel. chat vector
(Huang et al. 2023): a + w·(b − c). At 0 and 1 the bits are those of the one model or the other.

Tensors have a weight by their group. A bias goes with its matrix, the norms of queries and keys with attention; the
norms between the halves of a layer, and the last one, are a group of their own.
"""

import math
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch

from zhllama.models.architecture import EMBEDDING, HEAD
from zhllama.weights.blend_plan import Rows
from zhllama.weights.safetensors_io import Checkpoint
from zhllama.weights.stream import NONE, SPAN, Figures, Made, Pool, Span, compared, parts, summed, tiles_of

if TYPE_CHECKING:
    from zhllama.weights.tensors import Room

Group = Literal["embeddings", "attention", "feed_forward", "norms"]
PARALLEL = 0.9995
"""The cosine from which on two tensors are as good as parallel: there the sines of the formula cancel."""
SHORTEST = 1e-8
"""The length from which on a tensor has a direction."""


def group_of(name: str) -> Group:
    """The group of a tensor, by transformers' name of it."""
    if name in (EMBEDDING, HEAD):
        return "embeddings"
    return "attention" if ".self_attn." in name else "feed_forward" if ".mlp." in name else "norms"


class Blend:
    """What becomes of the tensors of a model. `cosines`: of slerp, name → cosine of the angle, as far as tensors were
    asked for."""

    def __init__(
        self,
        method: str,
        weights: Mapping[str, float],
        models: Sequence[Checkpoint],
        rows: Mapping[str, Rows],
    ) -> None:
        """models: the one that is changed, the other, and for a chat vector that one's base. rows: of every tensor that
        all have."""
        self.method, self.models, self.rows = method, models, rows
        self.weights = {name: weights[group_of(name)] for name in rows}
        self.cosines: dict[str, float] = {}
        self._locks = {name: threading.Lock() for name in rows}
        grown = {name for name, has in rows.items() if has.own < has.all}
        self.touched = grown | {name for name, weight in self.weights.items() if weight}
        """The tensors that may change."""

    def shares(self, name: str) -> tuple[float, float]:
        """Of the first model's tensor, and of the second's (of a chat vector, of the difference)."""
        weight = self.weights[name]
        if self.method == "chat-vector":
            return 1.0, weight
        if self.method == "slerp":
            with self._locks[name]:
                if name not in self.cosines:
                    self.cosines[name] = self._cosine(name)
            if abs(cosine := self.cosines[name]) <= PARALLEL:
                angle = math.acos(cosine)
                return math.sin((1 - weight) * angle) / math.sin(angle), math.sin(weight * angle) / math.sin(angle)
        return 1 - weight, weight

    def _cosine(self, name: str) -> float:
        """Of the angle between two tensors; of one that is all but zero, its own length counts as 1."""
        both = one = other = 0.0
        for begin, end in parts(0, self.rows[name].blended, self.models[0].info(name).shape, SPAN):
            first, second = (model.read(name, begin, end - begin) for model in self.models)
            for start, stop in tiles_of(first):
                a, b = (rows[start:stop].double().view(-1) for rows in (first, second))
                both, one, other = both + float(a @ b), one + float(a @ a), other + float(b @ b)
        lengths = [length if (length := math.sqrt(square)) > SHORTEST else 1.0 for square in (one, other)]
        return max(-1.0, min(1.0, both / lengths[0] / lengths[1]))

    def make(self, span: Span, pool: Pool, tiles: Pool) -> Made:
        """Rows of a tensor, as stream.rewrite asks for them."""
        name, first, count = span.info.name, span.first, span.rows
        rooms: list[torch.Tensor] = []

        def take(length: int) -> torch.Tensor:
            rooms.append(pool.take(length))
            return rooms[-1][:length]

        if name not in self.rows or first >= self.rows[name].blended:
            return self._whole(name, first, count, take, rooms)
        rows = self.models[0].read(name, first, count, take)
        others = [model.read(name, first, count, take) for model in self.models[1:]] if self.weights[name] else []
        figures = self._blend(rows, others, self.shares(name), tiles) if others else NONE
        pool.give(rooms[1:])
        return Made(rows, figures, rooms[:1])

    def _whole(self, name: str, first: int, count: int, take: "Room", rooms: list[torch.Tensor]) -> Made:
        """Rows that one model alone has, or of a tensor that says nothing."""
        if name not in self.rows or first < self.rows[name].own:
            rows, known = self.models[0].read(name, first, count, take), 0.0
            for begin, end in tiles_of(rows) if name in self.touched else ():
                known += float(rows[begin:end].float().square().sum())
            return Made(rows, (0, known, 0, 0), rooms)
        rows = self.models[1].read(name, first, count, take).to(getattr(torch, self.models[0].info(name).dtype))
        return Made(rows, compared(rows, None, rows), rooms)

    def _blend(
        self, rows: torch.Tensor, others: Sequence[torch.Tensor], shares: tuple[float, float], tiles: Pool
    ) -> Figures:
        """Changes rows in their place."""
        one, two = shares
        dtype = torch.float64 if torch.float64 in {rows.dtype, *(other.dtype for other in others)} else torch.float32
        cuts = tiles_of(rows)
        most = max(end - begin for begin, end in cuts) * rows[0].numel()
        work = tiles.take(3 * dtype.itemsize * most)
        room = work[: 3 * dtype.itemsize * most].view(dtype).view(3, most)
        figures = NONE
        for begin, end in cuts:
            tile = rows[begin:end]
            old, other, product = (part[: tile.numel()].view(tile.shape) for part in room)
            old.copy_(tile)
            other.copy_(others[0][begin:end])
            if self.method == "chat-vector":
                tile.copy_(other.sub_(product.copy_(others[1][begin:end])).mul_(two).add_(old))
            elif one == 0:
                # not a sum with zero, which makes a −0 a 0
                tile.copy_(other)
            else:
                tile.copy_(torch.mul(old, one, out=product).add_(other.mul_(two)))
            figures = summed(figures, compared(tile, old, product))
        tiles.give([work])
        return figures
