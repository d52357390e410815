"""The options of finetune."""

from dataclasses import dataclass

from zhllama.training.options import FinetuneOptions


@dataclass(frozen=True, kw_only=True)
class Finetune(FinetuneOptions):
    """Tune a model on instructions: a new adapter, or one that is continued."""
