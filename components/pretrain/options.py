"""The options of pretrain."""

from dataclasses import dataclass

from zhllama.training.options import PretrainOptions


@dataclass(frozen=True, kw_only=True)
class Pretrain(PretrainOptions):
    """Continue the pre-training of a model on text: its embeddings alone, or LoRA and embeddings."""
