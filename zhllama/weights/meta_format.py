"""Meta's checkpoint layout and Hugging Face's, tensor by tensor, in both directions.

A Meta model is `params.json`, `tokenizer.model` and `consolidated.NN.pth`, one per rank of its model parallelism. Meta
rotates neighbouring pairs (0,1), (2,3) …, Hugging Face the halves (0, d/2), (1, d/2+1) …, so the rows of each head of
wq and wk are permuted; a shard holds whole heads, so that commutes with joining shards along axis 0.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zhllama.artifacts.json_file import object_of
from zhllama.errors import InputError
from zhllama.models.architecture import EMBEDDING, HEAD
from zhllama.models.rope import THETA

if TYPE_CHECKING:
    import torch

PARAMS = "params.json"
TOKENIZER = "tokenizer.model"
SUMS = "sha256sums.txt"

SCALED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Beside the factor, Llama 3.1's settings."""
_FRACTIONS = {"norm_eps": 1.0, "rope_theta": 1e12, "ffn_dim_multiplier": 1e6, "rope_scaling_factor": 1e6}
"""Fields of params.json that are no whole numbers, and what they must lie below."""
_HARMLESS = {"max_seq_len", "max_batch_size", "model_parallel_size"}
"""Fields that say nothing about the arithmetic; the width of hidden_dim is the weights' own."""
_LLAMA_32 = {(2048, 16), (3072, 28)}
"""Width and layers of Llama 3.2's small ones, which stretch further than 3.1; only later files of Meta's say so."""
_LAYER = (
    # Meta's name, Hugging Face's, axis of the cut (None: every shard holds a copy)
    ("attention.wq", "self_attn.q_proj", 0),
    ("attention.wk", "self_attn.k_proj", 0),
    ("attention.wv", "self_attn.v_proj", 0),
    ("attention.wo", "self_attn.o_proj", 1),
    ("feed_forward.w1", "mlp.gate_proj", 0),
    ("feed_forward.w2", "mlp.down_proj", 1),
    ("feed_forward.w3", "mlp.up_proj", 0),
    ("attention_norm", "input_layernorm", None),
    ("ffn_norm", "post_attention_layernorm", None),
)


def shard_name(index: int) -> str:
    return f"consolidated.{index:02d}.pth"


@dataclass(frozen=True)
class MetaParams:
    """`params.json`. `vocab_size` -1 means: as many as the tokenizer has pieces."""

    dim: int
    n_layers: int
    n_heads: int
    norm_eps: float
    multiple_of: int = 256
    vocab_size: int = -1
    n_kv_heads: int | None = None
    ffn_dim_multiplier: float | None = None
    rope_theta: float = THETA
    use_scaled_rope: bool = False
    rope_scaling_factor: float | None = None

    @property
    def rope_scaling(self) -> dict[str, object] | None:
        """Of config.json: Llama 3.1's stretched positions, which Meta's programs have as constants."""
        if not self.use_scaled_rope:
            return None
        factor = self.rope_scaling_factor or (32.0 if (self.dim, self.n_layers) in _LLAMA_32 else 8.0)
        return {"rope_type": "llama3", "factor": float(factor), **SCALED}

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def width(self) -> int:
        """Rows of w1: multiple_of · ceil(floor(8·dim/3) / multiple_of)."""
        hidden = 8 * self.dim // 3
        hidden = hidden if self.ffn_dim_multiplier is None else int(self.ffn_dim_multiplier * hidden)
        return -(-hidden // self.multiple_of) * self.multiple_of

    @staticmethod
    def from_json(content: bytes, where: str) -> "MetaParams":
        """InputError when a field is missing, not a number or impossible."""
        try:
            value = object_of(content)
            known = MetaParams.__dataclass_fields__
            params = MetaParams(**{name: value[name] for name in known if value.get(name) is not None})
            numbers = (params.dim, params.n_layers, params.n_heads, params.kv_heads, params.multiple_of)
            if any(type(number) is not int or not 0 < number < 2**31 for number in numbers):
                raise ValueError("dim, n_layers, n_heads, n_kv_heads and multiple_of must be whole and positive")
            if type(params.vocab_size) is not int or not (params.vocab_size == -1 or 0 < params.vocab_size < 2**31):
                raise ValueError("vocab_size must be whole and positive, or -1")
            for name, most in _FRACTIONS.items():
                number = getattr(params, name)
                if number is not None and not (type(number) in (int, float) and 0 < number < most):
                    raise ValueError(f"{name} is {number!r:.20}, and must be above 0 and below {most:g}")
            if params.dim % params.n_heads or params.head_dim % 2 or params.n_heads % params.kv_heads:
                raise ValueError("dim must be n_heads times an even number, n_heads a multiple of n_kv_heads")
            if type(params.use_scaled_rope) is not bool or (params.rope_scaling_factor and not params.use_scaled_rope):
                raise ValueError("use_scaled_rope must be true or false, and true beside rope_scaling_factor")
            same = {"head_dim": params.head_dim, "hidden_dim": value.get("hidden_dim")}
            for name in value.keys() - known - _HARMLESS:
                if value[name] not in (None, False, same.get(name)):
                    raise ValueError(f"{name} is {value[name]!r:.20}, which this program does not convert")
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{where}: not LLaMA's {PARAMS} ({error}); fetch it again") from error
        return params

    def to_json(self) -> bytes:
        """As Meta writes it: one line, fields that LLaMA 1 does not have only where they say something."""
        names = ["dim", "multiple_of", "n_heads", "n_layers", "norm_eps", "vocab_size"]
        names += ["n_kv_heads"] * (self.kv_heads != self.n_heads)
        names += ["ffn_dim_multiplier"] * (self.ffn_dim_multiplier is not None)
        names += ["rope_theta"] * (self.rope_theta != THETA)
        names += ["use_scaled_rope"] * self.use_scaled_rope
        names += ["rope_scaling_factor"] * (self.rope_scaling_factor is not None)
        return json.dumps({name: getattr(self, name) for name in names}).encode()


@dataclass(frozen=True)
class Place:
    """Where a tensor stands in both layouts. `heads` > 0: the rows are permuted per head on the way."""

    meta: str
    hf: str
    axis: int | None
    heads: int = 0

    @property
    def uneven(self) -> bool:
        """Only the vocabulary may be cut unevenly: the last shard takes the remainder."""
        return self.hf == HEAD or (self.hf == EMBEDDING and self.axis == 0)


def places(n_layers: int, n_heads: int, kv_heads: int) -> Iterator[Place]:
    """Every tensor of a model: embedding and head first, then layer by layer, then the last norm."""
    yield Place("tok_embeddings.weight", EMBEDDING, 1)
    yield Place("output.weight", HEAD, 0)
    heads = {"attention.wq": n_heads, "attention.wk": kv_heads}
    for layer in range(n_layers):
        for meta, hf, axis in _LAYER:
            yield Place(f"layers.{layer}.{meta}.weight", f"model.layers.{layer}.{hf}.weight", axis, heads.get(meta, 0))
    yield Place("norm.weight", "model.norm.weight", None)


def permute(weight: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Meta → Hugging Face, wq or wk: (heads·d, dim), rows 2i and 2i+1 of a head go to i and d/2 + i."""
    rows, dim = weight.shape
    return weight.view(heads, rows // heads // 2, 2, dim).transpose(1, 2).reshape(rows, dim)


def unpermute(weight: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Hugging Face → Meta: the inverse of `permute`, which is not the same operation. A bias as well."""
    rows, *dim = weight.shape
    return weight.view(heads, 2, rows // heads // 2, *dim).transpose(1, 2).reshape(rows, *dim)


def extents(size: int, shards: int, uneven: bool = False) -> list[int]:
    """The sizes of the shards' parts of an axis; ValueError when they would differ and must not."""
    if size % shards and not uneven:
        raise ValueError(f"{size} is no multiple of {shards}")
    each = size // shards
    return [each] * (shards - 1) + [size - each * (shards - 1)]


def split(weight: "torch.Tensor", axis: int | None, shards: int, uneven: bool = False) -> list["torch.Tensor"]:
    """A whole tensor as the shards' parts: views, or the tensor itself for each where it is copied (axis None)."""
    if axis is None:
        return [weight] * shards
    return list(weight.split(extents(weight.shape[axis], shards, uneven), dim=axis))


def split_to_shards(
    tensors: Mapping[str, "torch.Tensor"], n_heads: int, shards: int, kv_heads: int | None = None
) -> list[dict[str, "torch.Tensor"]]:
    """A small Hugging Face state dict, in memory, as those of `shards` Meta shards. ValueError for odd counts."""
    layers = len({name.split(".")[2] for name in tensors if name.startswith("model.layers.")})
    cut: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    for place in places(layers, n_heads, kv_heads or n_heads):
        # a tied model has no head of its own
        weight = tensors.get(HEAD, tensors[EMBEDDING]) if place.hf == HEAD else tensors[place.hf]
        if place.heads:
            extents(place.heads, shards)
            weight = unpermute(weight, place.heads)
        for shard, part in zip(cut, split(weight, place.axis, shards, place.uneven)):
            shard[place.meta] = part.contiguous().clone()
    return cut


def meta_files(
    tensors: Mapping[str, "torch.Tensor"], params: MetaParams, tokenizer: bytes, shards: int
) -> Mapping[str, bytes]:
    """A small Hugging Face state dict as the files of a Meta model, `sha256sums.txt` among them: name → content."""
    import hashlib
    import io

    import torch

    files = {PARAMS: params.to_json(), TOKENIZER: tokenizer}
    for index, shard in enumerate(split_to_shards(tensors, params.n_heads, shards, params.kv_heads)):
        buffer = io.BytesIO()
        torch.save(shard, buffer)
        files[shard_name(index)] = buffer.getvalue()
    sums = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sorted(files.items())]
    return {**files, SUMS: "".join(sums).encode()}
