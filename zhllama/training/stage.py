"""The body of pretrain and finetune, which differ in their options alone: checked inputs, then processes that train.

What is trained follows from the options: stage 1 trains the embeddings and gives a model, everything else trains LoRA
(with the embeddings or without) and gives an adapter.
"""

from typing import Any

from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.stage.inputs import Inputs
from zhllama.stage.options import option_of
from zhllama.training.checkpoints import open_checkpoint, require_same_run
from zhllama.training.deadline import Deadline
from zhllama.training.elastic import Work, run_workers
from zhllama.training.inputs import checked_inputs, fetch_inputs
from zhllama.training.options import LoraOptions


def run_training(options: LoraOptions, opened: Inputs, out: ArtifactWriter) -> Manifest:
    """Trains in as many processes as PET_* says (one without) and returns what they published.

    With `publish_checkpoint` nothing is trained: what the checkpoint holds is published.
    """
    with Deadline() as deadline:
        return _run(options, opened, out, deadline)


def _run(options: LoraOptions, opened: Inputs, out: ArtifactWriter, deadline: Deadline) -> Manifest:
    inputs = checked_inputs(options, opened)
    work = Work.of(options, out)
    for option in ("resume_from_checkpoint", "publish_checkpoint"):
        reference = getattr(options, option)
        if reference:
            name = option_of(option)
            require_same_run(open_checkpoint(reference, name).manifest, work.run(), name)
    fetch_inputs(inputs)
    if options.publish_checkpoint:
        from zhllama.training.worker import publish_checkpoint

        return publish_checkpoint(work, opened, inputs, _publisher(options))
    return run_workers(train_worker, work, deadline)


def train_worker(work: Work[Any]) -> None:
    """One process of the training."""
    from zhllama.training.worker import run_worker

    run_worker(work, _publisher(work.options))


def _publisher(options: LoraOptions) -> Any:
    from zhllama.training.publish import publish_adapter, publish_embeddings

    return publish_adapter if options.gives_adapter else publish_embeddings
