"""A training goes on where it was, to the last bit: after kill -9 at any moment, after SIGTERM on any one rank, in
fewer processes; and a store that fails costs it checkpoints, not its life."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from components.merge_adapters.merger import merge_adapters
from components.merge_adapters.options import MergeAdapters
from components.pretrain.options import Pretrain
from tests.faulty_proxy import Fault, FaultyProxy, Request
from tests.soak.training import (
    DEFAULTS,
    STEPS,
    Material,
    killed_and_resumed,
    losses,
    material,
    reference,
    start,
    weights,
)
from zhllama import storage
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.open import open_artifact
from zhllama.errors import InputError
from zhllama.stage.run import run_stage
from zhllama.training.checkpoints import complete
from zhllama.training.stage import run_training as pretrain

LOGGED_EVERY_FOUR = {"max_steps": 16, "logging_steps": 4, "save_steps": 4, "eval_steps": 0, "lora_dropout": 0.0}
ZERO_2 = {"deepspeed": "zero2", "max_steps": 6, "save_steps": 2, "eval_steps": 0}
LONG = {"eval_steps": 0, "logging_steps": 100}


def kept(store: Path) -> list[Manifest]:
    """The complete checkpoints of the one training of a store, oldest first. (On a busy machine a checkpoint waits for
    the one before it: which steps they are of is not certain.)"""
    found = [open_artifact(str(path)).manifest for path in store.glob("checkpoints/pretrain/*/step-*/manifest.json")]
    return sorted(found, key=lambda manifest: manifest.facts["step"])


def checkpoints(store: str) -> list[int]:
    """Steps of the complete checkpoints of the one training of a store, newest first."""
    (folder,) = {"/".join(item.name.split("/")[:2]) for item in storage.listing(f"{store}/checkpoints")}
    return [manifest.facts["step"] for manifest in complete(f"{store}/checkpoints/{folder}")]


def finished(tiny: Material, folder: Path, **options: object) -> Path:
    """The store of a training in two processes that ran to its end."""
    training = start(tiny, str(folder / "store"), folder / "cache", {}, **options)
    assert training.end() == 0, training.said
    return folder / "store"


# --- kill -9 ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["none", pytest.param("zero2", marks=pytest.mark.slowest)])
def test_killed_at_random_moments_it_ends_with_the_losses_of_an_uninterrupted_run(backend, tiny, tmp_path, s3_store):
    reference(tiny, tmp_path, {}, backend, f"{s3_store}/whole")
    counted = killed_and_resumed(4, tiny, tmp_path, f"{s3_store}/killed", {}, backend, 2, first=True)
    assert counted["killed"] >= 1
    assert counted["went on from a checkpoint"] >= 1
    assert losses(f"{s3_store}/killed") == losses(f"{s3_store}/whole")
    assert weights(f"{s3_store}/killed") == weights(f"{s3_store}/whole")
    assert len(losses(f"{s3_store}/whole")) == STEPS + 3


STEERED = {"max_steps": 8, "save_steps": 2, "eval_steps": 2, "replay_share": 0.3, "forgetting_budget": 0.05, "ema": 0.9}


@pytest.mark.slowest
@pytest.mark.parametrize("backend", ["none", "zero2"])
def test_killed_it_ends_with_the_replay_the_decisions_and_the_average_of_one_that_was_not(
    backend, tiny, train, tmp_path
):
    options = {**STEERED, "deepspeed": backend, "replay": tiny.dataset}
    assert train(str(tmp_path / "whole"), **options).end() == 0
    killed = train(str(tmp_path / "killed"), **options)
    assert killed.wait_for("is complete")
    killed.kill("all")
    assert killed.end() != 0
    again = train(str(tmp_path / "killed"), **options)
    assert again.end() == 0, again.said
    assert "going on from step" in again.said
    assert course(tmp_path / "killed") == course(tmp_path / "whole")


def course(store: Path) -> tuple[list[dict[str, float]], str]:
    """The lines of the one training of a store, without what a clock told, and the digest of its adapter."""
    (path,) = store.glob("pretrain/*/metrics.jsonl")
    timed = ("time", "tokens_per_second", "peak_memory_gb")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: line[name] for name in line if name not in timed} for line in lines], weights(str(store))


# --- SIGTERM ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> Path:
    """The store of a training in two processes that nobody stopped, with checkpoints."""
    return finished(tiny, tmp_path_factory.mktemp("whole"), **LOGGED_EVERY_FOUR)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["launcher", "last worker"])
def test_sigterm_on_any_process_leaves_one_checkpoint_and_143(whom, train, whole, tmp_path):
    """Stopped between two lines of the log: the line that spans the stop is the same, too."""
    options = {**LOGGED_EVERY_FOUR, "save_steps": 1000}
    store = tmp_path / "stopped"
    stopped = train(str(store), **options)
    assert stopped.wait_for("step 4/16")
    os.kill(stopped.process.pid if whom == "launcher" else stopped.workers()[-1], signal.SIGTERM)
    assert stopped.end() == 143, stopped.said
    (step,) = checkpoints(str(store))
    assert 4 <= step < 16
    assert "stopped: to go on from" in stopped.said
    assert not list(store.glob("pretrain/*/manifest.json"))
    again = train(str(store), **options)
    assert again.end() == 0, again.said
    assert f"going on from step {step}" in again.said
    assert losses(str(store)) == losses(str(whole))
    assert weights(str(store)) == weights(str(whole))


EVALUATED_FOR_LONG = {"max_steps": 4, "logging_steps": 1, "save_steps": 1000, "eval_steps": 2, "lora_dropout": 0.0}
EVALUATED_FOR_LONG |= {"per_device_eval_batch_size": 1}
AT_ONCE = 60.0
"""Seconds in which a cancel outside of a step has ended everything, on a busy machine too."""


@pytest.fixture(scope="module")
def much_held_out(tmp_path_factory) -> Material:
    """An evaluation takes seconds."""
    return material(str(tmp_path_factory.mktemp("much-held-out")), held_out_blocks=1000)


@pytest.fixture(scope="module")
def evaluated(much_held_out, tmp_path_factory) -> Path:
    """The store of a training with long evaluations that nobody stopped."""
    return finished(much_held_out, tmp_path_factory.mktemp("evaluated"), **EVALUATED_FOR_LONG)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "whom"), [(2, "launcher"), (2, "last worker"), (4, "launcher")])
def test_sigterm_in_an_evaluation_ends_it_with_a_checkpoint_of_its_step(step, whom, much_held_out, evaluated, tmp_path):
    """The evaluation is made up for: the course that follows is that of a training which nobody stopped."""
    store = tmp_path / "stopped"
    stopped = start(much_held_out, str(store), tmp_path / "cache", {}, **EVALUATED_FOR_LONG)
    # the line before the evaluation
    assert stopped.wait_for(f"step {step}/4: loss")
    os.kill(stopped.process.pid if whom == "launcher" else stopped.workers()[-1], signal.SIGTERM)
    told = time.monotonic()
    assert stopped.end() == 143, stopped.said
    assert time.monotonic() - told < AT_ONCE
    assert f"step {step}/4: held-out loss" not in stopped.said
    assert checkpoints(str(store)) == [step]
    again = start(much_held_out, str(store), tmp_path / "cache", {}, **EVALUATED_FOR_LONG)
    assert again.end() == 0, again.said
    assert f"going on from step {step}" in again.said
    assert losses(str(store)) == losses(str(evaluated))
    assert weights(str(store)) == weights(str(evaluated))


@pytest.mark.slow
def test_sigterm_while_a_checkpoint_is_taken_ends_it_with_that_checkpoint(train, tmp_path):
    store = str(tmp_path / "stopped")
    module = "tests.zhllama.training.told_while_saving"
    stopped = train(store, module=module, **{**LOGGED_EVERY_FOUR, "logging_steps": 1, "save_steps": 3})
    assert stopped.end() == 143, stopped.said
    assert checkpoints(store) == [3]
    assert "step 4/16" not in stopped.said


# --- other numbers of processes ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_plain_data_parallelism_goes_on_in_fewer_processes(train, whole, tmp_path):
    """Equal global batch, no dropout: losses within 2e-5 of the uninterrupted run's."""
    oldest = kept(whole)[0]
    alone = {"per_device_train_batch_size": 8, "resume_from_checkpoint": oldest.reference, "save_steps": 0}
    one = train(str(tmp_path / "one"), processes=1, **{**LOGGED_EVERY_FOUR, **alone})
    assert one.end() == 0, one.said
    assert f"going on from step {oldest.facts['step']}" in one.said
    for (step, which, loss), (other_step, other, expected) in zip(
        losses(str(tmp_path / "one")), losses(str(whole)), strict=True
    ):
        assert (step, which) == (other_step, other)
        assert loss == pytest.approx(expected, abs=2e-5)


@pytest.fixture(scope="module")
def zero_2(tiny, tmp_path_factory) -> Path:
    """The store of a training with ZeRO-2 in two processes, with a checkpoint."""
    return finished(tiny, tmp_path_factory.mktemp("zero-2"), **ZERO_2)


@pytest.mark.slow
def test_a_zero_checkpoint_of_other_processes_is_refused_with_the_way_out(train, zero_2, tmp_path):
    one = train(str(tmp_path / "one"), processes=1, **ZERO_2, resume_from_checkpoint=kept(zero_2)[0].reference)
    assert one.end() == 2, one.said
    assert "ZeRO-2 optimizer of 2 processes, this training has 1; start it with 2 processes, or publish" in one.said
    assert not list((tmp_path / "one").rglob("manifest.json"))


# --- a checkpoint as a result -----------------------------------------------------------------------------------------


@pytest.fixture
def pretrained(tiny, tmp_path, monkeypatch):
    """The stage in this process, with the options of `zero_2` and others: `pretrained(**options)`."""
    monkeypatch.setenv("ZHLLAMA_CACHE", str(tmp_path / "cache"))

    def run(**options) -> Manifest:
        chosen = {**DEFAULTS, "model": tiny.model, "dataset": tiny.dataset, "store": str(tmp_path / "store")}
        return run_stage(Pretrain(**{**chosen, **ZERO_2, **options}), pretrain)

    return run


@pytest.mark.slow
def test_a_checkpoint_can_be_published_and_merged(pretrained, zero_2, tiny, tmp_path):
    oldest = kept(zero_2)[0]
    adapter = pretrained(publish_checkpoint=oldest.reference)
    assert (adapter.kind, adapter.facts["step"]) == ("adapter", oldest.facts["step"])
    lines = [json.loads(line) for line in open_artifact(adapter.reference).read("metrics.jsonl").splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, oldest.facts["step"] + 1))
    merging = MergeAdapters(store=str(tmp_path / "merged"), model=tiny.model, adapters=adapter.reference)
    assert run_stage(merging, merge_adapters).kind == "hf-model"


@pytest.mark.slow
def test_replay_decisions_and_average_go_on_from_a_checkpoint_which_publishes_its_average(pretrained, tiny, tmp_path):
    """In one process: the quick one beside the kills above."""
    options = {**STEERED, "replay": tiny.dataset, "deepspeed": "none"}
    made = pretrained(**options)
    first = course(tmp_path / "store")
    assert {"replay_share", "rate_factor", "budget_spent"} <= first[0][-1].keys()
    oldest, *newer = kept(tmp_path / "store")
    for manifest in newer:
        storage.delete_all(manifest.root)
    storage.delete_all(made.root)
    pretrained(**options)
    assert course(tmp_path / "store") == first
    published = pretrained(**options, publish_checkpoint=oldest.reference)
    saved = load_file(f"{oldest.root}/averaged.safetensors")
    adapter = load_file(f"{published.root}/adapter_model.safetensors")
    assert all(
        torch.equal(adapter[name.replace(".default", "")], saved[name].half()) for name in saved if "lora" in name
    )


@pytest.mark.slow
@pytest.mark.parametrize("option", ["resume_from_checkpoint", "publish_checkpoint"])
def test_a_checkpoint_of_another_training_is_refused_before_anything_starts(pretrained, zero_2, option, tmp_path):
    with pytest.raises(InputError, match=r"it is of another training: its --lora-r was 0, here it is 4; give one of"):
        pretrained(lora_r=4, **{option: kept(zero_2)[0].reference})
    assert not list((tmp_path / "store").rglob("*.*"))


def test_a_checkpoint_that_is_not_there_is_refused_before_anything_starts(pretrained, tmp_path):
    with pytest.raises(InputError, match=r"--resume-from-checkpoint .*nothing"):
        pretrained(resume_from_checkpoint=str(tmp_path / "nothing"))
    assert not list((tmp_path / "store").rglob("*.*"))


@pytest.mark.slow
def test_a_start_that_names_a_checkpoint_goes_on_where_it_was_when_it_is_repeated(pretrained, tmp_path, caplog):
    """As a pod does that is started again with its command: not from the named checkpoint once more."""
    options = {"deepspeed": "none", "max_steps": 16, "save_steps": 2, "save_total_limit": 100}
    storage.delete(pretrained(**options).reference)
    named, *_, newer = kept(tmp_path / "store")
    options |= {"resume_from_checkpoint": named.reference}

    def went_on_from(store: Path) -> str:
        caplog.clear()
        with caplog.at_level("INFO"):
            storage.delete(pretrained(**options, store=str(store)).reference)
        return caplog.text.split("going on from ")[1].split(": ")[1].split("\n")[0]

    assert went_on_from(tmp_path / "other") == named.reference
    newest = kept(tmp_path / "other")[-1]
    assert went_on_from(tmp_path / "other") == newest.reference
    # where all that came of the named one is damaged (a step that was not kept the first time among them), it is itself
    for manifest in kept(tmp_path / "other"):
        weights_file = Path(manifest.root, "weights.safetensors")
        weights_file.write_bytes(bytes(weights_file.stat().st_size))
    assert went_on_from(tmp_path / "other") == named.reference
    # and newer ones that did not come of it are another way that the training went
    assert newer.facts["step"] > named.facts["step"]
    assert went_on_from(tmp_path / "store") == named.reference


# --- a damaged checkpoint ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_damaged_checkpoint_is_left_aside_for_the_one_before(pretrained, tmp_path, caplog):
    """One process: the course that follows is that of the first time, to the last bit."""
    options = {"deepspeed": "none", "max_steps": 30, "save_steps": 3}
    first = pretrained(**options)
    course, published = losses(str(tmp_path / "store")), weights(str(tmp_path / "store"))
    before, last = kept(tmp_path / "store")[-2:]
    newest = Path(last.root, "weights.safetensors")
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    storage.delete(first.reference)
    with caplog.at_level("INFO"):
        assert pretrained(**options).root == first.root
    assert "cannot be read and is left aside" in caplog.text
    assert f"going on from step {before.facts['step']}" in caplog.text
    assert (losses(str(tmp_path / "store")), weights(str(tmp_path / "store"))) == (course, published)


# --- a store that fails -----------------------------------------------------------------------------------------------


SLOW_DOWN = Fault("status", status=503, code="SlowDown")


def of_a_checkpoint(request: Request) -> bool:
    return request.method in ("PUT", "POST") and "/checkpoints/" in request.target


@pytest.mark.slow
def test_a_failed_upload_costs_a_checkpoint_and_not_the_training(train, s3_server, s3_store):
    """Every request of the checkpoint of step 2 fails, by 503 and by broken connections; the later ones arrive."""
    with FaultyProxy(s3_server.endpoint) as proxy:

        def fault(request: Request) -> Fault | None:
            if of_a_checkpoint(request) and "/step-00000002-" in request.target:
                return Fault("reset") if len(proxy.requests) % 2 else SLOW_DOWN
            return None

        proxy.fault = fault
        options = {**LONG, "max_steps": 100_000, "save_steps": 2}
        training = train(s3_store, environment={"ZHLLAMA_S3_ENDPOINT": proxy.endpoint}, **options)
        assert training.wait_for("could not write its part of the checkpoint of step 2, the training goes on")
        assert training.wait_for("is complete")
        training.process.terminate()
        assert training.end() == 143, training.said
    assert 2 not in checkpoints(s3_store)


@pytest.mark.slow
def test_it_stops_when_no_checkpoint_could_be_written_for_the_stated_time(train, s3_server, s3_store):
    with FaultyProxy(s3_server.endpoint) as proxy:
        proxy.fault = lambda request: SLOW_DOWN if of_a_checkpoint(request) else None
        options = {**LONG, "max_steps": 100_000, "save_steps": 1}
        training = train(
            s3_store,
            environment={"ZHLLAMA_S3_ENDPOINT": proxy.endpoint},
            **options,
            max_minutes_without_checkpoint=0.01,
        )
        assert training.end() == 1, training.said
    assert "no checkpoint could be written for 0.01 minutes (--max-minutes-without-checkpoint)" in training.said
