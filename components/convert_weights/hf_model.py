"""A Hugging Face folder of somebody else's (safetensors, or .bin, which is read without running it) as one of ours: the
embeddings in a file of their own, settings and tokenizer files as every stage writes them. No value changes, unless
--dtype says so.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from components.convert_weights.source import Written
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.models import architecture
from zhllama.models.architecture import EMBEDDING
from zhllama.tokenizer.vocabulary import Vocabulary
from zhllama.weights.model_config import CONFIG, GENERATION
from zhllama.weights.safetensors_io import Checkpoint
from zhllama.weights.settings import read_settings
from zhllama.weights.ties import is_tied

if TYPE_CHECKING:
    import torch

PIECE = 64 * 2**20
"""Bytes of a tensor that are in memory at once."""


class HfModel:
    """The tensors of a model folder, in the architecture's order. See MetaModel."""

    padded = True
    made_of = "a Hugging Face folder"

    def __init__(self, weights: Artifact, option: str, dtype: str) -> None:
        self._checkpoint = checkpoint = Checkpoint(weights, option)
        checkpoint.refuse_quantised()
        self.where = checkpoint.where
        self.shards = list(checkpoint.files)
        said = read_settings(checkpoint)
        self._config = said[CONFIG]
        kind = architecture(self._config, self.where)
        self.title, self.tied = kind.title, is_tied(checkpoint)
        self.vocabulary_rows = checkpoint.info(EMBEDDING).shape[0]
        self.dtype = dtype or checkpoint.info(EMBEDDING).dtype
        places = [place.hf for place in kind.places(self._config) if not (self.tied and place.kind == "head")]
        self.tensors = {
            name: Written(dtype or checkpoint.info(name).dtype, checkpoint.info(name).shape) for name in places
        }
        self.tokenizer = weights
        # the ends that config.json alone names count as well
        ends = {"eos_token_id": self._config["eos_token_id"]} if self._config.get("eos_token_id") is not None else {}
        self.generation = {**ends, **said.get(GENERATION, {})}

    def config(self, vocabulary: Vocabulary, max_positions: int) -> dict[str, Any]:
        """Its own config.json."""
        return {**self._config, "tie_word_embeddings": self.tied, "dtype": self.dtype, "torch_dtype": self.dtype}

    def positions(self, max_positions: int) -> int:
        """As it says itself."""
        return int(self._config["max_position_embeddings"])

    def pieces(self, name: str) -> Iterator["torch.Tensor"]:
        """The rows of a tensor, some at a time."""
        import torch

        info, kind = self._checkpoint.info(name), getattr(torch, self.tensors[name].dtype)
        rows = max(1, PIECE * info.shape[0] // max(info.length, 1))
        for first in range(0, info.shape[0], rows):
            count = min(rows, info.shape[0] - first)
            made = self._checkpoint.read(name, first, count).to(kind)
            if made.dtype != getattr(torch, info.dtype) and not bool(torch.isfinite(made).all()):
                raise InputError(f"{self.where}: {self.tensors[name].dtype} cannot hold {name}; give --dtype bfloat16")
            yield made
