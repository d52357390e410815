"""The course of a training: one list of lines, shown as metrics.jsonl, TensorBoard's events, a bar and plain lines."""

import io
import json
import logging
import os
import pty
import struct
import threading
from types import SimpleNamespace

import pytest
import torch
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event
from transformers import LlamaConfig, TrainerControl, TrainerState

from zhllama import storage
from zhllama.errors import InputError, StorageFault
from zhllama.training import metrics as course
from zhllama.training.hardware import peak_tflops
from zhllama.training.metrics import (
    EVENTS,
    METRICS,
    History,
    MetricsCallback,
    MetricsUploader,
    flops_per_token,
)
from zhllama.training.model import packed

LOG = [
    {"step": 1, "time": 100.5, "loss": 9.0, "learning_rate": 1e-4, "epoch": 0.1, "tokens_per_second": 1000, "mfu": 0.3},
    {"step": 2, "time": 101.5, "loss": 8.0, "learning_rate": 2e-4, "tokens_per_second": 3000, "peak_memory_gb": 2.5},
    {"step": 2, "time": 102.5, "eval_loss": 8.5, "eval_perplexity": 4914.8, "eval_accuracy": 0.25},
    {"step": 2, "train_runtime": 3.0},
]


def events_of(content: bytes) -> list[Event]:
    """TensorBoard's format: length, its checksum, the event, its checksum."""

    def masked(data: bytes) -> int:
        value = crc32c(data)
        return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF

    found, at = [], 0
    while at < len(content):
        (length,) = struct.unpack("<Q", content[at : at + 8])
        assert struct.unpack("<I", content[at + 8 : at + 12])[0] == masked(content[at : at + 8])
        data = content[at + 12 : at + 12 + length]
        assert struct.unpack("<I", content[at + 12 + length : at + 16 + length])[0] == masked(data)
        found.append(Event.FromString(data))
        at += 16 + length
    return found


def test_what_was_measured_is_kept_and_nothing_else():
    history = History(LOG)
    assert [line["step"] for line in history.lines] == [1, 2, 2]
    assert not any({"epoch", "train_runtime"} & line.keys() for line in history.lines)
    assert [json.loads(line) for line in history.jsonl().splitlines()] == history.lines
    assert history.metrics() == {
        "steps": 2.0, "first_loss": 9.0, "loss": 8.0, "eval_loss": 8.5, "eval_perplexity": 4914.8,
        "eval_accuracy": 0.25, "tokens_per_second": 2000, "mfu": 0.3, "peak_memory_gb": 2.5,
    }  # fmt: skip


def test_tensorboard_finds_every_value_at_its_step_and_time():
    first, *events = events_of(History(LOG).events())
    assert first.file_version == "brain.Event:2"
    assert [(event.step, event.wall_time) for event in events] == [(1, 100.5), (2, 101.5), (2, 102.5)]
    values = [{value.tag: value.simple_value for value in event.summary.value} for event in events]
    assert values[0]["train/loss"] == 9.0
    assert values[1]["train/tokens_per_second"] == 3000
    assert values[2] == pytest.approx({"eval/loss": 8.5, "eval/perplexity": 4914.8, "eval/accuracy": 0.25})


def test_a_longer_course_begins_with_the_same_bytes():
    """TensorBoard reads on where it stopped in a file that has grown."""
    assert History(LOG).events().startswith(History(LOG[:1]).events())


# --- speed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("Tesla V100-SXM2-32GB", 125),
        ("Radeon", 0),
    ],
)
def test_a_gpus_peak_is_known_by_its_name(device, peak):
    assert peak_tflops(device) == peak


def test_a_token_of_a_7b_model_costs_what_its_matrices_say():
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    with torch.device("meta"):
        model = packed("LlamaForCausalLM")(config)
    layers, head = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 32000 * 4096
    assert flops_per_token(model, 1.0) == 6 * (layers + head)
    assert flops_per_token(model.requires_grad_(False), 0.25) == 4 * (layers + 0.25 * head)


# --- while it runs ----------------------------------------------------------------------------------------------------


def test_the_metrics_of_a_running_training_stand_in_the_store(store):
    root = storage.join(store, "pretrain/key")
    uploader = MetricsUploader(root, every=0.0)
    uploader.show(LOG[:1])
    wait_for(lambda: read(root, EVENTS))
    uploader.show(LOG)
    wait_for(lambda: read(root, METRICS) == History(LOG).jsonl())
    wait_for(lambda: read(root, EVENTS) == History(LOG).events())
    uploader.close()


def read(root: str, name: str) -> bytes | None:
    try:
        return storage.read_bytes(storage.join(root, name))
    except FileNotFoundError:
        return None


def wait_for(holds) -> None:
    """Looks until it holds; the test's own time-out ends what never does."""
    pause = threading.Event()
    while not holds():
        pause.wait(0.02)


def test_a_store_that_fails_costs_a_warning_and_no_training(monkeypatch, caplog):
    tried = threading.Semaphore(0)

    def fail(uri: str, content: bytes) -> None:
        tried.release()
        raise StorageFault("s3://x: 503")

    monkeypatch.setattr(course.storage, "write_bytes", fail)
    uploader = MetricsUploader("s3://x/y", every=0.0)
    for _ in range(2):
        uploader.show(LOG)
        assert tried.acquire(timeout=60)
    uploader.close()
    assert caplog.text.count("could not be shown: s3://x: 503") == 1


def run_steps(callback: MetricsCallback, steps: int = 3) -> TrainerState:
    """A Trainer's calls for some steps and an evaluation."""
    state = TrainerState(max_steps=steps, log_history=[], is_world_process_zero=True)
    arguments, control = SimpleNamespace(save_strategy="no"), TrainerControl()
    with callback:
        callback.on_train_begin(arguments, state, control)
        for step in range(1, steps + 1):
            state.global_step = step
            callback.on_step_end(arguments, state, control)
            state.log_history.append({"step": step, "loss": 5.0 / step, "learning_rate": 1e-4})
            callback.on_log(arguments, state, control)
        state.log_history.append({"step": steps, "eval_loss": 2.0, "eval_perplexity": 7.4, "eval_accuracy": 0.4})
        callback.on_log(arguments, state, control)
    return state


def test_each_log_is_a_plain_line_where_there_is_no_terminal(caplog):
    with caplog.at_level(logging.INFO):
        state = run_steps(MetricsCallback(512, flops_per_token=1e9, peak_flops=1e12))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 4
    assert lines[0].startswith("step 1/3: loss 5.000, lr 1.00e-04, ")
    assert all(word in lines[0] for word in ("tokens/s", "MFU", "peak", "GB", "left"))
    assert lines[3] == "step 3/3: held-out loss 2.000, perplexity 7.4, next-token accuracy 40.0%"
    first = state.log_history[0]
    assert {"time", "tokens_per_second", "mfu", "peak_memory_gb"} <= first.keys()
    assert first["mfu"] == pytest.approx(first["tokens_per_second"] / 1e3, abs=1e-3)


def test_on_a_terminal_a_bar_shows_the_course_and_evaluations_stand_above_it(monkeypatch):
    master, slave = pty.openpty()
    shown = io.StringIO()

    def read_all() -> None:
        while True:
            try:
                content = os.read(master, 4096)
            except OSError:
                return
            shown.write(content.decode(errors="replace"))

    reader = threading.Thread(target=read_all)
    reader.start()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        handler = logging.StreamHandler(terminal)
        root = logging.getLogger()
        root.addHandler(handler)
        monkeypatch.setattr(logging.getLogger("training"), "level", logging.INFO)
        try:
            run_steps(MetricsCallback(512))
            assert handler.stream is terminal
        finally:
            root.removeHandler(handler)
    reader.join()
    os.close(master)
    text = shown.getvalue()
    assert "3/3" in text
    assert "loss 1.667" in text
    assert "next-token accuracy 40.0%" in text
    assert "step 1/3" not in text


def test_the_utilisation_needs_a_known_peak():
    state = run_steps(MetricsCallback(512, flops_per_token=1e9))
    assert not any("mfu" in line for line in state.log_history)


def test_a_loss_that_is_no_number_ends_the_training_with_the_way_out():
    callback = MetricsCallback(512)
    state = TrainerState(max_steps=3, log_history=[{"step": 1, "loss": float("nan")}], is_world_process_zero=True)
    with callback, pytest.raises(InputError, match="the loss at step 0 is nan; lower --learning-rate"):
        callback.on_log(None, state, TrainerControl())
