"""A Meta checkpoint as one model: its shards indexed, checked against params.json, and joined tensor by tensor.

Everything that can be wrong about the shards is found from their indices, before a weight is read. Memory of a read:
the whole tensor, one shard's part of it, and the permuted copy for wq and wk.
"""

import re
from typing import TYPE_CHECKING, NamedTuple

from zhllama.artifacts.json_file import LARGEST
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.models.architecture import DROPPED, EMBEDDING
from zhllama.weights.meta_format import PARAMS, MetaParams, Place, permute, places, shard_name
from zhllama.weights.torch_zip import PthFile

if TYPE_CHECKING:
    import torch

_SHARD = re.compile(r"consolidated\.(\d+)\.pth")


class Joined(NamedTuple):
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
        if (size := weights.file(PARAMS).size) > LARGEST:
            raise InputError(f"{where}/{PARAMS}: {size:,} bytes, which no {PARAMS} has; fetch it again")
        self.params = params = MetaParams.from_json(weights.read(PARAMS), f"{where}/{PARAMS}")
        numbers = sorted(int(found[1]) for name in weights.names if (found := _SHARD.fullmatch(name)))
        if not numbers:
            raise InputError(f"{where}: no {shard_name(0)} in it; give a folder with Meta's files")
        if missing := sorted(set(range(numbers[-1] + 1)) - set(numbers)):
            raise InputError(f"{where}: the shard {shard_name(missing[0])} is missing; fetch the weights again")
        self.shards = [PthFile(weights, shard_name(number)) for number in numbers]
        self.tensors = {
            place.hf: self._joined(place) for place in places(params.n_layers, params.n_heads, params.kv_heads)
        }
        expected = {joined.place.meta for joined in self.tensors.values()}
        for shard in self.shards:
            if more := sorted(name for name in set(shard.tensors) - expected if not DROPPED.search(name)):
                raise InputError(
                    f"{shard.where}: tensor {more[0]} is none of a LLaMA model with {params.n_layers} layers; "
                    f"does {PARAMS} belong to these shards?"
                )
        self.vocabulary_rows = self.tensors[EMBEDDING].shape[0]
        if params.vocab_size not in (-1, self.vocabulary_rows):
            said = f"vocab_size is {params.vocab_size}, and the weights have {self.vocabulary_rows} rows"
            raise InputError(f"{where}/{PARAMS}: {said}; the files do not belong together, fetch them again")
        self.width = self.tensors["model.layers.0.mlp.gate_proj.weight"].shape[0]
        self.dtype = self.tensors[EMBEDDING].dtype

    def _joined(self, place: Place) -> Joined:
        for shard in self.shards:
            if place.meta not in shard.tensors:
                raise InputError(
                    f"{shard.where}: no tensor {place.meta}, where {PARAMS} says {self.params.n_layers} layers; the "
                    "files do not belong together, fetch them again"
                )
        parts = [shard.tensors[place.meta] for shard in self.shards]
        axis, count, dtype = place.axis, len(parts), parts[0].dtype
        whole = list(parts[0].shape)
        if axis is not None:
            whole[axis : axis + 1] = [sum(sum(part.shape[axis : axis + 1]) for part in parts)]
        wanted = self._shape(place, whole or [0])
        for shard, part in zip(self.shards, parts):
            shape = list(wanted)
            if axis is not None and place.uneven:
                shape[axis : axis + 1] = part.shape[axis : axis + 1]
            elif axis is not None:
                if shape[axis] % count:
                    raise InputError(
                        f"{shard.where}: {place.meta} ({shape[axis]} along axis {axis}) cannot lie in {count} equal "
                        f"shards; a shard is missing, or {PARAMS} belongs to other weights"
                    )
                shape[axis] //= count
            if part.shape != tuple(shape) or part.dtype != dtype:
                raise InputError(
                    f"{shard.where}: tensor {place.meta} is {part.dtype} {part.shape} where {dtype} {tuple(shape)} is "
                    f"expected from {PARAMS} and {count} shards; fetch the weights again"
                )
        return Joined(place, dtype, tuple(wanted))

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
