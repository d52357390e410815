"""The training loop: transformers' Trainer with DeepSpeed or plain data parallelism, made lean.

Ours are the optimizer's groups (embeddings may have a rate of their own), the evaluation (sums of losses and right
guesses, no logits gathered), the course that is shown (course.py) and the checkpoints (keeping.py). The rest is the
Trainer's: its loss is divided by the labelled tokens of the whole step on all processes, so one process or many give
the same course.
"""

import logging
import math
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PrinterCallback, TrainingArguments

from zhllama.data.packed_reader import IGNORED, PackedDataset
from zhllama.errors import InputError
from zhllama.training.checkpointing import CheckpointManager
from zhllama.training.checkpointing_trainer import CheckpointingTrainer
from zhllama.training.checkpoints import Run
from zhllama.training.data import Collate
from zhllama.training.hardware import peak_tflops
from zhllama.training.metrics import History, MetricsCallback, Step, flops_per_token
from zhllama.training.model import trained_weights
from zhllama.training.options import TrainingOptions, deepspeed_settings, zero_stage

log = logging.getLogger("training")


@dataclass(frozen=True)
class Trained:
    """What comes of a training."""

    history: History
    weights: dict[str, torch.Tensor]
    """By the names of the model's parameters: those that were trained, float32, on the CPU."""


# --- the processes ----------------------------------------------------------------------------------------------------


def precision_of(options: TrainingOptions) -> str:
    """`bfloat16`, `float16` or `float32`; auto is bfloat16 on a GPU. InputError where the device cannot do it."""
    if options.precision == "float16" and not torch.cuda.is_available():
        raise InputError("--precision float16: it needs a GPU, and there is none here; give bfloat16 or float32")
    if options.precision != "auto":
        return options.precision
    return "bfloat16" if torch.cuda.is_available() else "float32"


def deepspeed_config(options: TrainingOptions) -> dict[str, Any] | None:
    """The DeepSpeed configuration for this machine: without what a CPU cannot do."""
    config = deepspeed_settings(options)
    if config is not None and not torch.cuda.is_available():
        # there are no streams to overlap with
        config.get("zero_optimization", {})["overlap_comm"] = False
    return config


def start_processes(options: TrainingOptions) -> None:
    """Joins the processes. To be called before TrainingArguments, which would start torch's own and not DeepSpeed's."""
    # accelerate imports DeepSpeed in any case, which would say that it looked for a GPU
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    if options.deepspeed == "none":
        return
    if "RANK" not in os.environ:
        # one process, which DeepSpeed would otherwise look for under MPI
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in alone.items()})
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    if not torch.cuda.is_available():
        # compiled at first use, which takes 100 s and a compiler
        __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)


def training_arguments(options: TrainingOptions, work: Path, blocks: int, evaluated: bool) -> TrainingArguments:
    """The Trainer's arguments. `work`: for small files of its own; `blocks`: of the training split; `evaluated`: blocks
    were held out."""
    precision = precision_of(options)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    distributed = "RANK" in os.environ
    return TrainingArguments(
        output_dir=str(work),
        max_steps=options.max_steps,
        num_train_epochs=options.num_train_epochs,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.lr_scheduler_type,
        warmup_steps=options.warmup_steps,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        per_device_train_batch_size=options.per_device_train_batch_size,
        per_device_eval_batch_size=options.per_device_eval_batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        seed=options.seed,
        bf16=precision == "bfloat16",
        fp16=precision == "float16",
        deepspeed=deepspeed_config(options),
        logging_steps=options.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if options.eval_steps and evaluated else "no",
        eval_steps=options.eval_steps or None,
        # the CheckpointManager says when
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        ddp_backend="gloo" if distributed and not torch.cuda.is_available() else None,
        ddp_timeout=options.ddp_timeout,
        ddp_find_unused_parameters=False,
        # an incomplete last batch would be filled up with blocks of the first
        dataloader_drop_last=blocks >= options.per_device_train_batch_size * world,
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
        log_level="warning",
        report_to=[],
    )


NO_BLOCK = -1
"""In a list of blocks: one that is not counted."""


# --- the loop ---------------------------------------------------------------------------------------------------------


class PackedTrainer(CheckpointingTrainer):
    """A Trainer for PackedLlama: our optimizer groups, and an evaluation that gathers three numbers."""

    def __init__(self, options: TrainingOptions, manager: CheckpointManager, **settings: Any) -> None:
        super().__init__(manager, data_collator=Collate(options.faithful), **settings)
        self._options = options
        self._gathers_weights = zero_stage(deepspeed_settings(options)) == 3
        # labels stand where they are predicted: nothing is left to be shifted
        assert not self._loss_shifts_labels

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW in four groups: embeddings or not, decayed (matrices) or not (norms)."""
        if self.optimizer is None:
            groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
            trained: Any = self.model
            for name, parameter in trained.named_parameters():
                if parameter.requires_grad:
                    embedding = "embed_tokens" in name or "lm_head" in name
                    groups.setdefault((embedding, parameter.ndim > 1), []).append(parameter)
            rate = self.args.learning_rate
            self.optimizer = torch.optim.AdamW(
                [
                    {
                        "params": parameters,
                        "lr": self._options.embedding_lr or rate if embedding else rate,
                        "weight_decay": self.args.weight_decay if decayed else 0.0,
                    }
                    for (embedding, decayed), parameters in groups.items()
                ],
                lr=rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                fused=True,
            )
        return self.optimizer

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss, perplexity and next-token accuracy over the held-out blocks, each block once, on all processes.

        A cancel ends it, without a figure, and the training with it.
        """
        blocks: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        model = self.model_wrapped
        model_of: Any = self.model
        was_training = model.training
        model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        mine = list(range(self.args.process_index, len(blocks), self.args.world_size))
        size = self.args.per_device_eval_batch_size
        share = -(-len(blocks) // self.args.world_size)
        if self._gathers_weights and len(mine) < share:
            # all processes gather each layer together: as many passes for each, the last one without labels
            mine.append(NO_BLOCK)
        with torch.no_grad():
            for first in range(0, share, size):
                # all processes ask, those too that have a block less
                if self._checkpoint_manager.told_to_stop():
                    break
                if first >= len(mine):
                    continue
                batch = self._prepare_inputs(self._batch(blocks, mine[first : first + size]))
                with self.compute_loss_context_manager():
                    found = model_of(**batch)
                sums += torch.tensor([found["loss"], found["correct"], found["labels"]], dtype=torch.float64).to(sums)
        model.train(was_training)
        if self._checkpoint_manager.stopping:
            self._checkpoint_manager.stop(self)
            return {}
        if self.args.world_size > 1:
            dist.all_reduce(sums)
        loss, correct, count = sums.tolist()
        metrics = {
            f"{metric_key_prefix}_loss": loss / max(count, 1),
            f"{metric_key_prefix}_perplexity": _exp(loss / max(count, 1)),
            f"{metric_key_prefix}_accuracy": correct / max(count, 1),
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _batch(self, blocks: Any, indices: list[int]) -> dict[str, torch.Tensor]:
        batch: dict[str, torch.Tensor] = self.data_collator([blocks[max(index, 0)] for index in indices])
        for row, index in enumerate(indices):
            if index == NO_BLOCK:
                batch["labels"][row] = IGNORED
        return batch


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def train(
    options: TrainingOptions,
    arguments: TrainingArguments,
    model: nn.Module,
    blocks: PackedDataset,
    held_out: PackedDataset | None,
    run: Run,
    metrics_root: str | None = None,
) -> Trained:
    """Trains `model` in place, from the newest checkpoint of the run if there is one. All processes call it.

    metrics_root: where the metrics are put while it runs. SystemExit(143) when asked to stop.
    """
    manager = CheckpointManager(options, run, arguments, zero_stage(deepspeed_settings(options)))
    metrics = MetricsCallback(what_a_step_is(options, arguments, model, blocks), metrics_root)
    trainer = PackedTrainer(
        options,
        manager,
        model=model,
        args=arguments,
        train_dataset=blocks,
        eval_dataset=held_out,
        callbacks=[metrics],
    )
    trainer.remove_callback(PrinterCallback)
    resumed = manager.resume()
    arguments.eval_on_start = held_out is not None and manager.evaluation_is_missing()
    with metrics:
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        lines = trainer.state.log_history
        evaluated = any("eval_loss" in line and line["step"] == trainer.state.global_step for line in lines)
        if held_out is not None and not evaluated and not manager.stopping:
            trainer.evaluate()
        manager.over()
    return Trained(History.of(lines), trained_weights(model))


def what_a_step_is(
    options: TrainingOptions, arguments: TrainingArguments, model: nn.Module, blocks: PackedDataset
) -> Step:
    """Tokens and operations of an optimizer step, and what the devices can do."""
    world = arguments.world_size
    size = options.per_device_train_batch_size * options.gradient_accumulation_steps * world
    peak = options.peak_tflops
    if not peak and torch.cuda.is_available():
        peak = peak_tflops(torch.cuda.get_device_name())
    facts = blocks.facts
    return Step(
        tokens=size * facts["tokens"] / facts["blocks"],
        flops_per_token=flops_per_token(model, facts["learned"] / facts["tokens"]),
        peak_flops=peak * 1e12 * world,
    )
