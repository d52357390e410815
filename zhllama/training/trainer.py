"""The training loop: transformers' Trainer with DeepSpeed or plain data parallelism, made lean.

Ours are the optimizer's groups (embeddings may have an lr of their own), the evaluation (sums of losses and right
guesses, no logits gathered), the metrics (metrics.py) and the checkpoints (checkpointing.py). The rest is the
Trainer's: its loss is divided by the labelled tokens of the whole step on all processes, so one process or many give
the same course.
"""

import itertools
import logging
import math
import os
import socket
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from zhllama.data.packed import IGNORED, PackedDataset
from zhllama.errors import InputError
from zhllama.training.averaging import Average
from zhllama.training.budget import Budget
from zhllama.training.checkpointing import OVERFLOWED, CheckpointManager
from zhllama.training.checkpoints import Run
from zhllama.training.hardware import peak_tflops
from zhllama.training.loopback import listen_on_loopback_alone
from zhllama.training.metrics import History, MetricsCallback, flops_per_token, is_evaluation
from zhllama.training.model import collate, trainable, trained_weights
from zhllama.training.options import TrainingOptions, deepspeed_settings
from zhllama.training.replay import Blocks, Replay, Replayed

log = logging.getLogger("training")

_AS_GIVEN = (
    "max_steps", "num_train_epochs", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay",
    "max_grad_norm", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "seed",
    "logging_steps", "ddp_timeout",
)  # fmt: skip
"""Options that TrainingArguments takes as they are."""


def precision_of(options: TrainingOptions) -> str:
    """`bfloat16`, `float16` or `float32`; auto is bfloat16 on a GPU. InputError where the device cannot do it."""
    if options.precision == "float16" and not torch.cuda.is_available():
        raise InputError("--precision float16: it needs a GPU, and there is none here; give bfloat16 or float32")
    if options.precision != "auto":
        return options.precision
    return "bfloat16" if torch.cuda.is_available() else "float32"


def start_processes(options: TrainingOptions) -> None:
    """Joins the processes. To be called before TrainingArguments, which would start torch's own and not DeepSpeed's."""
    gpu = torch.cuda.is_available()
    # accelerate imports DeepSpeed in any case, which would say that it looked for a GPU
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if gpu else "cpu")
    if options.deepspeed == "none":
        return
    if "RANK" not in os.environ:
        # one process, which DeepSpeed would otherwise look for under MPI
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        listen_on_loopback_alone()
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    if not gpu:
        # compiled at first use, which takes 100 s and a compiler
        __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if gpu else "gloo", verbose=False)


def training_arguments(options: TrainingOptions, work: Path, blocks: int, evaluated: bool) -> TrainingArguments:
    """The Trainer's arguments. `work`: for small files of its own; `blocks`: of the training split; `evaluated`: blocks
    were held out."""
    precision = precision_of(options)
    gpu = torch.cuda.is_available()
    deepspeed = deepspeed_settings(options)
    if deepspeed is not None and not gpu:
        # there are no streams to overlap with
        deepspeed["zero_optimization"]["overlap_comm"] = False
    return TrainingArguments(
        **{name: getattr(options, name) for name in _AS_GIVEN},
        output_dir=str(work),
        bf16=precision == "bfloat16",
        fp16=precision == "float16",
        deepspeed=deepspeed,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if options.eval_steps and evaluated else "no",
        eval_steps=options.eval_steps or None,
        # the CheckpointManager says when
        save_strategy="no",
        use_cpu=not gpu,
        ddp_backend="gloo" if "RANK" in os.environ and not gpu else None,
        ddp_find_unused_parameters=False,
        # an incomplete last batch would be filled up with blocks of the first
        dataloader_drop_last=blocks >= options.per_device_train_batch_size * int(os.environ.get("WORLD_SIZE", "1")),
        dataloader_num_workers=0,
        dataloader_pin_memory=gpu,
        remove_unused_columns=False,
        disable_tqdm=True,
        log_level="warning",
        report_to=[],
    )


class PackedTrainer(Trainer):
    """A Trainer for what `packed` makes: our optimizer groups, an evaluation that gathers three numbers, replay and its
    budget, and the CheckpointManager's checkpoints."""

    def __init__(
        self,
        options: TrainingOptions,
        manager: CheckpointManager,
        held_out: Mapping[str, Blocks],
        replayed: Replayed | None = None,
        **settings: Any,
    ) -> None:
        """held_out: by the beginning of the names of what is measured on them: `eval`, `eval_replay`."""
        collated = partial(collate, faithful=options.faithful)
        evaluated: Any = next(iter(held_out.values()), None)
        super().__init__(data_collator=collated, eval_dataset=evaluated, **settings)
        self._options, self._manager, self._held_out = options, manager, held_out
        self._bytes_per_label = replayed.bytes_per_label if replayed else 0.0
        share = options.replay_share
        blocks: Any = self.train_dataset
        self._replay = Replay(replayed.blocks, blocks, collated, options.seed, share) if replayed else None
        self._budget = Budget(options.forgetting_budget, share, replayed.base_loss) if replayed else None
        self.kept: dict[str, Any] = {} if self._replay is None else {"replay": self._replay, "budget": self._budget}
        """What a checkpoint carries besides, by name."""
        self.average: Average | None = None
        manager.trainer = self
        self.add_callback(manager)
        # labels stand where they are predicted: nothing is left to be shifted
        assert not self._loss_shifts_labels

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW in four groups: embeddings or not, decayed (matrices) or not (norms)."""
        if self.optimizer is not None:
            return self.optimizer
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        trained: Any = self.model
        for name, parameter in trainable(trained).items():
            embedding = "embed_tokens" in name or "lm_head" in name
            groups.setdefault((embedding, parameter.ndim > 1), []).append(parameter)
        lr, embedding_lr = self.args.learning_rate, self._options.embedding_lr or self.args.learning_rate
        decay, betas = self.args.weight_decay, (self.args.adam_beta1, self.args.adam_beta2)
        given = [
            {"params": parameters, "lr": embedding_lr if embedding else lr, "weight_decay": decay if decayed else 0.0}
            for (embedding, decayed), parameters in groups.items()
        ]
        self.optimizer = torch.optim.AdamW(given, lr=lr, betas=betas, eps=self.args.adam_epsilon, fused=True)
        return self.optimizer

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Loss, perplexity and next-token accuracy over the held-out blocks, each once, on all processes, and what
        replay comes to by it. Before the first step what is known is measured, on replay text alone. A cancel ends it,
        without a figure, and the training with it."""
        begun = self.state.global_step > 0
        measured = {name: blocks for name, blocks in self._held_out.items() if begun or name != "eval"}
        with nullcontext() if self.average is None else self.average.put_in():
            # a cancel: the rest is not looked at
            found = {name: self._sums_over(held_out) for name, held_out in measured.items()}
        if self._manager.stopping:
            self._manager.stop()
            return {}
        metrics: dict[str, float] = {}
        for name, sums in found.items():
            if self.args.world_size > 1:
                dist.all_reduce(sums)
            loss, correct, count = sums.tolist()
            mean = loss / max(count, 1)
            if name == "eval":
                # beyond 709.78 it is no number of 64 bits, and infinity none of JSON
                perplexity, accuracy = math.exp(min(mean, 709.78)), correct / max(count, 1)
                metrics |= {"eval_loss": mean, "eval_perplexity": perplexity, "eval_accuracy": accuracy}
            else:
                metrics |= self._of_replay(mean)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _sums_over(self, blocks: Blocks) -> torch.Tensor:
        """Of this process's part of the blocks: the sum of losses, right guesses, labels; float64 [3]."""
        model: Any = self.model
        was_training = self.model_wrapped.training
        self.model_wrapped.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        mine = list(range(self.args.process_index, len(blocks), self.args.world_size))
        size = self.args.per_device_eval_batch_size
        share = -(-len(blocks) // self.args.world_size)
        filled = self._manager.zero_stage == 3 and len(mine) < share
        if filled:
            # all processes gather each layer together: as many passes for each, the last block without labels
            mine.append(0)
        with torch.no_grad():
            for first in range(0, share, size):
                # all processes ask, those too that have a block less
                if self._manager.told_to_stop():
                    break
                if first >= len(mine):
                    continue
                batch = self.data_collator([blocks[index] for index in mine[first : first + size]])
                if filled and first + size >= len(mine):
                    batch["labels"][-1] = IGNORED
                batch = self._prepare_inputs(batch)
                with self.compute_loss_context_manager():
                    found = model(**batch)
                sums += torch.tensor([found["loss"], found["correct"], found["labels"]], dtype=torch.float64).to(sums)
        self.model_wrapped.train(was_training)
        return sums

    def _of_replay(self, mean: float) -> dict[str, float]:
        """What a loss of the held-out replay text comes to; with a budget, what it decides holds from here on."""
        assert self._budget is not None
        assert self._replay is not None
        decision = self._budget.measured(mean)
        self._replay.share = decision.share
        found = {"eval_replay_loss": mean, "base_replay_loss": self._budget.base or mean}
        if self._bytes_per_label:
            found["eval_replay_bits_per_byte"] = mean / math.log(2) / self._bytes_per_label
        if self._options.forgetting_budget:
            steered = {"replay_share": decision.share, "rate_factor": decision.rate}
            found |= {"budget_spent": decision.spent, **steered}
        return found

    def say_what_is_spent(self) -> None:
        """Where the budget does not hold at the end."""
        spent = self._budget.decision.spent if self._budget is not None else 0.0
        if spent > 1 and self.is_world_process_zero():
            said = f"the forgetting budget is exceeded, {spent:.0%} of {self._options.forgetting_budget:g} are spent"
            log.warning("%s; give a lower --learning-rate, fewer --eval-steps or more --replay-share", said)

    def _get_learning_rate(self) -> float:
        rate: float = super()._get_learning_rate()
        return rate if self._budget is None else rate * self._budget.decision.rate

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        if self._replay is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = list(itertools.islice(epoch_iterator, num_batches))
        self._replay.mix(batches, self.args.process_index, self.args.world_size)
        return batches, self._get_num_items_in_batch(batches, device)

    # --- what the CheckpointManager has to know or decide -------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if self._budget is not None and self._options.forgetting_budget:
            # set anew each time: the scheduler writes there as well, but not after a step that was skipped
            optimizer, scheduler = cast(Any, self.optimizer), cast(Any, self.lr_scheduler)
            for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                group["lr"] = rate * self._budget.decision.rate
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._manager.see_loss(loss)
        return loss

    def train(self, *arguments: Any, **named: Any) -> Any:
        try:
            return super().train(*arguments, **named)
        except Exception as error:
            if at_smallest_scale(error):
                raise self._manager.failure(OVERFLOWED) from error
            raise

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if self._options.ema:
            self.average = Average(self, self._options.ema)
            self.add_callback(self.average)
        if self._manager.saved is not None:
            self._manager.saved.restore(self)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing: the model's weights are put back with the optimizer's, when both are wrapped."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._manager.saved is not None:
            self._manager.saved.restore_random()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._manager.save()

    def _maybe_log_save_evaluate(self, *arguments: Any, **named: Any) -> None:
        """What follows a step; a cancel that came meanwhile is not left waiting for the next step's end."""
        evaluates_or_saves = self.control.should_evaluate or self.control.should_save
        super()._maybe_log_save_evaluate(*arguments, **named)
        # after the last step little is left: the result is published
        more = self.state.global_step < self.state.max_steps
        if self._manager.stopping or (evaluates_or_saves and more and self._manager.told_to_stop()):
            self._manager.stop()

    def _run_epoch(self, *arguments: Any, **named: Any) -> None:
        """Nothing when no step is left, as after a checkpoint of the last one: the loop would make one more."""
        if not self.control.should_training_stop and self.state.global_step < self.state.max_steps:
            super()._run_epoch(*arguments, **named)


def at_smallest_scale(error: Exception) -> bool:
    """Whether DeepSpeed says that its loss scale cannot come down any more (it has no class of its own for that)."""
    return type(error) is Exception and "loss scale already at minimum" in str(error)


def train(
    options: TrainingOptions,
    arguments: TrainingArguments,
    model: nn.Module,
    blocks: PackedDataset,
    held_out: Mapping[str, Blocks],
    run: Run,
    metrics_root: str | None = None,
    replayed: Replayed | None = None,
) -> tuple[History, dict[str, torch.Tensor]]:
    """Trains `model` in place, from the newest checkpoint of the run if there is one: its course, and trained weights
    by name (float32, on the CPU), or with --ema their average. All processes call it. held_out: as PackedTrainer has
    them; metrics_root: where the metrics are put while it runs. SystemExit(143) when asked to stop."""
    manager = CheckpointManager(options, run, arguments)
    peak = options.peak_tflops or (peak_tflops(torch.cuda.get_device_name()) if torch.cuda.is_available() else 0.0)
    facts, world = blocks.facts, arguments.world_size
    size = options.per_device_train_batch_size * options.gradient_accumulation_steps * world
    flops = flops_per_token(model, facts["learned"] / facts["tokens"])
    metrics = MetricsCallback(size * facts["tokens"] / facts["blocks"], flops, peak * 1e12 * world, metrics_root)
    trainer = PackedTrainer(
        options, manager, held_out, replayed, model=model, args=arguments, train_dataset=blocks, callbacks=[metrics]
    )
    trainer.remove_callback(PrinterCallback)
    resumed = manager.resume()
    # what is forgotten is told from what was known
    begins = resumed is None and "eval_replay" in held_out
    arguments.eval_on_start = begins or (bool(held_out) and manager.evaluation_is_missing())
    with metrics:
        trainer.train(resume_from_checkpoint=resumed)
        lines = trainer.state.log_history
        evaluated = any(is_evaluation(line) and line["step"] == trainer.state.global_step for line in lines)
        if held_out and not evaluated and not manager.stopping:
            trainer.evaluate()
        manager.over()
    trainer.say_what_is_spent()
    return History(lines), trained_weights(model) if trainer.average is None else trainer.average.whole()
