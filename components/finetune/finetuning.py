"""Supervised fine-tuning: LoRA on the seven projections, the loss on answers alone.

The embeddings stay as continued pre-training left them, so that an engine can serve the adapter as it is; where there
was none, `--train-embeddings` trains them in full as the recipe does. An adapter that is continued keeps its shape.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from components.shared.artifact import ArtifactWriter, Manifest
from components.shared.training.elastic import Work, run_workers
from components.shared.training.inputs import TrainingInputs, lora_shape, open_inputs
from components.shared.training.options import FinetuneOptions

if TYPE_CHECKING:
    from torch import nn

    from components.shared.training.model import PackedLlama


@dataclass(frozen=True, kw_only=True)
class Finetune(FinetuneOptions):
    """Tune a model on instructions: a new adapter, or one that is continued."""


def finetune(config: Finetune, out: ArtifactWriter) -> Manifest:
    """Trains in as many processes as PET_* says (one without) and returns what they published."""
    open_inputs(config)
    return run_workers(finetune_worker, config, out)


def finetune_worker(work: Work[Finetune]) -> None:
    """One process of the training."""
    from components.shared.training.model import add_lora
    from components.shared.training.publish import publish_adapter
    from components.shared.training.worker import run_worker

    config = work.options

    def with_lora(model: "PackedLlama", inputs: TrainingInputs) -> "nn.Module":
        return add_lora(model, lora_shape(config, inputs.adapter, config.train_embeddings), inputs.adapter)

    run_worker(work, with_lora, publish_adapter)
