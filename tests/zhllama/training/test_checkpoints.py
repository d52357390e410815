"""Checkpoints in a store: complete or not there, the newest first, of this training, and for as many processes."""

import dataclasses
import logging
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from zhllama import storage
from zhllama.artifacts.manifest import Input
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.training.checkpointing import CheckpointManager
from zhllama.training.checkpoints import (
    KIND,
    Run,
    clean,
    commit,
    complete,
    of_earlier_release,
    open_checkpoint,
    own,
    require_same_run,
    require_world,
    write_part,
)

FIRST, SECOND = "00000001", "00000002"
"""Two starts of a training."""


@pytest.fixture
def run(store: str) -> Run:
    return Run(store, "pretrain", "k" * 32, {"lora_r": 8, "seed": 1}, {"model": Input("s3://b/model", "a" * 64)})


def part(run: Run, step: int, start: str, rank: int):
    """What one rank writes."""
    out = run.writer(step, start)
    out.facts |= {"step": step, "world": 2, "zero_stage": 0, "global_batch": 8}
    out.add_bytes(f"rank-{rank:05d}.safetensors", b"tensors" * (step + rank))
    write_part(out, rank)
    return out


def checkpoint(run: Run, step: int, start: str = FIRST):
    part(run, step, start, 1)
    return commit(part(run, step, start, 0), 2, threading.Event())


def steps(run: Run) -> list[int]:
    return [manifest.facts["step"] for manifest in complete(run.folder)]


def folders(run: Run) -> set[str]:
    return {item.name.split("/")[0] for item in storage.listing(run.folder)}


def test_a_checkpoint_is_one_artifact_of_every_ranks_files(run):
    manifest = checkpoint(run, 7)
    assert manifest.root == f"{run.folder}/step-00000007-{FIRST}"
    found = open_checkpoint(manifest.reference, "--resume-from-checkpoint")
    assert found.manifest.kind == KIND
    assert found.names == ["rank-00000.safetensors", "rank-00001.safetensors"]
    assert found.read("rank-00001.safetensors") == b"tensors" * 8


def test_it_waits_for_the_parts_of_the_others(run):
    done: list = []
    committer = threading.Thread(
        target=lambda: done.append(commit(part(run, 3, FIRST, 0), 2, threading.Event())), daemon=True
    )
    committer.start()
    committer.join(0.3)
    assert committer.is_alive()
    assert steps(run) == []
    part(run, 3, FIRST, 1)
    committer.join(60)
    assert steps(run) == [3]


def test_one_that_is_given_up_stays_incomplete(run):
    given_up = threading.Event()
    given_up.set()
    assert commit(part(run, 3, FIRST, 0), 2, given_up) is None
    assert steps(run) == []


def test_the_part_of_an_earlier_start_is_not_taken_for_this_ones(run):
    part(run, 3, FIRST, 1)
    given_up = threading.Event()
    threading.Timer(0.5, given_up.set).start()
    assert commit(part(run, 3, SECOND, 0), 2, given_up) is None


def test_the_newest_complete_one_comes_first(run):
    for step in (5, 100, 20):
        checkpoint(run, step)
    part(run, 200, FIRST, 0)
    assert steps(run) == [100, 20, 5]


def test_one_that_lost_a_file_is_left_aside(run, caplog):
    checkpoint(run, 5)
    newest = checkpoint(run, 10)
    storage.delete(f"{newest.root}/rank-00001.safetensors")
    with caplog.at_level(logging.WARNING):
        assert steps(run) == [5]
    assert "files of this checkpoint are missing" in caplog.text


def test_a_damaged_manifest_is_left_aside(run, caplog):
    checkpoint(run, 5)
    newest = checkpoint(run, 10)
    storage.write_bytes(newest.reference, storage.read_bytes(newest.reference).replace(b'"step": 10', b'"step": 99'))
    with caplog.at_level(logging.WARNING):
        assert steps(run) == [5]
    assert "damaged" in caplog.text


def test_one_that_was_copied_from_another_training_is_left_aside(run, caplog):
    other = dataclasses.replace(run, key="o" * 32, configuration={"lora_r": 8, "seed": 2})
    manifest = checkpoint(other, 10)
    for item in storage.listing(manifest.root):
        storage.copy(f"{manifest.root}/{item.name}", f"{run.folder}/step-00000010-{FIRST}/{item.name}")
    with caplog.at_level(logging.WARNING):
        assert list(own(run)) == []
    assert "is of another training (seed) and is left aside" in caplog.text


def test_those_of_a_store_that_was_moved_are_gone_on_with(run):
    checkpoint(run, 10)
    moved = dataclasses.replace(run, store=f"{run.store}-moved")
    for item in storage.listing(run.folder):
        storage.copy(f"{run.folder}/{item.name}", f"{moved.folder}/{item.name}")
    (found,) = own(moved)
    assert found.reference == f"{moved.folder}/step-00000010-{FIRST}/manifest.json"
    require_same_run(found, moved, "--resume-from-checkpoint")


def test_old_and_incomplete_ones_are_cleaned_away(run):
    for step in (1, 2, 3, 4):
        checkpoint(run, step)
    part(run, 5, FIRST, 0)
    clean(run.folder, keep=2, start=SECOND)
    assert steps(run) == [4, 3]
    assert folders(run) == {f"step-00000004-{FIRST}", f"step-00000003-{FIRST}"}


def test_what_this_start_is_writing_is_not_cleaned_away(run):
    checkpoint(run, 4)
    part(run, 5, SECOND, 0)
    clean(run.folder, keep=2, start=SECOND)
    assert folders(run) == {f"step-00000004-{FIRST}", f"step-00000005-{SECOND}"}


def test_files_of_others_are_not_touched(run):
    checkpoint(run, 4)
    storage.write_bytes(f"{run.folder}/notes/readme.txt", b"mine")
    clean(run.folder, keep=1, start=SECOND)
    assert storage.exists(f"{run.folder}/notes/readme.txt")


# --- what it is good for ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"stage": "finetune"}, "a checkpoint of pretrain; this is finetune"),
        ({"inputs": {"model": Input("m", "b" * 64)}}, r"its --model was s3://b/model \(aaaaaaaa\)"),
        ({"inputs": {}}, "its --model was s3://b/model"),
        ({"configuration": {"lora_r": 16, "seed": 1}}, "its --lora-r was 8, here it is 16"),
    ],
    ids=["stage", "input", "input that is gone", "option"],
)
def test_a_checkpoint_of_another_training_is_refused(run, changed, said):
    manifest = checkpoint(run, 4)
    with pytest.raises(InputError, match=f"--resume-from-checkpoint .*{said}"):
        require_same_run(manifest, dataclasses.replace(run, **changed), "--resume-from-checkpoint")


def test_another_release_or_split_of_the_batch_may_go_on(run, caplog):
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    with caplog.at_level(logging.WARNING):
        other = dataclasses.replace(run, key="o" * 32, configuration={**run.configuration, **split})
        require_same_run(checkpoint(run, 4), other, "--resume-from-checkpoint")
    assert "another release" in caplog.text


def test_one_of_a_release_that_lacked_an_option_may_go_on_with_its_default(run):
    other = dataclasses.replace(run, configuration=dict(run.configuration, label=0.0), defaults={"label": 0.0})
    manifest = checkpoint(run, 4)
    require_same_run(manifest, other, "--resume-from-checkpoint")
    set_otherwise = dataclasses.replace(other, configuration=dict(run.configuration, label=0.5))
    with pytest.raises(InputError, match=r"its --label was 0\.0, here it is 0\.5"):
        require_same_run(manifest, set_otherwise, "--resume-from-checkpoint")


@pytest.mark.parametrize("what", ["hf-model", "files"])
def test_what_is_no_checkpoint_is_refused(run, what):
    from zhllama.artifacts.writer import ArtifactWriter

    out = ArtifactWriter(run.store, "stage", "key")
    out.add_bytes("x", b"x")
    reference = out.publish("hf-model").reference if what == "hf-model" else out.root
    with pytest.raises(InputError, match=r"checkpoint is needed|no complete checkpoint"):
        open_checkpoint(reference, "--resume-from-checkpoint")


@pytest.mark.parametrize(
    ("zero", "world", "asked", "said"),
    [
        (2, 2, (4, 2), "holds the ZeRO-2 optimizer of 2 processes, this training has 4; start it with 2 processes, or"),
        (2, 2, (2, 0), "of ZeRO stage 2, this training of 0; give the same --deepspeed"),
        (0, 2, (4, 0), ""),
        (2, 2, (2, 2), ""),
    ],
    ids=["ZeRO for more processes", "another ZeRO stage", "plain for more processes", "the same"],
)
def test_the_optimizer_has_to_fit_the_processes(run, zero, world, asked, said):
    out = part(run, 4, FIRST, 0)
    out.facts |= {"zero_stage": zero, "world": world}
    manifest = open_artifact(out.publish(KIND).reference).manifest
    if not said:
        require_world(manifest, *asked)
        return
    with pytest.raises(InputError, match=said):
        require_world(manifest, *asked)


def manager(run: Run, **named: str) -> CheckpointManager:
    options: Any = SimpleNamespace(
        deepspeed="none", per_device_train_batch_size=8, gradient_accumulation_steps=1, save_total_limit=3,
        **{"resume_from_checkpoint": "", **named},
    )  # fmt: skip
    return CheckpointManager(options, run, SimpleNamespace(process_index=0, world_size=1))  # type: ignore[arg-type]


@pytest.mark.parametrize("lacking", ["world", "zero_stage", "global_batch"])
def test_one_whose_manifest_lacks_a_fact_is_left_aside_unless_it_is_named(run, lacking, caplog):
    older = checkpoint(run, 3)
    out = part(run, 4, FIRST, 0)
    del out.facts[lacking]
    newer = out.publish(KIND).reference
    assert list(manager(run)._candidates()) == [older.reference]
    assert f"{newer} cannot be read and is left aside: its manifest has no '{lacking}'" in caplog.text
    with pytest.raises(InputError, match=f"its manifest has no '{lacking}'; give another"):
        list(manager(run, resume_from_checkpoint=newer)._candidates())


# --- under another key ------------------------------------------------------------------------------------------------


def found(run: Run, **changes) -> list[int]:
    return [one.facts["step"] for one in of_earlier_release(dataclasses.replace(run, key="n" * 32, **changes))]


def test_an_earlier_releases_checkpoints_of_the_same_training_are_found_newest_first(run):
    for step in (3, 7):
        checkpoint(run, step)
    assert found(run) == [7, 3]
    # an option that the earlier release lacked, at its default
    assert found(run, configuration=dict(run.configuration, label=0.0), defaults={"label": 0.0}) == [7, 3]


@pytest.mark.parametrize(
    "changes",
    [
        {"configuration": {"lora_r": 8, "seed": 2}},
        {"configuration": {"lora_r": 8, "seed": 1, "per_device_train_batch_size": 4}},
        {"configuration": {"lora_r": 8, "seed": 1, "label": 0.5}, "defaults": {"label": 0.0}},
        {"inputs": {"model": Input("s3://b/model", "b" * 64)}},
        {"stage": "finetune"},
        {"steps_version": 2},
    ],
    ids=["option", "batch", "new option that is set", "input", "stage", "steps version"],
)
def test_another_trainings_are_not(run, changes):
    checkpoint(run, 7)
    assert found(run, **changes) == []


def test_those_of_a_training_that_is_over_are_not(run):
    checkpoint(run, 7)
    out = ArtifactWriter(run.store, run.stage, run.key)
    out.add_bytes("weights", b"trained")
    out.publish("adapter")
    assert found(run) == []
