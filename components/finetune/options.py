"""Supervised fine-tuning: LoRA on the seven projections, the loss on answers alone.

The embeddings stay as continued pre-training left them, so that an engine can serve the adapter as it is; where there
was none, `--train-embeddings` trains them in full as the recipe does. An adapter that is continued keeps its shape.
"""

from dataclasses import dataclass

from zhllama.training.options import FinetuneOptions


@dataclass(frozen=True, kw_only=True)
class Finetune(FinetuneOptions):
    """Tune a model on instructions: a new adapter, or one that is continued."""
