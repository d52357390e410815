"""The two stages of the recipe's continued pre-training.

Stage 1 (`embeddings`) trains embed_tokens alone, so that new pieces find their place before anything else moves: 3% of
the parameters of a 7B model. Stage 2 (`lora`) trains LoRA on the seven projections, and embed_tokens and lm_head in
full: 6%.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from components.shared.artifact import ArtifactWriter, Manifest
from components.shared.training.elastic import Work, run_workers
from components.shared.training.inputs import TrainingInputs, lora_shape, open_inputs
from components.shared.training.options import PretrainOptions

if TYPE_CHECKING:
    from torch import nn

    from components.shared.training.model import PackedLlama


@dataclass(frozen=True, kw_only=True)
class Pretrain(PretrainOptions):
    """Continue the pre-training of a model on text: stage 1 its embeddings, stage 2 LoRA and embeddings."""


def pretrain(config: Pretrain, out: ArtifactWriter) -> Manifest:
    """Trains in as many processes as PET_* says (one without) and returns what they published."""
    open_inputs(config)
    return run_workers(pretrain_worker, config, out)


def pretrain_worker(work: Work[Pretrain]) -> None:
    """One process of the training."""
    from components.shared.training.model import add_lora, train_embeddings_only
    from components.shared.training.publish import publish_adapter, publish_embeddings
    from components.shared.training.worker import run_worker

    config = work.options

    def with_lora(model: "PackedLlama", inputs: TrainingInputs) -> "nn.Module":
        return add_lora(model, lora_shape(config, inputs.adapter, embeddings=True), inputs.adapter)

    def with_embeddings(model: "PackedLlama", inputs: TrainingInputs) -> "nn.Module":
        return train_embeddings_only(model, config.also_lm_head)

    if config.stage == "lora":
        run_worker(work, with_lora, publish_adapter)
    else:
        run_worker(work, with_embeddings, publish_embeddings)
