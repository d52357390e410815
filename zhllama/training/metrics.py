"""The course of a training while it runs and after: what is measured at each log, and everywhere it is shown.

One list of lines is the source of all of it: metrics.jsonl, TensorBoard's events and the report page are each written
anew from it. So a training that was killed and went on (its checkpoint carries the lines) has one unbroken curve, and
in S3 the files of a running training are whole at every moment. MFU is the share of the hardware's peak that goes into
the model's own products, without attention's scores (2% of a 7B model's work at 512 tokens) and recomputed activations.
"""

import json
import logging
import math
import operator
import resource
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from zhllama import storage, terminal
from zhllama.errors import InputError, StorageFault
from zhllama.progress import duration
from zhllama.storage.private import temporary_folder

log = logging.getLogger("training")

METRICS = "metrics.jsonl"
EVENTS = "tensorboard/events.out.tfevents.0.training"

Line = dict[str, Any]
"""One line of metrics.jsonl: `step`, `time` (Unix) and what was measured there."""

_RECORDED = (
    "step", "time", "loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu", "peak_memory_gb",
    "eval_loss", "eval_perplexity", "eval_accuracy", "eval_replay_loss", "eval_replay_bits_per_byte",
    "base_replay_loss", "budget_spent", "replay_share", "rate_factor",
)  # fmt: skip
_EVALUATED = ("eval_loss", "eval_replay_loss")


def is_evaluation(line: Line) -> bool:
    """Whether it is of an evaluation, and not of training steps."""
    return any(name in line for name in _EVALUATED)


class History:
    """The course of a training: the lines of metrics.jsonl, which are what is ours of the Trainer's own log."""

    def __init__(self, log_history: Sequence[Line]) -> None:
        measured = [line for line in log_history if "loss" in line or is_evaluation(line)]
        self.lines: list[Line] = [{name: line[name] for name in _RECORDED if name in line} for line in measured]

    def jsonl(self) -> bytes:
        return "".join(json.dumps(line) + "\n" for line in self.lines).encode()

    def events(self) -> bytes:
        """The same as a file of TensorBoard's: train/loss, eval/loss and so on."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.record_writer import RecordWriter

        began = self.lines[0].get("time", 0.0) if self.lines else 0.0
        events = [Event(wall_time=began, file_version="brain.Event:2")]
        for line in self.lines:
            measured = {name: value for name, value in line.items() if name not in ("step", "time")}
            tags = {name: f"train/{name}".replace("train/eval_", "eval/") for name in measured}
            values = [Summary.Value(tag=tags[name], simple_value=value) for name, value in measured.items()]
            step, at = int(line["step"]), line.get("time", 0.0)
            events.append(Event(wall_time=at, step=step, summary=Summary(value=values)))
        with temporary_folder() as folder:
            path = Path(folder, "events")
            with closing(RecordWriter(str(path))) as writer:
                for event in events:
                    writer.write(event.SerializeToString())
            return path.read_bytes()

    def metrics(self) -> dict[str, float]:
        """The figures of a manifest: first and last loss, the last evaluation, the median speed, the peak memory."""
        series = {name: [line[name] for line in self.lines if name in line] for name in _RECORDED}
        last_step = [line["step"] for line in self.lines if "loss" in line][-1]
        found = {"steps": float(last_step), "first_loss": series["loss"][0], "loss": series["loss"][-1]}
        for names, figure in (
            ([name for name in _RECORDED if name.startswith("eval_")], operator.itemgetter(-1)),
            (("base_replay_loss", "budget_spent", "replay_share"), operator.itemgetter(-1)),
            (("tokens_per_second", "mfu"), statistics.median),
            (("peak_memory_gb",), max),
        ):
            found |= {name: figure(series[name]) for name in names if series[name]}
        return found

    def summary(self) -> str:
        """`loss 5.13 → 3.20 in 200 steps`."""
        figures = self.metrics()
        return f"loss {figures['first_loss']:.2f} → {figures['loss']:.2f} in {figures['steps']:.0f} steps"


def flops_per_token(model: nn.Module, predicted: float) -> float:
    """Floating-point operations that a token costs, forward and backward, in the model's matrices: one of n weights
    takes 2n forward, 2n for the gradient of its input, and 2n for its own if it is trained. predicted: the share of
    tokens that have a label: lm_head is applied to no others."""
    total = 0.0
    # a head that is the embedding is a product all the same
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # an embedding is looked up; a replaced original is not used
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
        if dimensions < 2 or "embed_tokens" in name or "original_module" in name:
            continue
        share = predicted if "lm_head" in name else 1.0
        # single rows of a matrix that is counted anyway: only their gradient is left
        own = 2 if "trainable_tokens" in name else 6
        total += share * size_of(parameter) * (own if parameter.requires_grad else 4)
    return total


def size_of(parameter: nn.Parameter) -> int:
    """Its elements, also where ZeRO-3 keeps a part of them here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


class MetricsUploader:
    """Puts the newest course of a running training into the store, in a thread of its own, with `every` seconds between
    two uploads at least. A store that cannot be reached costs a warning: what is published does not depend on it."""

    def __init__(self, root: str, every: float = 5.0) -> None:
        self._root, self._every = root, every
        self._newest: list[Line] = []
        self._shown, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="live-metrics", daemon=True)
        self._thread.start()

    def show(self, lines: Sequence[Line]) -> None:
        """The Trainer's log so far; what is shown of it is made in the thread."""
        self._newest = list(lines)
        self._shown.set()

    def close(self) -> None:
        """Waits for the upload in flight, if there is one; the last lines are published with the artifact."""
        self._over.set()
        self._shown.set()
        self._thread.join()

    def _run(self) -> None:
        warned = False
        while self._shown.wait() and not self._over.is_set():
            self._shown.clear()
            history = History(self._newest)
            try:
                storage.write_bytes(storage.join(self._root, METRICS), history.jsonl())
                storage.write_bytes(storage.join(self._root, EVENTS), history.events())
            except (StorageFault, InputError, OSError) as error:
                if not warned:
                    log.warning("the metrics of the running training could not be shown: %s", error)
                warned = True
            self._over.wait(self._every)


class MetricsCallback(TrainerCallback, ExitStack):
    """Measures speed, MFU and memory into the Trainer's own log (a checkpoint carries it), shows the course, and stops
    a training whose loss is no number. tokens: of documents (no padding) in an optimizer step on all processes;
    peak_flops: FLOP/s of all devices, 0 when it is not known. root: where the metrics of the running training are put,
    on rank 0. The bar and the uploads end with the context."""

    def __init__(
        self, tokens: float, flops_per_token: float = 0.0, peak_flops: float = 0.0, root: str | None = None
    ) -> None:
        super().__init__()
        self._tokens, self._flops_per_token, self._peak_flops = tokens, flops_per_token, peak_flops
        self._began = self._last = 0.0
        self._first_step = self._last_step = 0
        self._root = root
        self._uploader: MetricsUploader | None = None
        self._bar: Any = None  # on a terminal: rich's, log lines go above it

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began = self._last = time.monotonic()
        self._first_step = self._last_step = state.global_step
        if not state.is_world_process_zero:
            return
        if self._root is not None:
            self._uploader = self.enter_context(closing(MetricsUploader(self._root)))
        if sys.stderr.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[shown]}")
            bar = Progress(TextColumn("training"), *columns, console=terminal.console(sys.stderr), transient=True)
            self._bar = self.enter_context(bar)
            self._bar.add_task("training", total=state.max_steps, completed=state.global_step, shown="")

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            # the last step belongs to the curve; its weights are published, so no checkpoint of them is needed
            control.should_log, control.should_save = True, False
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=state.global_step)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        line = state.log_history[-1]
        step, now = state.global_step, time.monotonic()
        for name in ("loss", *_EVALUATED):
            if not math.isfinite(line.get(name, 0.0)):
                said = f"the {name} at step {step} is {line[name]}"
                raise InputError(f"{said}; lower --learning-rate, or give --precision bfloat16")
        if "loss" not in line and not is_evaluation(line):
            return
        line["time"] = round(time.time(), 1)
        if "loss" in line and step > self._last_step:
            speed = (step - self._last_step) * self._tokens / (now - self._last)
            line["tokens_per_second"] = round(speed)
            if self._peak_flops:
                line["mfu"] = round(speed * self._flops_per_token / self._peak_flops, 4)
            # of this process so far: on the GPU where there is one, else resident
            kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else kilobytes * 1024
            line["peak_memory_gb"] = round(peak / 1e9, 3)
            self._last_step = step
        # the time of an evaluation is no part of the training's speed
        self._last = now
        if state.is_world_process_zero:
            left = (now - self._began) / max(step - self._first_step, 1) * (state.max_steps - step)
            self._show(line, step, state.max_steps, left)
            if self._uploader is not None:
                self._uploader.show(state.log_history)

    def _show(self, line: Line, step: int, steps: int, left: float) -> None:
        if is_evaluation(line):
            log.info("step %d/%d: %s", step, steps, _said_of(line))
            return
        speed = f"{line.get('tokens_per_second', 0):,.0f} tokens/s"
        if "mfu" in line:
            speed += f", MFU {line['mfu']:.1%}"
        memory = line.get("peak_memory_gb", 0)
        shown = f"loss {line['loss']:.3f}, lr {line['learning_rate']:.2e}, {speed}"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, shown=f"{shown}, {memory:.1f} GB")
        else:
            log.info("step %d/%d: %s, peak %.1f GB, %s left", step, steps, shown, memory, duration(left))


def _said_of(line: Line) -> str:
    """What an evaluation found."""
    said = []
    if "eval_loss" in line:
        said.append(f"held-out loss {line['eval_loss']:.3f}, perplexity {line['eval_perplexity']:.4g}")
        said.append(f"next-token accuracy {line['eval_accuracy']:.1%}")
    if "eval_replay_loss" in line:
        change = line["eval_replay_loss"] / line["base_replay_loss"] - 1
        bits = line.get("eval_replay_bits_per_byte")
        shown = f"loss {line['eval_replay_loss']:.3f}" if bits is None else f"{bits:.3f} bits per byte"
        said.append(f"replay text {shown} ({change:+.2%} of the base's)")
    if "budget_spent" in line:
        steered = f"replay share {line['replay_share']:.3f}, rate × {line['rate_factor']:.2f}"
        said.append(f"{line['budget_spent']:.0%} of the forgetting budget spent: {steered}")
    return ", ".join(said)
