"""One process of a training, from its inputs to what rank 0 publishes."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import set_seed

from zhllama.artifacts.cache import cache_folder
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.reader import Artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.stage.inputs import Inputs
from zhllama.training.checkpoints import TRAINER, open_checkpoint
from zhllama.training.data import open_splits
from zhllama.training.elastic import Work
from zhllama.training.inputs import TrainingInputs, checked_inputs
from zhllama.training.metrics import History, size_of
from zhllama.training.model import trainable, trained_model
from zhllama.training.options import LoraOptions, TrainingOptions
from zhllama.training.trainer import (
    Trained,
    precision_of,
    start_processes,
    train,
    training_arguments,
)
from zhllama.training.training_state import weights_of

log = logging.getLogger("training")

Publish = Callable[[ArtifactWriter, TrainingInputs, Any, Trained], Manifest]


def run_worker(work: Work[Any], publish: Publish) -> None:
    """Loads, trains, and on rank 0 publishes. The other ranks wait, so that every node finds the result."""
    options: LoraOptions = work.options
    opened = Inputs.open(options)
    opened.require_same(work.inputs)
    inputs = checked_inputs(options, opened)
    blocks, held_out = open_splits(inputs.dataset)
    folder = work_folder(work.key)
    start_processes(options)
    arguments = training_arguments(options, folder, len(blocks), held_out is not None)
    set_seed(options.seed)
    model = trained_model(options, inputs, getattr(torch, precision_of(options)))
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        _say_what_is_trained(options, inputs.dataset, model, arguments.world_size)
    trained = train(options, arguments, model, blocks, held_out, work.run(), metrics_root=work.writer().root)
    if rank == 0:
        opened.require_unchanged()
        publish(work.writer(), inputs, model, trained)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    shutil.rmtree(folder, ignore_errors=True)


def publish_checkpoint(work: Work[Any], opened: Inputs, inputs: TrainingInputs, publish: Publish) -> Manifest:
    """Publishes the checkpoint that the options name as the training's result would be. In one process."""
    options: LoraOptions = work.options
    checkpoint = open_checkpoint(options.publish_checkpoint, "--publish-checkpoint")
    model = trained_model(options, inputs, torch.float32)
    weights = {name: tensor.float() for name, tensor in weights_of(checkpoint).items()}
    if weights.keys() != {name for name, parameter in model.named_parameters() if parameter.requires_grad}:
        raise InputError(f"--publish-checkpoint {options.publish_checkpoint}: its weights are none of this training's")
    history = History.of(json.loads(checkpoint.read(TRAINER))["log_history"])
    out = work.writer()
    out.facts["step"] = checkpoint.manifest.facts["step"]
    opened.require_unchanged()
    return publish(out, inputs, model, Trained(history, weights))


def work_folder(key: str) -> Path:
    """Where the Trainer keeps its own small files on this node; removed after a success."""
    return cache_folder() / "training" / key


def _say_what_is_trained(options: TrainingOptions, dataset: Artifact, model: nn.Module, world: int) -> None:
    every = sum(size_of(parameter) for parameter in model.parameters())
    trained = sum(size_of(parameter) for parameter in trainable(model))
    facts = dataset.manifest.facts
    log.info(
        "training %s of %s parameters on %s blocks of %d tokens: %d process%s, %s, %s, %d thread%s each",
        f"{trained:,}",
        f"{every:,}",
        f"{facts['splits']['train']['blocks']:,}",
        facts["block_size"],
        world,
        "" if world == 1 else "es",
        f"DeepSpeed {options.deepspeed}" if options.deepspeed != "none" else "plain data parallelism",
        precision_of(options),
        torch.get_num_threads(),
        "" if torch.get_num_threads() == 1 else "s",
    )
