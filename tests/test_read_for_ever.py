"""What release 0.1 published stays readable, and what it left half done is gone on with.

`fixtures/store-0.1.tar.gz` (made by `fixtures/make_store.py`) is unpacked once; a test that writes has a copy.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.components.generate_instructions.model_server import ModelServer
from tests.stage_chain import CHAIN, RUNNING, WRITING, environment, moved, run, unpacked

pytestmark = pytest.mark.xdist_group("read for ever")


@dataclass(frozen=True)
class Release:
    """A place where release 0.1 has worked."""

    place: Path

    @property
    def store(self) -> Path:
        return self.place / "store"

    @property
    def made(self) -> dict[str, str]:
        """Name → the reference of what was made."""
        held = (self.place / "references.json").read_text()
        return dict(json.loads(held.replace("/release-0.1/", f"{self.place}/")))

    @property
    def checkpoint(self) -> str:
        (found,) = self.store.glob("checkpoints/pretrain/*/step-*/manifest.json")
        return str(found)

    def copied(self, place: Path) -> "Release":
        shutil.copytree(self.place, place)
        moved(place, str(self.place), str(place))
        return Release(place)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return Release(unpacked(tmp_path_factory.mktemp("release")))


@pytest.fixture
def work(release: Release, tmp_path: Path) -> Release:
    """A copy that a test may write to."""
    return release.copied(tmp_path / "release")


@pytest.fixture
def writer() -> Iterator[ModelServer]:
    with closing(ModelServer()) as server:
        yield server


def zhllama(place: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", *words], cwd=place, env=environment(place), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- read -------------------------------------------------------------------------------------------------------------


def test_ls_lists_every_artifact(release):
    listed = json.loads(zhllama(release.place, "ls", str(release.store), "--json"))
    assert {one["reference"] for one in listed} >= {release.made[name] for name in CHAIN}
    assert {one["kind"] for one in listed} >= {
        "meta-weights", "tokenizer", "hf-model", "packed-dataset", "adapter", "exported", "gguf", "samples", "report",
        "instructions",
    }  # fmt: skip


@pytest.mark.parametrize("name", [*CHAIN, "checkpoint"])
def test_verify_reads_every_block(name, release):
    reference = release.checkpoint if name == "checkpoint" else release.made[name]
    assert "every block" in zhllama(release.place, "verify", reference)


def test_verify_still_finds_a_flipped_byte(work):
    weights = Path(work.made["merged"]).parent / "model-00001.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(AssertionError, match="1 blocks are not as the manifest says"):
        zhllama(work.place, "verify", work.made["merged"])


def test_show_follows_a_model_to_the_weights(release):
    said = zhllama(release.place, "show", release.made["merged"])
    for stage in ("merge_adapters", "finetune", "pretrain", "extend_tokenizer", "train_tokenizer", "convert_weights",
                  "fetch_weights"):  # fmt: skip
        assert f"by {stage}" in said


def test_show_decodes_a_packed_dataset(release):
    assert "。" in zhllama(release.place, "show", release.made["text"], "--sample", "2")


# --- taken by a stage -------------------------------------------------------------------------------------------------

TAKEN = {
    "convert_weights takes weights": ("convert_weights", {"weights": "{weights}", "max_positions": "1024"}),
    "extend_tokenizer takes a model and a tokenizer": (
        "extend_tokenizer", {"model": "{model}", "chinese_tokenizer": "{tokenizer}", "pad_to_multiple_of": "8"},
    ),
    "prepare_dataset takes a tokenizer": ("prepare_dataset", {"tokenizer": "{tokenizer}", "text": "{uploads}/text"}),
    "prepare_dataset takes an adapter's, and written items": (
        "prepare_dataset",
        {"tokenizer": "{adapter}", "instructions": "{instructions}", "validation_fraction": "0"},
    ),
    "finetune takes a model, a dataset and an adapter": (
        "finetune",
        {"model": "{embeddings}", "dataset": "{items}", "adapter": "{adapter}", "max_steps": "1", "deepspeed": "none"},
    ),
    "merge_adapters takes a model and an adapter": (
        "merge_adapters", {"model": "{embeddings}", "adapters": "{adapter}", "prove": "true"},
    ),
    "export_model takes a merged model": ("export_model", {"model": "{merged}", "shards": "1"}),
    "generate takes a merged model": ("generate", {"model": "{merged}", "prompt": "好", "max_new_tokens": "2"}),
    "generate takes a model and an adapter": (
        "generate", {"model": "{embeddings}", "adapters": "{adapter}", "prompt": "好", "max_new_tokens": "2"},
    ),
    "evaluate takes models, datasets and a training": (
        "evaluate",
        {"model": "{merged}", "text": "{text}", "trainings": "{embeddings}", "max_prompts": "0", "samples": "0",
         "max_bytes": "1000"},
    ),
    "fetch_weights takes an exported model": ("fetch_weights", {"source": "{meta_folder}"}),
}  # fmt: skip


@pytest.mark.parametrize("claim", TAKEN)
def test_a_stage(claim, release, tmp_path):
    stage, options = TAKEN[claim]
    made = {**release.made, "meta_folder": str(Path(release.made["meta"]).parent)}
    manifest, _ = run(stage, options, tmp_path / "store", made)
    assert manifest["stage"] == stage


# --- gone on with -----------------------------------------------------------------------------------------------------


def test_a_training_goes_on_from_the_checkpoint_that_it_is_given(work):
    _, said = run("pretrain", {**RUNNING, "resume_from_checkpoint": work.checkpoint}, work.store, work.made)
    assert "going on from step 20" in said


def test_a_training_finds_its_checkpoint_by_its_options_alone(work):
    """Whatever a later release makes the key of: a training that was running when it came goes on."""
    _, said = run("pretrain", RUNNING, work.store, work.made)
    assert "going on from step 20" in said
    assert "step 120/120" in said


def test_another_training_does_not_take_that_checkpoint(work):
    _, said = run("pretrain", {**RUNNING, "seed": "43", "max_steps": "21"}, work.store, work.made)
    assert "going on from" not in said


def test_instructions_are_gone_on_with_and_nothing_is_paid_for_twice(work, writer):
    paid_for = json.loads((work.place / "asked.json").read_text())
    manifest, _ = run("generate_instructions", WRITING, work.store, {}, writer.url.removesuffix("/v1"))
    asked = [one.text for one in writer.asked]
    assert len(paid_for) == 2
    assert asked
    assert not set(asked) & set(paid_for)
    assert manifest["metrics"]["items"] == 20
