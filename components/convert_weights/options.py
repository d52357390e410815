from dataclasses import dataclass
from typing import ClassVar

from zhllama.errors import InputError
from zhllama.stage.options import Ref, StageOptions


@dataclass(frozen=True, kw_only=True)
class ConvertWeights(StageOptions):
    """Convert Meta's LLaMA checkpoint to a Hugging Face model."""

    cache_version: ClassVar[int] = 2
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers", "sentencepiece")

    weights: Ref
    """Reference to Meta's files: consolidated.NN.pth, params.json, tokenizer.model."""
    max_positions: int = 2048
    """Positions that the model was trained on. Meta's files do not say; LLaMA has 2,048, LLaMA 2 4,096."""

    def __post_init__(self) -> None:
        if self.max_positions < 1:
            raise InputError(f"--max-positions {self.max_positions}: give the positions the model knows, as 2048")
