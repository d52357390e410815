"""A Meta checkpoint as one model: its shards indexed, checked against params.json, and joined tensor by tensor.

Everything that can be wrong about the shards is found from their indices, before a weight is read. Memory of a read:
the whole tensor, one shard's part of it, and the permuted copy for wq and wk.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.weights.meta_format import (
    DROPPED,
    EMBEDDING,
    PARAMS,
    MetaParams,
    Place,
    extents,
    permute,
    places,
    shard_name,
)
from zhllama.weights.torch_zip import PthFile

if TYPE_CHECKING:
    import torch

_SHARD = re.compile(r"consolidated\.(\d+)\.pth")


@dataclass(frozen=True)
class Joined:
    """A tensor of the whole model, under its Hugging Face name."""

    place: Place
    dtype: str
    shape: tuple[int, ...]


class MetaModel:
    """The tensors of a Meta checkpoint by Hugging Face name, in the order of `places`."""

    def __init__(self, weights: Artifact, option: str) -> None:
        where = f"{option} {weights.root}"
        if PARAMS not in weights:
            raise InputError(
                f"{where}: no {PARAMS} in it; give a folder with Meta's files, or what fetch_weights wrote"
            )
        self.params = MetaParams.from_json(weights.read(PARAMS), f"{where}/{PARAMS}")
        numbers = sorted(int(found[1]) for name in weights.names if (found := _SHARD.fullmatch(name)))
        if not numbers:
            raise InputError(f"{where}: no {shard_name(0)} in it; give a folder with Meta's files")
        missing = sorted(set(range(numbers[-1] + 1)) - set(numbers))
        if missing:
            raise InputError(f"{where}: the shard {shard_name(missing[0])} is missing; fetch the weights again")
        self.shards = [PthFile(weights, shard_name(number)) for number in numbers]
        self.tensors = {joined.place.hf: joined for joined in self._joined()}
        self.vocabulary_rows = self.tensors[EMBEDDING].shape[0]
        self.width = self.tensors["model.layers.0.mlp.gate_proj.weight"].shape[0]
        self.dtype = self.tensors[EMBEDDING].dtype

    def _joined(self) -> list[Joined]:
        params = self.params
        found = []
        for place in places(params.n_layers, params.n_heads, params.kv_heads):
            for shard in self.shards:
                if place.meta not in shard.tensors:
                    raise InputError(
                        f"{shard.where}: no tensor {place.meta}, where {PARAMS} says {params.n_layers} layers; the "
                        "files do not belong together, fetch them again"
                    )
            found.append(self._join(place))
        expected = {place.place.meta for place in found}
        for shard in self.shards:
            more = sorted(name for name in set(shard.tensors) - expected if not DROPPED.search(name))
            if more:
                raise InputError(
                    f"{shard.where}: tensor {more[0]} is none of a LLaMA model with {params.n_layers} layers; "
                    f"does {PARAMS} belong to these shards?"
                )
        return found

    def _join(self, place: Place) -> Joined:
        parts = [shard.tensors[place.meta] for shard in self.shards]
        whole = list(parts[0].shape)
        if place.axis is not None and len(whole) > place.axis:
            whole[place.axis] = sum(part.shape[place.axis] for part in parts)
        wanted = self._shape(place, whole)
        for index, (shard, part) in enumerate(zip(self.shards, parts)):
            shape = list(wanted)
            if place.axis is not None and not place.uneven:
                if shape[place.axis] % len(parts):
                    raise InputError(
                        f"{shard.where}: {place.meta} ({shape[place.axis]} along axis {place.axis}) cannot lie in "
                        f"{len(parts)} equal shards; a shard is missing, or {PARAMS} belongs to other weights"
                    )
                shape[place.axis] = extents(shape[place.axis], len(parts))[index]
            elif place.axis is not None and len(part.shape) == len(shape):
                shape[place.axis] = part.shape[place.axis]
            if part.shape != tuple(shape) or part.dtype != parts[0].dtype:
                raise InputError(
                    f"{shard.where}: tensor {place.meta} is {part.dtype} {part.shape} where {parts[0].dtype} "
                    f"{tuple(shape)} is expected from {PARAMS} and {len(parts)} shards; fetch the weights again"
                )
        return Joined(place, parts[0].dtype, tuple(wanted))

    def _shape(self, place: Place, found: list[int]) -> list[int]:
        """What params.json says of a tensor. The vocabulary and the feed-forward width are the weights' own."""
        dim, key = self.params.dim, self.params.kv_heads * self.params.head_dim
        name = place.meta.removesuffix(".weight").split(".")[-1]
        return {
            "tok_embeddings": [found[0], dim],
            "output": [self.shards[0].tensors["tok_embeddings.weight"].shape[0], dim],
            "wq": [dim, dim],
            "wk": [key, dim],
            "wv": [key, dim],
            "wo": [dim, dim],
            "w1": [found[0], dim],
            "w2": [dim, found[-1]],
            "w3": [found[0], dim],
        }.get(name, [dim])

    def read(self, name: str) -> "torch.Tensor":
        """A whole tensor as Hugging Face has it: joined, rows of wq and wk permuted. `name` is the HF name."""
        import torch

        joined = self.tensors[name]
        place = joined.place
        weight = self.shards[0].read(place.meta)
        if place.axis is None:
            for shard in self.shards[1:]:
                if not torch.equal(shard.read(place.meta), weight):
                    raise InputError(
                        f"{shard.where}: {place.meta} differs from the copy in {self.shards[0].name}; the shards "
                        "belong to different models, fetch them again"
                    )
        elif len(self.shards) > 1:
            whole = torch.empty(joined.shape, dtype=weight.dtype)
            at = 0
            for shard in self.shards:
                part = weight if at == 0 else shard.read(place.meta)
                whole.narrow(place.axis, at, part.shape[place.axis]).copy_(part)
                at += part.shape[place.axis]
            weight = whole
        return permute(weight, place.heads) if place.heads else weight.contiguous()
