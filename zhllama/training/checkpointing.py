"""Nothing of a training is lost: checkpoints while it goes on, a clean stop, and a stop before it goes wrong.

At the end of every step the ranks agree on five numbers (`Agreed`), by one small all-reduce over gloo: a GPU is not
waited for but for the loss. All that concerts the ranks happens there, in their main threads; the threads that upload
hold no collective. What comes between two steps may take long: they agree before each pass of an evaluation, too, and
after a checkpoint was taken. A checkpoint whose turn comes while the one before is still on its way is taken as soon as
that has arrived: a slow store costs checkpoints, never time.
"""

import json
import logging
import math
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.open import open_artifact
from zhllama.errors import EXIT_CANCELLED, InputError, StorageFault
from zhllama.training import checkpoints
from zhllama.training.elastic import DEFAULT_SHUTDOWN_TIMEOUT, SHUTDOWN_TIMEOUT, training_begins
from zhllama.training.exchange import values_of_all
from zhllama.training.metrics import is_evaluation
from zhllama.training.options import TrainingOptions, deepspeed_settings, zero_stage
from zhllama.training.training_state import Saved, Uploads, take

log = logging.getLogger("training")

OVERFLOWS = 20
"""Steps in a row whose gradients overflow float16 before the training stops: the scale has come down by a million."""
LEFT_FOR_THE_END = 5.0
"""Seconds of the grace period that are kept for the processes to end in."""
RESUME = "--resume-from-checkpoint"
WRONG = (
    "",
    "the loss at step {} is nan",
    "the loss at step {} is inf",
    "the gradients have overflowed float16 in step after step, up to step {}",
)
_, NAN, INFINITE, OVERFLOWED = range(4)


class Agreed(NamedTuple):
    """What the ranks agreed on at a step's end: of each number the greatest."""

    stop: int  # whether one was asked to stop
    busy: int  # whether an upload is still running
    failed_step: int  # whose upload failed last
    wrong: int  # what of WRONG
    too_long: int  # whether no checkpoint could be written for too long


class CheckpointManager(TrainerCallback):
    """Takes checkpoints, finds the newest, and ends the training where it has to end. `trainer` is to be set."""

    trainer: Trainer

    def __init__(self, options: TrainingOptions, run: checkpoints.Run, arguments: TrainingArguments) -> None:
        self._options, self._run, self._arguments = options, run, arguments
        self._rank, self._world = arguments.process_index, arguments.world_size
        self.zero_stage = zero_stage(deepspeed_settings(options))
        self._global_batch = options.per_device_train_batch_size * options.gradient_accumulation_steps * self._world
        self._group = dist.new_group(backend="gloo") if self._world > 1 else None
        self._uploads = Uploads(run, self._rank, self._world, options.save_total_limit)
        self._buffers: dict[str, torch.Tensor] = {}
        self._too_long_at = math.inf  # on rank 0: counted from the first upload that failed since one arrived
        self._why = ""  # why the last upload failed
        self._failure_seen = 0
        self._owed = False
        self._good: Manifest | None = None
        self.saved: Saved | None = None
        self._option = RESUME if options.resume_from_checkpoint else "the checkpoint"
        self._named = ""  # the checkpoint that the options name, when rank 0 has told it
        self._loss: torch.Tensor | None = None
        self._wrong = 0
        self._overflows = 0
        self._ends_at: float | None = None  # once asked to stop: when what is still on its way is given up
        self.stopping = False  # whether the ranks have agreed to stop
        self._taken = 0  # the step of the checkpoint that was taken, or gone on from, last
        self._before: Any = None  # the handler of SIGTERM before the first step

    def resume(self) -> str | None:
        """Reads the checkpoint to go on from, chosen by rank 0, and returns a folder for Trainer.train (its state,
        without a weight); None when there is none. InputError when the one that was asked for cannot be gone on from;
        StorageFault when the store does not answer."""
        self._uploads.start = self._of_all(secrets.token_hex(4))[0]
        candidates = self._candidates()
        while self.saved is None:
            found: Any = None
            if self._rank == 0:
                try:
                    found = next(candidates, None)
                except (InputError, StorageFault) as error:
                    found = error
            found, self._named = self._of_all(found)[0], self._of_all(self._named)[0]
            if isinstance(found, Exception):
                raise found
            if found is None:
                break
            self._read(found)
        if self._rank == 0:
            self._uploads.begin_cleaning()
        if self.saved is None:
            return None
        self._good, self._taken = self.saved.manifest, self.saved.step
        if self._rank == 0:
            log.info("going on from step %d: %s", self.saved.step, self._good.reference)
        folder = Path(str(self._arguments.output_dir)) / f"rank-{self._rank}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "trainer_state.json").write_text(json.dumps(self.saved.trainer))
        return str(folder)

    def _candidates(self) -> Iterator[str]:
        """References in the order in which they are tried. Of a checkpoint that the options name, those that came of
        it go first: a start that is repeated, as a killed pod's is, goes on where the one before was."""
        named = None
        if self._options.resume_from_checkpoint:
            named = checkpoints.open_checkpoint(self._options.resume_from_checkpoint, RESUME).manifest
            self._named = named.reference
        for manifest in checkpoints.own(self._run):
            if named is None or manifest.facts.get("came_of") == self._named:
                yield from self._fit(manifest)
        for manifest in [named] if named is not None else checkpoints.of_earlier_release(self._run):
            yield from self._fit(manifest)

    def _fit(self, checkpoint: Manifest) -> Iterator[str]:
        """Its reference; none, where its manifest is of no use and it is not the one that the options name. InputError
        when no training like this one can go on from it, nor from an older one."""
        reference = checkpoint.reference
        checkpoints.require_same_run(checkpoint, self._run, self._option)
        try:
            checkpoints.require_world(checkpoint, self._world, self.zero_stage)
            batch = checkpoint.facts["global_batch"]
        except KeyError as error:
            if reference == self._named:
                raise InputError(f"{RESUME} {reference}: its manifest has no {error}; give another") from error
            log.warning("%s cannot be read and is left aside: its manifest has no %s", reference, error)
            return
        if batch != self._global_batch:
            log.warning(
                "the checkpoint was trained with %d blocks a step, this training takes %d: its steps are counted "
                "on, but the order of the data changes; keep the product of processes, batch and accumulation",
                batch,
                self._global_batch,
            )
        yield reference

    def _read(self, reference: str) -> None:
        """Sets `saved` when every rank could read its part. All of them raise when it is the one that was named."""
        problem: Exception | None = None
        try:
            self.saved = Saved(open_artifact(reference, self._option), self._rank, self._world)
        except (InputError, StorageFault, ValueError, KeyError, TypeError) as error:
            problem = error
        problems = [one for one in self._of_all(problem) if one is not None]
        if not problems:
            return
        self.saved = None
        worst = next((one for one in problems if isinstance(one, StorageFault)), problems[0])
        if isinstance(worst, StorageFault):
            raise worst
        if reference == self._named:
            raise InputError(str(worst))
        if self._rank == 0:
            log.warning("%s cannot be read and is left aside: %s", reference, worst)

    def evaluation_is_missing(self) -> bool:
        """Whether the step that is gone on from was to be evaluated, and a cancel came first."""
        if self.saved is None or not self._options.eval_steps or self.saved.step % self._options.eval_steps:
            return False
        lines = self.saved.trainer["log_history"]
        return not any(is_evaluation(line) and line["step"] == self.saved.step for line in lines)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # until now a cancel ended the process: there was nothing to save
        self._before = signal.signal(signal.SIGTERM, self._ask)
        training_begins()
        if self.saved is not None:
            self.saved.restore_loss(self.trainer)

    def see_loss(self, loss: torch.Tensor) -> None:
        """Counts in the loss of one forward pass: what is not finite stays so in the sum."""
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._loss is not None and not torch.isfinite(self._loss):
            self._wrong = NAN if torch.isnan(self._loss) else INFINITE
        self._loss = None
        self._overflows = self._overflows + 1 if self.trainer.accelerator.optimizer_step_was_skipped else 0
        if self._overflows >= OVERFLOWS:
            self._wrong = OVERFLOWED
        agreed = self._agree()
        if agreed.wrong:
            raise self.failure(agreed.wrong)
        if agreed.too_long:
            said = f"no checkpoint could be written for {self._options.max_minutes_without_checkpoint:g} minutes"
            why = self._why or "see the log of rank 0"
            raise StorageFault(f"{self._run.folder}: {said} (--max-minutes-without-checkpoint): {why}")
        step, every = state.global_step, self._options.save_steps
        last = step >= state.max_steps
        if agreed.stop and not last:
            self.stopping = True
            # the checkpoint is taken when the step is logged
            control.should_evaluate = control.should_save = False
            return
        due = bool(every) and step % every == 0 and not last
        if due and agreed.busy and self._rank == 0:
            said = "the checkpoint of step %d has to wait: the one of step %d is still on its way"
            log.warning(said, step, self._uploads.step)
        self._owed = (self._owed or due) and not last
        control.should_save = self._owed and not agreed.busy
        self._owed = self._owed and not control.should_save

    def told_to_stop(self) -> bool:
        """Between two steps: whether one of the ranks was asked to stop. All ranks at once."""
        self.stopping = self.stopping or bool(self._agree().stop)
        return self.stopping

    def stop(self) -> None:
        """No step more, and a checkpoint of the last one. All ranks at once."""
        self.trainer.control.should_training_stop = True
        if self._options.save_steps:
            self.save()

    def save(self) -> None:
        """Takes the checkpoint of this step, if that is not done, and starts its upload. All ranks at once."""
        if self._taken == self.trainer.state.global_step:
            return
        if self.stopping and not self._settle("the upload that is running"):
            # its buffers are still read from
            return
        part = take(self.trainer, self._buffers)
        self._taken = part.step
        self._uploads.begin(part, zero_stage=self.zero_stage, global_batch=self._global_batch, came_of=self._named)

    def _agree(self) -> Agreed:
        """Exchanges the numbers, and on rank 0 gives up a checkpoint of which another rank's part will not come, and
        counts the time without one."""
        uploads = self._uploads
        too_long = time.monotonic() > self._too_long_at
        mine = self._ends_at is not None, uploads.busy, uploads.failed_step, self._wrong, too_long
        numbers = torch.tensor([int(one) for one in mine], dtype=torch.int64)
        if self._group is not None:
            dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self._group)
        agreed = Agreed(*numbers.tolist())
        if uploads.newest is not None and uploads.newest is not self._good:
            self._good = uploads.newest
            self._too_long_at = math.inf
        if agreed.failed_step > self._failure_seen:
            self._failure_seen = agreed.failed_step
            if self._rank == 0:
                if uploads.step == agreed.failed_step:
                    uploads.give_up.set()
                self._why = uploads.why or "another rank could not upload its part; see its log"
                minutes = self._options.max_minutes_without_checkpoint or math.inf
                self._too_long_at = min(self._too_long_at, time.monotonic() + minutes * 60)
        return agreed

    def failure(self, wrong: int) -> InputError:
        """What ends a training that goes wrong. All ranks at once."""
        # what is still on its way is the checkpoint that the message should name
        self._settle("the last checkpoint")
        text = WRONG[wrong].format(self.trainer.state.global_step)
        good = self._of_all(self._good.reference if self._good is not None else None)[0]
        last = f"the last good checkpoint is {good}" if good else "no checkpoint had been written"
        return InputError(f"{text}; lower --learning-rate, or give --precision bfloat16; {last}")

    def over(self) -> None:
        """Sees the last upload through; ends the process with 143 when it was asked to stop."""
        self._settle("the last checkpoint")
        if self.stopping:
            if self._rank == 0:
                good = self._uploads.newest
                log.warning("stopped: %s", f"to go on from {good.reference}" if good else "no checkpoint was written")
            sys.exit(EXIT_CANCELLED)
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _settle(self, what: str) -> bool:
        """Waits until no rank uploads (true), or one's grace period is used up. The ranks look at it together."""
        while self._agree().busy:
            if any(self._of_all(self._ends_at is not None and time.monotonic() > self._ends_at)):
                if self._rank == 0:
                    log.warning("the grace period is over before %s has arrived", what)
                return False
            self._uploads.join(0.1)
        return True

    def _ask(self, signum: int, frame: object) -> None:
        log.warning("asked to stop: ending after this step, evaluation or checkpoint")
        if self._ends_at is None:
            grace = float(os.environ.get(SHUTDOWN_TIMEOUT) or DEFAULT_SHUTDOWN_TIMEOUT)
            self._ends_at = time.monotonic() + max(grace - LEFT_FOR_THE_END, grace / 2)

    def _of_all(self, value: Any) -> list[Any]:
        """Every rank's value, on all ranks, in their main threads."""
        return values_of_all(value, self._group)
