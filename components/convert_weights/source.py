"""What a conversion asks of a source of weights, whatever it was written by."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from zhllama.artifacts.reader import Artifact
from zhllama.tokenizer.vocabulary import Vocabulary

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
