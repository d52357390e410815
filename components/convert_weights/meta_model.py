"""A Meta checkpoint as one model: its shards indexed, checked against params.json, and joined tensor by tensor.

Everything that can be wrong about the shards is found from their indices, before a weight is read. Memory of a read:
the whole tensor, one shard's part of it, and the permuted copy for wq and wk. Llama 3 differs in three things: its
tokenizer.model is tiktoken's, its embedding is cut by rows, and a head that is the embedding (3.2) is left out.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from zhllama.artifacts.in_memory import in_memory
from zhllama.artifacts.json_file import LARGEST
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.models.architecture import DROPPED, EMBEDDING, HEAD
from zhllama.models.llama import LLAMA
from zhllama.tokenizer.tiktoken_file import ends_of, is_tiktoken, tokenizer_files_of
from zhllama.tokenizer.vocabulary import Vocabulary
from zhllama.weights.chat_template import CONFIG as TOKENIZER_CONFIG
from zhllama.weights.meta_format import PARAMS, TOKENIZER, MetaParams, Place, permute, places, shard_name
from zhllama.weights.model_config import GENERATION, checked_config
from zhllama.weights.torch_zip import PthFile

if TYPE_CHECKING:
    import torch

LLAMA_POSITIONS = 2048
"""What `--max-positions` is where nothing is said."""
_HEAD = "output.weight"
_COMPARED = 256
"""Rows of the head that are compared first."""
_SHARD = re.compile(r"consolidated\.(\d+)\.pth")


class Joined(NamedTuple):
    """A tensor of the whole model, under its Hugging Face name."""

    place: Place
    dtype: str
    shape: tuple[int, ...]


class MetaModel:
    """The tensors of a Meta checkpoint by Hugging Face name, in the order of `places`; and all else that a
    conversion asks of a source of weights: `tokenizer`, the artifact that has its files, `generation`, `config`."""

    title, made_of = LLAMA.title, "Meta's checkpoint"
    tied = padded = False

    def __init__(self, weights: Artifact, option: str) -> None:
        self.where = where = f"{option} {weights.root}"
        self.generation = _object(weights, GENERATION, where)
        self.tokenizer = weights
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
        of_llama_3 = TOKENIZER in weights and is_tiktoken(
            weights.read_range(TOKENIZER, 0, min(1024, weights.file(TOKENIZER).size))
        )
        if of_llama_3:
            beside = _object(weights, TOKENIZER_CONFIG, where)
            files = tokenizer_files_of(weights.read(TOKENIZER), params.use_scaled_rope, f"{where}/{TOKENIZER}", beside)
            self.tokenizer = in_memory(files, weights.root)
            self.generation = self.generation or {"eos_token_id": ends_of(files)}
        self._llama_3 = of_llama_3
        everywhere = [*places(params.n_layers, params.n_heads, params.kv_heads)]
        if of_llama_3 and not any(_HEAD in shard.tensors for shard in self.shards):
            self.tied = True
            everywhere = [place for place in everywhere if place.meta != _HEAD]
        self.tensors = {place.hf: self._joined(place) for place in everywhere}
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
        if of_llama_3 and not self.tied and self._same_head():
            self.tied = True
            del self.tensors[HEAD]

    def config(self, vocabulary: Vocabulary, max_positions: int) -> dict[str, Any]:
        """config.json of a model in Meta's layout, which is LLaMA's alone. max_positions: as the option says."""
        params = self.params
        return checked_config({
            "architectures": [LLAMA.transformers],
            "model_type": LLAMA.model_type,
            "vocab_size": vocabulary.rows,
            "hidden_size": params.dim,
            "intermediate_size": self.width,
            "num_hidden_layers": params.n_layers,
            "num_attention_heads": params.n_heads,
            "num_key_value_heads": params.kv_heads,
            "head_dim": params.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": params.norm_eps,
            "max_position_embeddings": self.positions(max_positions),
            "rope_theta": params.rope_theta,
            **({"rope_scaling": params.rope_scaling} if params.rope_scaling else {}),
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": self.tied,
            "initializer_range": 0.02,
            "dtype": vocabulary.dtype,
            "use_cache": True,
        }, PARAMS)  # fmt: skip

    def positions(self, max_positions: int) -> int:
        """What the model knows: of Llama 3, its own where the option is left at LLaMA's."""
        if not self._llama_3 or max_positions != LLAMA_POSITIONS:
            return max_positions
        return 131_072 if self.params.use_scaled_rope else 8192

    def pieces(self, name: str) -> Iterator["torch.Tensor"]:
        """As read, of one piece."""
        yield self.read(name)

    def _same_head(self) -> bool:
        """Whether the head is the embedding; whole tensors are read only where the first rows are the same."""
        import torch

        if (
            self.tensors[HEAD].dtype != self.dtype
            or self.tensors[HEAD].place.axis != self.tensors[EMBEDDING].place.axis
        ):
            return False
        names = self.tensors[EMBEDDING].place.meta, _HEAD
        counts = (min(_COMPARED, self.shards[0].tensors[names[0]].shape[0]), None)
        return all(
            torch.equal(*(shard.read(name, 0, count) for name in names)) for count in counts for shard in self.shards
        )

    def _joined(self, place: Place) -> Joined:
        for shard in self.shards:
            if place.meta not in shard.tensors:
                raise InputError(
                    f"{shard.where}: no tensor {place.meta}, where {PARAMS} says {self.params.n_layers} layers; the "
                    "files do not belong together, fetch them again"
                )
        parts = [shard.tensors[place.meta] for shard in self.shards]
        if place.hf == EMBEDDING and self._llama_3:
            # Llama 3's program cuts it by its rows
            place = replace(place, axis=0)
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
            "output": [self._rows(), dim],
            "wq": [dim, dim],
            "wk": [key, dim],
            "wv": [key, dim],
            "wo": [dim, dim],
            "w1": [found[0], dim],
            "w2": [dim, found[-1]],
            "w3": [found[0], dim],
        }.get(name, [dim])

    def _rows(self) -> int:
        parts = [shard.tensors["tok_embeddings.weight"].shape[:1] for shard in self.shards]
        return sum(sum(part) for part in (parts if self._llama_3 else parts[:1]))

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


def _object(weights: Artifact, name: str, where: str) -> dict[str, Any]:
    """The object in a small file, as far as it is there."""
    try:
        return weights.read_object(name) if name in weights else {}
    except ValueError as error:
        raise InputError(f"{where}: {name} is no JSON object ({error}); take it away") from error
