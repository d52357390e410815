from dataclasses import dataclass
from typing import ClassVar, Literal

from zhllama.errors import InputError
from zhllama.stage.options import Ref, Refs, StageOptions

Scores = Literal["distinct", "zero"]
Pieces = Literal["han", "all"]
Init = Literal["piece-mean", "piece-mean-norm", "mean", "normal"]


@dataclass(frozen=True, kw_only=True)
class ExtendTokenizer(StageOptions):
    """Extend a model and its vocabulary: by the pieces of Chinese SentencePiece models, or continued merges."""

    cache_version: ClassVar[int] = 3
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers", "sentencepiece")

    model: Ref
    """Reference to the model to extend: a Hugging Face model with its tokenizer."""
    chinese_tokenizer: Refs = ""
    """References to Chinese SentencePiece models, comma-separated, appended in turn; of a byte-level model, to what
    train_tokenizer --base made of its tokenizer. Without one, only [PAD] is appended."""
    scores: Scores = "distinct"
    """distinct: one apart, so that all engines merge alike. zero: the recipe's, for adapters that were made with it."""
    pieces: Pieces = "han"
    """han: pieces with Han characters or full-width punctuation, so that English keeps its ids. all: the recipe's."""
    pad: bool = True
    """Append the padding piece [PAD] as the last one, if there is none."""
    init: Init = "piece-mean"
    """New rows: piece-mean (of the pieces the old vocabulary splits them into), piece-mean-norm (that at their norm, as
    earlier releases had it), mean (of all), or normal (0, 0.02)."""
    seed: int = 20
    """Decides the rows of --init normal."""
    pad_to_multiple_of: int = 1
    """Rows of embed_tokens and lm_head are filled up to a multiple of this (64, say, for tensor cores or to divide them
    among GPUs); no text is encoded to the rows beyond the pieces."""
    measure: Refs = ""
    """Texts, comma-separated, to measure the model on before and after: one in the language that is added, one in the
    language that it has to keep. The model is loaded for it, in float32 without a GPU."""

    def __post_init__(self) -> None:
        if not 1 <= self.pad_to_multiple_of <= 1024:
            raise InputError(f"--pad-to-multiple-of {self.pad_to_multiple_of}: give 1 to 1024, as 64")
        if not self.chinese_tokenizer and not self.pad:
            raise InputError("--pad false without --chinese-tokenizer: nothing would be appended; give one of them")
