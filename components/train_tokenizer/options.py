from dataclasses import dataclass
from typing import ClassVar

from zhllama.errors import InputError
from zhllama.stage.options import Later, Ref, StageOptions, WeightedRefs


@dataclass(frozen=True, kw_only=True)
class TrainTokenizer(StageOptions):
    """Train a SentencePiece BPE model on Chinese text, or more merges of a byte-level vocabulary."""

    cache_version: ClassVar[int] = 2
    libraries: ClassVar[tuple[str, ...]] = ("sentencepiece",)

    text: WeightedRefs
    """References to the corpus: folders, s3:// prefixes or artifacts of .txt, .jsonl (also .gz, .zst) or .parquet
    files, or hf://datasets/OWNER/NAME. Weights (`zh:0.9,en:0.1`), meant for training, do not matter here."""
    base: Ref = ""
    """Reference to a model with a byte-level tokenizer (LLaMA 3, Qwen, SmolLM2), whose merges are continued: what comes
    of it is that tokenizer, extended. Without one, a SentencePiece model is trained."""
    scripts: Later[str] = "Han"
    """With --base: new pieces hold a character of one of these scripts (Unicode's names, comma-separated: Hangul,
    Thai), so that text without keeps its ids."""
    vocab_size: int = 20_000
    """Vocab size, special and byte pieces included; with --base the number of new pieces. The recipe's Chinese model
    has 20,000."""
    character_coverage: float = 0.9995
    """Share of the text's characters that get a piece of their own; the rarer ones are spelt in bytes."""
    sample_lines: int = 2_000_000
    """Lines to train on at most; of a longer corpus, a seeded sample."""
    seed: int = 20
    """Decides the sample."""
    skip_bad: bool = False
    """Leave out, and count, lines that are not UTF-8 or hold no text; else they end it."""

    def __post_init__(self) -> None:
        # 256 bytes, three special pieces, and a few characters
        if self.vocab_size < 1 or (self.vocab_size < 300 and not self.base):
            raise InputError(f"--vocab-size {self.vocab_size}: too small for bytes and characters; give 8000 to 60000")
        if not 0.9 <= self.character_coverage <= 1:
            raise InputError(f"--character-coverage {self.character_coverage}: give 0.9 to 1, as 0.9995")
        if self.sample_lines < 1:
            raise InputError(f"--sample-lines {self.sample_lines}: give how many lines to train on")
