"""What is converted: Meta's files, a GGUF or a Hugging Face folder, whichever lies there, behind the same questions."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.tokenizer.vocabulary import Vocabulary
from zhllama.weights.gguf_file import SUFFIX
from zhllama.weights.meta_format import PARAMS
from zhllama.weights.model_config import CONFIG

if TYPE_CHECKING:
    import torch


class Written(NamedTuple):
    """How a tensor is written."""

    dtype: str
    """torch's name of it."""
    shape: tuple[int, ...]


class _Written(Protocol):
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


class WeightSource(Protocol):
    """A whole model under Hugging Face names. All that can be wrong is found before a weight is read."""

    title: str
    made_of: str
    """As a card says it: of which kind the model is, and what it was in."""
    shards: list[Any]
    tokenizer: Artifact
    """Has the files of its tokenizer, and its chat template, if there is one."""
    generation: dict[str, Any]
    """What is said as in generation_config.json."""
    vocabulary_rows: int
    padded: bool
    """Whether there may be more rows than pieces."""
    tied: bool
    dtype: str

    @property
    def tensors(self) -> Mapping[str, _Written]: ...
    def pieces(self, name: str) -> Iterator["torch.Tensor"]: ...
    def config(self, vocabulary: Vocabulary, max_positions: int) -> dict[str, Any]: ...
    def positions(self, max_positions: int) -> int: ...


def open_source(weights: Artifact, dtype: str) -> WeightSource:
    """InputError for what is none of them, or cannot be converted."""
    if any(name.endswith(SUFFIX) for name in weights.names):
        from components.convert_weights.gguf_model import GgufModel

        return GgufModel(weights, "--weights", dtype)
    if CONFIG in weights and PARAMS not in weights:
        from components.convert_weights.hf_model import HfModel

        return HfModel(weights, "--weights", dtype)
    from components.convert_weights.meta_model import MetaModel

    if dtype:
        raise InputError(f"--dtype {dtype}: Meta's weights keep their own; leave it out, it is for what is quantised")
    return MetaModel(weights, "--weights")
