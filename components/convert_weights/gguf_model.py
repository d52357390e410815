"""A GGUF as a Hugging Face model: names, rows of q and k in their order again, blocks dequantised.

The result's dtype is what holds every value: the matrices' own where all are float16 or bfloat16, float32 for anything
that is quantised (a value of Q4_1 is a product and a sum of float16s, which 11 bits do not hold): then the tensors are
bit for bit what `gguf.dequantize` gives. `--dtype bfloat16` halves that; its rounding is an eighth of what Q8_0 lost.
llama.cpp keeps norms in float32; they are written as the matrices are, where that holds every value of them.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from components.convert_weights.source import Written
from zhllama.artifacts.in_memory import in_memory
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.models import architecture
from zhllama.tokenizer.gguf_tokenizer import ends_of, tokenizer_files_of
from zhllama.tokenizer.vocabulary import Vocabulary
from zhllama.weights.gguf_config import gguf_places
from zhllama.weights.gguf_file import GgufFile, GgufTensor
from zhllama.weights.meta_format import permute

if TYPE_CHECKING:
    import torch


class GgufModel:
    """The tensors of a GGUF by Hugging Face name, in the order of `places`. See MetaModel."""

    made_of = "a GGUF"
    padded = True

    def __init__(self, weights: Artifact, option: str, dtype: str) -> None:
        self._gguf = gguf = GgufFile(weights, option)
        self._asked = dtype
        self.where = where = gguf.where
        self.shards = gguf.names
        self._config, self._places = gguf_places(gguf)
        self.title = architecture(self._config, where).title
        self.tied, self.vocabulary_rows = self._config["tie_word_embeddings"], self._config["vocab_size"]
        matrices = {tensor.type for tensor in map(self._tensor, self._places) if len(tensor.shape) > 1}
        own = next(iter(matrices)) if len(matrices) == 1 else ""
        self.dtype = dtype or {"F16": "float16", "BF16": "bfloat16"}.get(own, "float32")
        self.tensors = {
            name: Written(self._kept(self._tensor(name)), place.shape) for name, place in self._places.items()
        }
        self.tokenizer = in_memory(tokenizer_files_of(gguf.fields, where), weights.root)
        self.generation = {"eos_token_id": ends_of(gguf.fields)}

    def config(self, vocabulary: Vocabulary, max_positions: int) -> dict[str, Any]:
        """config.json; a GGUF says its own positions."""
        return {**self._config, "dtype": self.dtype, "torch_dtype": self.dtype}

    def positions(self, max_positions: int) -> int:
        """As it says itself."""
        return int(self._config["max_position_embeddings"])

    def pieces(self, name: str) -> Iterator["torch.Tensor"]:
        """The rows of a tensor, some at a time. `name`: the HF name."""
        import torch

        place, kind = self._places[name], getattr(torch, self.tensors[name].dtype)
        head = place.shape[0] // place.heads if place.heads else 1
        for piece in self._gguf.pieces(self._tensor(name), head):
            if place.heads:
                # a bias is one column
                piece = permute(piece.reshape(piece.shape[0], -1), piece.shape[0] // head).reshape(piece.shape)
            made = piece.to(kind)
            if made.dtype == torch.float16 and not bool(torch.isfinite(made).all()):
                raise InputError(f"{self.where}: float16 cannot hold {place.gguf}; give --dtype bfloat16")
            yield made

    def _tensor(self, name: str) -> GgufTensor:
        return self._gguf.tensors[self._places[name].gguf]

    def _kept(self, tensor: GgufTensor) -> str:
        """The dtype that a tensor is written in."""
        import torch

        kind = getattr(torch, self.dtype)
        if self._asked or tensor.dtype != "float32" or self.dtype == "float32":
            return self.dtype
        same = all(torch.equal(piece.to(kind).float(), piece) for piece in self._gguf.pieces(tensor))
        return self.dtype if same else "float32"
