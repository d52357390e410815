"""A training that goes wrong is stopped, in one line that says what to change and where to go on from."""

import itertools
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState

from components.pretrain.options import Pretrain
from tests.soak.training import DEFAULTS
from zhllama.artifacts.open import open_artifact
from zhllama.errors import InputError, StorageFault
from zhllama.stage.run import run_stage
from zhllama.training.checkpointing import OVERFLOWS, CheckpointManager
from zhllama.training.checkpoints import Run
from zhllama.training.loss import Score
from zhllama.training.stage import run_training as pretrain
from zhllama.training.trainer import at_smallest_scale


@pytest.fixture
def pretrained(tiny, tmp_path, monkeypatch):
    """The stage in this process: `pretrained(**options)`."""
    monkeypatch.setenv("ZHLLAMA_CACHE", str(tmp_path / "cache"))

    def run(**options):
        chosen = {**DEFAULTS, "model": tiny.model, "dataset": tiny.dataset, "store": str(tmp_path / "store")}
        return run_stage(Pretrain(**{**chosen, **options}), pretrain)

    return run


def test_a_loss_that_is_no_number_stops_it_with_the_last_good_checkpoint(pretrained, tmp_path):
    with pytest.raises(InputError) as stopped:
        pretrained(learning_rate=1e30, warmup_steps=3.0, save_steps=1)
    said = str(stopped.value)
    assert said.startswith("the loss at step ")
    assert "lower --learning-rate, or give --precision bfloat16; the last good checkpoint is " in said
    checkpoint = open_artifact(said.rsplit(" ", 1)[1])
    checkpoint.verify()
    lines = json.loads(checkpoint.read("trainer.json"))["log_history"]
    assert all(line["loss"] < 100 for line in lines if "loss" in line)
    assert not list((tmp_path / "store").glob("pretrain/*/manifest.json"))


def test_without_a_checkpoint_it_says_so(pretrained):
    with pytest.raises(InputError, match=r"is (nan|inf); .*; no checkpoint had been written"):
        pretrained(learning_rate=1e30, warmup_steps=0.0, save_steps=0)


@pytest.mark.slow
def test_a_run_of_overflows_stops_it(pretrained, monkeypatch):
    """There is no float16 on a CPU: here accelerate only says that each step was left out, as its scaler makes it."""
    monkeypatch.setattr("accelerate.Accelerator.optimizer_step_was_skipped", True)
    with pytest.raises(InputError, match=f"overflowed float16 in step after step, up to step {OVERFLOWS}; lower"):
        pretrained(save_steps=0)


@pytest.mark.slow
def test_a_few_overflows_are_the_scalers_business(pretrained, monkeypatch):
    # asked twice a step: by the Trainer, whether the LR schedule goes on, and by the CheckpointManager
    skipped = itertools.cycle([True] * 2 * (OVERFLOWS - 1) + [False] * 2)
    monkeypatch.setattr("accelerate.Accelerator.optimizer_step_was_skipped", property(lambda self: next(skipped)))
    assert pretrained(save_steps=0, max_steps=OVERFLOWS + 5, lr_scheduler_type="constant").kind == "adapter"


def test_deepspeeds_own_end_of_the_scale_is_recognised():
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler(1, 100, min_scale=1, delayed_shift=1, consecutive_hysteresis=False, dtype=torch.half)
    with pytest.raises(Exception, match="minimum") as raised:
        scaler.update_scale(True)
    assert at_smallest_scale(raised.value)
    assert not at_smallest_scale(ValueError("loss scale already at minimum"))


def test_a_perplexity_beyond_all_numbers_is_one_of_json(pretrained, monkeypatch):
    monkeypatch.setattr("zhllama.training.model.score", lambda rows, *_: Score(torch.tensor(1e6), rows.sum() * 0, 1))
    metrics = pretrained(max_steps=1, save_steps=0).metrics
    assert metrics["eval_loss"] == 1e6
    json.dumps(metrics, allow_nan=False)


# --- the time without a checkpoint ------------------------------------------------------------------------------------


@pytest.fixture
def step(tmp_path, monkeypatch) -> Callable[..., None]:
    """`step(seconds, failed=3, why="503")`: a step's end at this time, when an upload has failed; `newest`: arrived."""
    options: Any = SimpleNamespace(
        deepspeed="none", per_device_train_batch_size=1, gradient_accumulation_steps=1, save_total_limit=3,
        resume_from_checkpoint="",
        save_steps=0, max_minutes_without_checkpoint=2.0,
    )  # fmt: skip
    arguments: Any = SimpleNamespace(process_index=0, world_size=1)
    manager = CheckpointManager(options, Run(str(tmp_path), "pretrain", "k", {}, {}), arguments)
    manager.trainer = SimpleNamespace(accelerator=SimpleNamespace(optimizer_step_was_skipped=False))  # type: ignore[assignment]

    def end(now: float, failed: int = 0, why: str = "", newest: Any = None, minutes: float = 2.0) -> None:
        options.max_minutes_without_checkpoint = minutes
        monkeypatch.setattr("zhllama.training.checkpointing.time", SimpleNamespace(monotonic=lambda: now))
        uploads = manager._uploads
        uploads.failed_step, uploads.why = max(uploads.failed_step, failed), why or uploads.why
        uploads.newest = newest or uploads.newest
        manager.on_step_end(None, TrainerState(global_step=1, max_steps=9), TrainerControl())

    return end


def test_the_time_without_a_checkpoint_counts_from_the_first_failure_after_a_success(step):
    step(1e6)
    step(1e6 + 100, failed=1, why="503")
    step(1e6 + 150, newest=object())
    step(2e6 + 100, failed=2, why="503")
    step(2e6 + 200, failed=3, why="still 503")
    step(2e6 + 219)
    with pytest.raises(StorageFault, match=r"no checkpoint could be written for 2 minutes .*: still 503"):
        step(2e6 + 221)


def test_the_time_of_0_minutes_never_ends(step):
    step(0.0, failed=1, why="503", minutes=0.0)
    step(1e9, minutes=0.0)
