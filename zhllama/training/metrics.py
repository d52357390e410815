"""The course of a training while it runs and after: what is measured at each log, and everywhere it is shown.

One list of lines is the source of all of it: metrics.jsonl, TensorBoard's events and the report page are each written
anew from it. So a training that was killed and went on (its checkpoint carries the lines) has one unbroken curve, and
in S3 the files of a running training are whole at every moment. They lie where the artifact's will.

MFU is the share of the hardware's peak that goes into the model's own products; attention's scores (2% of a 7B model's
work at 512 tokens) and recomputed activations are not counted. The memory is the first process's peak.
"""

import json
import logging
import math
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from zhllama import storage
from zhllama.errors import InputError, StorageFault

log = logging.getLogger("training")

METRICS = "metrics.jsonl"
EVENTS = "tensorboard/events.out.tfevents.0.training"
LIVE_EVERY = 5.0
"""Seconds at least between two uploads of a running training's metrics."""

Line = dict[str, Any]
"""One line of metrics.jsonl: `step`, `time` (Unix) and what was measured there."""

_RECORDED = (
    "step", "time", "loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu", "peak_memory_gb",
    "eval_loss", "eval_perplexity", "eval_accuracy",
)  # fmt: skip


@dataclass(frozen=True)
class History:
    """The course of a training: the lines of metrics.jsonl."""

    lines: list[Line]

    @classmethod
    def of(cls, log_history: Sequence[Line]) -> "History":
        """What is ours of the Trainer's own log."""
        recorded = [{name: line[name] for name in _RECORDED if name in line} for line in log_history]
        return cls([line for line in recorded if "loss" in line or "eval_loss" in line])

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) wherever it was measured."""
        return [(int(line["step"]), line[name]) for line in self.lines if name in line]

    def jsonl(self) -> bytes:
        return "".join(json.dumps(line) + "\n" for line in self.lines).encode()

    def events(self) -> bytes:
        """The same as a file of TensorBoard's: train/loss, eval/loss and so on."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.record_writer import RecordWriter

        with tempfile.TemporaryDirectory(prefix="zhllama-") as folder:
            path = Path(folder, "events")
            writer = RecordWriter(str(path))
            began = self.lines[0].get("time", 0.0) if self.lines else 0.0
            writer.write(Event(wall_time=began, file_version="brain.Event:2").SerializeToString())
            for line in self.lines:
                values = [
                    Summary.Value(tag=_tag(name), simple_value=value)
                    for name, value in line.items()
                    if name not in ("step", "time")
                ]
                event = Event(wall_time=line.get("time", 0.0), step=int(line["step"]), summary=Summary(value=values))
                writer.write(event.SerializeToString())
            writer.close()
            return path.read_bytes()

    def metrics(self) -> dict[str, float]:
        """The figures of a manifest: first and last loss, the last evaluation, the median speed, the peak memory."""
        losses = self.series("loss")
        found = {"steps": float(losses[-1][0]), "first_loss": losses[0][1], "loss": losses[-1][1]}
        for name in ("eval_loss", "eval_perplexity", "eval_accuracy"):
            if measured := self.series(name):
                found[name] = measured[-1][1]
        for name in ("tokens_per_second", "mfu"):
            if values := [value for _, value in self.series(name)]:
                found[name] = statistics.median(values)
        if memory := self.series("peak_memory_gb"):
            found["peak_memory_gb"] = max(value for _, value in memory)
        return found

    def summary(self) -> str:
        """`loss 5.13 → 3.20 in 200 steps`."""
        figures = self.metrics()
        return f"loss {figures['first_loss']:.2f} → {figures['loss']:.2f} in {figures['steps']:.0f} steps"


def _tag(name: str) -> str:
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


# --- speed ------------------------------------------------------------------------------------------------------------


def flops_per_token(model: nn.Module, predicted: float) -> float:
    """Floating-point operations that a token costs, forward and backward, in the model's matrices.

    A matrix of n weights takes 2n forward, 2n for the gradient of its input, and 2n for its own if it is trained.
    predicted: the share of tokens that have a label: lm_head is applied to no others.
    """
    total = 0.0
    for name, parameter in model.named_parameters():
        # an embedding is looked up; a replaced original is not used
        if _dimensions(parameter) < 2 or "embed_tokens" in name or "original_module" in name:
            continue
        share = predicted if "lm_head" in name else 1.0
        # single rows of a matrix that is counted anyway: only their gradient is left
        own = 2 if "trainable_tokens" in name else 6
        total += share * size_of(parameter) * (own if parameter.requires_grad else 4)
    return total


def size_of(parameter: nn.Parameter) -> int:
    """Its elements, also where ZeRO-3 keeps a part of them here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _dimensions(parameter: nn.Parameter) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))


@dataclass(frozen=True)
class Step:
    """What an optimizer step is, on all processes."""

    tokens: float
    """Tokens of documents: padding is not counted."""
    flops_per_token: float = 0.0
    peak_flops: float = 0.0
    """FLOP/s of all devices; 0 when it is not known."""

    def mfu(self, tokens_per_second: float) -> float | None:
        return tokens_per_second * self.flops_per_token / self.peak_flops if self.peak_flops else None


def peak_memory_gb() -> float:
    """Of this process so far, in GB: on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


# --- while it runs ----------------------------------------------------------------------------------------------------


class MetricsUploader:
    """Puts the newest course of a running training into the store, in a thread of its own: training waits for nothing.

    A store that cannot be reached costs a warning; what is published at the end does not depend on it.
    """

    def __init__(self, root: str, every: float = LIVE_EVERY) -> None:
        self._root = root
        self._every = every
        self._newest: list[Line] | None = None
        self._changed = threading.Condition()
        self._over = False
        self._warned = False
        self._thread = threading.Thread(target=self._run, name="live-metrics", daemon=True)
        self._thread.start()

    def show(self, lines: Sequence[Line]) -> None:
        """The Trainer's log so far; what is shown of it is made in the thread."""
        with self._changed:
            self._newest = list(lines)
            self._changed.notify()

    def close(self) -> None:
        """Waits for the upload in flight, if there is one; the last lines are published with the artifact."""
        with self._changed:
            self._over = True
            self._newest = None
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._newest is not None or self._over)
                lines, self._newest = self._newest, None
            if lines is None:
                return
            history = History.of(lines)
            try:
                storage.write_bytes(storage.join(self._root, METRICS), history.jsonl())
                storage.write_bytes(storage.join(self._root, EVENTS), history.events())
            except (StorageFault, InputError, OSError) as error:
                if not self._warned:
                    log.warning("the metrics of the running training could not be shown: %s", error)
                self._warned = True
            with self._changed:
                self._changed.wait_for(lambda: self._over, timeout=self._every)


class _Bar:
    """A progress bar on a terminal; log lines go above it."""

    def __init__(self, steps: int, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
        )
        self._bar = Progress(*columns, console=Console(file=sys.stderr), transient=True)
        self._bar.start()
        self._task = self._bar.add_task("training", total=steps, completed=done, shown="")

    def show(self, step: int, text: str | None = None) -> None:
        self._bar.update(self._task, completed=step)
        if text is not None:
            self._bar.update(self._task, shown=text)

    def close(self) -> None:
        self._bar.stop()


class MetricsCallback(TrainerCallback):
    """Measures speed, MFU and memory, shows the course, and stops a training whose loss is no number.

    What it measures goes into the Trainer's own log, so that a checkpoint carries it. `root`: where the metrics of the
    running training are put, on rank 0. A context manager: the bar and the uploads end with it.
    """

    def __init__(self, step: Step, root: str | None = None) -> None:
        self._step = step
        self._began = self._last = 0.0
        self._first_step = self._last_step = 0
        self._root = root
        self._uploader: MetricsUploader | None = None
        self._bar: _Bar | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._uploader is not None:
            self._uploader.close()

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began = self._last = time.monotonic()
        self._first_step = self._last_step = state.global_step
        if state.is_world_process_zero:
            if self._root is not None:
                self._uploader = MetricsUploader(self._root)
            if sys.stderr.isatty():
                self._bar = _Bar(state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            # the last step belongs to the curve; its weights are published, so no checkpoint of them is needed
            control.should_log, control.should_save = True, False
        if self._bar is not None:
            self._bar.show(state.global_step)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        line = state.log_history[-1]
        step, now = state.global_step, time.monotonic()
        for name in ("loss", "eval_loss"):
            if not math.isfinite(line.get(name, 0.0)):
                raise InputError(
                    f"the {name} at step {step} is {line[name]}; lower --learning-rate, or give --precision bfloat16"
                )
        if "loss" not in line and "eval_loss" not in line:
            return
        line["time"] = round(time.time(), 1)
        if "loss" in line and step > self._last_step:
            speed = (step - self._last_step) * self._step.tokens / (now - self._last)
            line["tokens_per_second"] = round(speed)
            if (mfu := self._step.mfu(speed)) is not None:
                line["mfu"] = round(mfu, 4)
            line["peak_memory_gb"] = round(peak_memory_gb(), 3)
            self._last_step = step
        # the time of an evaluation is no part of the training's speed
        self._last = now
        if state.is_world_process_zero:
            self._show(line, step, state.max_steps, now)
            if self._uploader is not None:
                self._uploader.show(state.log_history)

    def _show(self, line: Line, step: int, steps: int, now: float) -> None:
        if "eval_loss" in line:
            shown = f"held-out loss {line['eval_loss']:.3f}, perplexity {line['eval_perplexity']:.4g}"
            log.info("step %d/%d: %s, next-token accuracy %.1f%%", step, steps, shown, 100 * line["eval_accuracy"])
            return
        speed = f"{line.get('tokens_per_second', 0):,.0f} tokens/s"
        if "mfu" in line:
            speed += f", MFU {line['mfu']:.1%}"
        shown = f"loss {line['loss']:.3f}, rate {line['learning_rate']:.2e}, {speed}"
        if self._bar is not None:
            self._bar.show(step, f"{shown}, {line.get('peak_memory_gb', 0):.1f} GB")
            return
        left = (now - self._began) / max(step - self._first_step, 1) * (steps - step)
        log.info(
            "step %d/%d: %s, peak %.1f GB, %s left", step, steps, shown, line.get("peak_memory_gb", 0), duration(left)
        )


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
