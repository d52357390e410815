"""The body of pretrain and finetune, which differ in their options alone: checked inputs, then processes that train.

What is trained follows from the options: stage 1 trains the embeddings and gives a model, everything else trains LoRA
(with the embeddings or without) and gives an adapter.
"""

from typing import Any

from components.shared.artifact import ArtifactWriter, Manifest
from components.shared.training.elastic import Work, run_workers
from components.shared.training.inputs import open_inputs
from components.shared.training.options import LoraOptions


def run_training(options: LoraOptions, out: ArtifactWriter) -> Manifest:
    """Trains in as many processes as PET_* says (one without) and returns what they published."""
    open_inputs(options)
    return run_workers(train_worker, options, out)


def train_worker(work: Work[Any]) -> None:
    """One process of the training."""
    from components.shared.training.publish import publish_adapter, publish_embeddings
    from components.shared.training.worker import run_worker

    run_worker(work, publish_adapter if work.options.gives_adapter else publish_embeddings)
