"""What is converted: Meta's files or a GGUF, whichever lies there, behind the same questions."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.tokenizer.vocabulary import Vocabulary
from zhllama.weights.gguf_file import SUFFIX

if TYPE_CHECKING:
    import torch


class Written(Protocol):
    """How a tensor is written: torch's name of the dtype, and the shape."""

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
    def tensors(self) -> Mapping[str, Written]: ...
    def pieces(self, name: str) -> Iterator["torch.Tensor"]: ...
    def config(self, vocabulary: Vocabulary, max_positions: int) -> dict[str, Any]: ...
    def positions(self, max_positions: int) -> int: ...


def open_source(weights: Artifact, dtype: str) -> WeightSource:
    """InputError for what is neither, or cannot be converted."""
    if any(name.endswith(SUFFIX) for name in weights.names):
        from components.convert_weights.gguf_model import GgufModel

        return GgufModel(weights, "--weights", dtype)
    from components.convert_weights.meta_model import MetaModel

    if dtype:
        raise InputError(f"--dtype {dtype}: Meta's weights keep their own; leave it out, it is for what is quantised")
    return MetaModel(weights, "--weights")
