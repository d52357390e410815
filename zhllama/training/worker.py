"""One process of a training, from its inputs to what rank 0 publishes."""

import json
import logging
import os
import shutil

import torch
import torch.distributed as dist
from transformers import set_seed

from zhllama.artifacts.cache import cache_folder
from zhllama.artifacts.manifest import Manifest
from zhllama.data.packed import TRAIN, VALIDATION
from zhllama.data.packed_reader import PackedDataset
from zhllama.errors import InputError
from zhllama.stage.inputs import Inputs
from zhllama.training.checkpoints import TRAINER, WEIGHTS, Run, open_checkpoint
from zhllama.training.inputs import TrainingInputs, checked_inputs
from zhllama.training.metrics import History, size_of
from zhllama.training.model import trainable, trained_model
from zhllama.training.publish import publish
from zhllama.training.trainer import precision_of, start_processes, train, training_arguments
from zhllama.weights.safetensors_io import Checkpoint

log = logging.getLogger("training")


def run_worker(run: Run) -> None:
    """Loads, trains, and on rank 0 publishes. The other ranks wait, so that every node finds the result."""
    options = run.options
    opened = Inputs.open(options)
    opened.require_same(run.inputs)
    inputs = checked_inputs(options, opened)
    blocks, held_out = PackedDataset(inputs.dataset, TRAIN), None
    if VALIDATION in inputs.dataset.manifest.facts["splits"]:
        held_out = PackedDataset(inputs.dataset, VALIDATION)
    # the Trainer's own small files on this node; removed after a success
    folder = cache_folder() / "training" / run.key
    start_processes(options)
    arguments = training_arguments(options, folder, len(blocks), held_out is not None)
    set_seed(options.seed)
    model = trained_model(options, inputs, getattr(torch, precision_of(options)))
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        facts, threads, world = inputs.dataset.manifest.facts, torch.get_num_threads(), arguments.world_size
        log.info(
            "training %s of %s parameters on %s blocks of %d tokens: %d process%s, %s, %s, %d thread%s each",
            f"{sum(map(size_of, trainable(model))):,}",
            f"{sum(map(size_of, model.parameters())):,}",
            f"{len(blocks):,}",
            facts["block_size"],
            world,
            "" if world == 1 else "es",
            f"DeepSpeed {options.deepspeed}" if options.deepspeed != "none" else "plain data parallelism",
            precision_of(options),
            threads,
            "" if threads == 1 else "s",
        )
    out = run.result_writer()
    history, weights = train(options, arguments, model, blocks, held_out, run, metrics_root=out.root)
    if rank == 0:
        opened.require_unchanged()
        publish(out, inputs, model, history, weights)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    shutil.rmtree(folder, ignore_errors=True)


def publish_checkpoint(run: Run, opened: Inputs, inputs: TrainingInputs) -> Manifest:
    """Publishes the checkpoint that the options name as the training's result would be. In one process."""
    options = run.options
    checkpoint = open_checkpoint(options.publish_checkpoint, "--publish-checkpoint")
    model = trained_model(options, inputs, torch.float32)
    saved = Checkpoint(checkpoint, "the checkpoint", single=WEIGHTS)
    weights = {name: saved.read(name).float() for name in saved.tensors}
    if weights.keys() != {name for name, parameter in model.named_parameters() if parameter.requires_grad}:
        raise InputError(f"--publish-checkpoint {options.publish_checkpoint}: its weights are none of this training's")
    history = History.of(json.loads(checkpoint.read(TRAINER))["log_history"])
    out = run.result_writer()
    out.facts["step"] = checkpoint.manifest.facts["step"]
    opened.require_unchanged()
    return publish(out, inputs, model, history, weights)
