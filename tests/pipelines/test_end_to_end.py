"""The whole adaptation at a nano size, through SeaweedFS: every stage, killed on the way, and every starting point."""

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipelines.adapt_llama import compile_pipeline
from pipelines.configuration import configure
from pipelines.local.runner import RunResult, run_pipeline
from pipelines.local.s3_server import LocalS3
from zhllama import storage
from zhllama.artifacts.open import open_artifact

# one worker for all of it: what the first test makes (two minutes) the others use
pytestmark = [pytest.mark.slow, pytest.mark.timeout(480), pytest.mark.xdist_group("end to end")]

NANO = {
    "vocab_size": "600",
    "block_size": "256",
    "validation_fraction": "0.1",
    "embeddings_steps": "4",
    "lora_steps": "6",
    "sft_steps": "6",
    "embeddings_batch": "4",
    "lora_batch": "4",
    "sft_batch": "4",
    "backend": "local",
}


def wait_for(there: Callable[[], bool], process: subprocess.Popen[Any], said: Path, seconds: float = 240.0) -> None:
    """Waits for something that a running command does; its own words when it ends before."""
    deadline = time.monotonic() + seconds
    while not there():
        assert process.poll() is None, said.read_text(encoding="utf-8")
        assert time.monotonic() < deadline, f"it did not happen in time: {said.read_text(encoding='utf-8')}"
        time.sleep(0.1)


@dataclass(frozen=True)
class World:
    """A store in S3, the user's data in it, and where runs are."""

    root: Path
    arguments: Mapping[str, str]

    def command(self, name: str, **changed: str) -> list[str]:
        """The command that runs the pipeline in a work folder of its own."""
        words = [sys.executable, "-m", "pipelines", "run", "--size", "tiny"]
        words += ["--work", str(self.root / name)]
        return words + [word for pair in {**self.arguments, **changed}.items() for word in ("--set", "=".join(pair))]

    def run(self, name: str, *, until: str = "", **changed: str) -> RunResult:
        """A run in a work folder of its own; the store is shared, so that what was done is found again."""
        result = self.ends(name, until=until, **changed)
        assert result.exit_code == 0, result.error
        return result

    def ends(self, name: str, *, until: str = "", **changed: str) -> RunResult:
        told = configure("tiny", {**self.arguments, **changed}, write=False)
        package = self.root / name / "pipeline.yaml"
        compile_pipeline(told, package)
        return run_pipeline(package, told.arguments, self.root / name, until=until)


@pytest.fixture(scope="module")
def world(
    s3_server: LocalS3,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_meta: Path,
    chinese_text: list[str],
    english_text: list[str],
) -> Iterator[World]:
    root = tmp_path_factory.mktemp("end-to-end")
    store = f"s3://tests/end-to-end-{os.getpid()}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment().items():
            patch.setenv(name, value)
        patch.setenv("ZHLLAMA_CACHE", str(root / "cache"))
        storage.forget_client()
        data = {
            "text": {"reviews.txt": "\n".join(chinese_text)},
            "english": {"english.txt": "\n".join(english_text[:400])},
            "instructions": {"items.json": json.dumps(questions(chinese_text), ensure_ascii=False)},
            "prompts": {"prompts.txt": "你好吗？\n哪里可以看书？"},
        }
        for folder, files in data.items():
            for name, content in files.items():
                storage.write_bytes(f"{store}/uploads/{folder}/{name}", content.encode())
        for path in tiny_meta.iterdir():
            storage.copy(str(path), f"{store}/uploads/weights/{path.name}")
        arguments = {
            "store": f"{store}/artifacts",
            "weights": f"{store}/uploads/weights",
            "text": f"{store}/uploads/text",
            "english_text": f"{store}/uploads/english",
            "instructions": f"{store}/uploads/instructions",
            "prompts": f"{store}/uploads/prompts",
            **NANO,
        }
        yield World(root, arguments)
    storage.forget_client()


def questions(sentences: list[str]) -> list[dict[str, str]]:
    """Is it about food or not: items with two answers, about as often the one as the other."""
    chance = random.Random(7)
    food = ("蛋糕", "牛肉面", "豆腐", "绿茶", "咖啡", "蔬菜", "水果", "早餐")
    items = []
    for sentence in chance.sample(sentences, 300):
        answer = "是" if any(word in sentence for word in food) else "否"
        items.append({"instruction": "这句话谈到吃的或喝的吗？回答是或否。", "input": sentence, "output": answer})
    return items


@pytest.fixture(scope="module")
def adapted(world: World) -> RunResult:
    """The whole pipeline from Meta's weights, by the command; killed in stage 2, and run again."""
    command = world.command("adapted")
    log = world.root / "adapted" / "steps" / "train_lora" / "log.txt"
    said = world.root / "killed.txt"
    with open(said, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        wait_for(log.exists, process, said)
        process.kill()
        process.wait()
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400)
    assert ended.returncode == 0, ended.stdout
    return world.run("adapted")


def summary(result: RunResult, step: str) -> dict[str, Any]:
    return dict(result.steps[step]["facts"])


def test_every_stage_ran_and_the_next_run_starts_none_of_them(world, adapted):
    again = world.run("adapted")
    states = {name: step["state"] for name, step in again.steps.items()}
    ran = {name for name, state in states.items() if state == "unchanged"}
    assert ran >= {
        "fetch_weights", "convert_weights", "train_tokenizer", "extend_tokenizer", "prepare_text",
        "prepare_instructions", "train_embeddings", "train_lora", "merge_lora", "train_sft", "merge_sft", "merge_both",
        "evaluate", "generate",
    }  # fmt: skip
    assert set(states.values()) == {"unchanged", "done"}
    assert [name for name, state in states.items() if state == "done"] == ["cleanup_training"]


def test_merged_one_by_one_and_in_one_call_the_weights_are_equal(adapted):
    one_by_one, in_one_call = summary(adapted, "merge_sft"), summary(adapted, "merge_both")
    assert one_by_one["weights_digest"] == in_one_call["weights_digest"]


def test_the_report_compares_base_stages_and_the_adapted_model(adapted):
    report = json.loads(open_artifact(adapted.reference("evaluate")).read("report.json"))
    assert [model["label"] for model in report["models"]] == ["base", "stage 1", "stage 2", "adapted"]
    base, _, _, after = report["models"]
    assert after["tokens_per_character"]["zh"] < 0.7 * base["tokens_per_character"]["zh"]
    assert after["bits_per_byte"]["zh"] < base["bits_per_byte"]["zh"]
    assert len(report["trainings"]) == 3
    assert after["instructions"]["items"] > 10


def test_the_answers_are_there(adapted):
    samples = json.loads(open_artifact(adapted.reference("generate")).read("samples.json"))
    assert len(samples) == 2


def processes_with(text: bytes) -> list[str]:
    """The command lines of the processes that were started with this text in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if text in (path / "environ").read_bytes():
                found.append((path / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def test_a_stop_in_the_middle_of_a_training_leaves_no_process(world, adapted):
    command = world.command("stopped", embeddings_steps="5000", embeddings_arguments="--logging-steps 1")
    log = world.root / "stopped" / "steps" / "train_embeddings" / "log.txt"
    said = world.root / "stopped.txt"
    mark = b"STOPPED_RUN=" + os.urandom(8).hex().encode()
    with open(said, "wb") as output:
        around = {**os.environ, "STOPPED_RUN": mark.split(b"=")[1].decode()}
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=around)
        wait_for(lambda: log.exists() and b"step" in log.read_bytes(), process, said)
        assert len(processes_with(mark)) >= 4  # the runner, the launcher, the training and its two processes
        process.terminate()
        assert process.wait(200) == 143
    # the kernel takes a moment to end what was killed
    deadline = time.monotonic() + 60
    while processes_with(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_with(mark) == []


# --- other starting points --------------------------------------------------------------------------------------------


@pytest.mark.slowest
def test_from_a_ready_model(world, adapted):
    ready = world.run("model", until="extend_tokenizer", weights="", model=adapted.reference("convert_weights"))
    assert "fetch_weights" not in ready.steps
    assert ready.reference("extend_tokenizer") == adapted.reference("extend_tokenizer")


@pytest.mark.slowest
def test_from_a_ready_chinese_tokenizer(world, adapted):
    pieces = adapted.reference("train_tokenizer")
    ready = world.run("tokenizer", until="extend_tokenizer", chinese_tokenizer=pieces)
    assert "train_tokenizer" not in ready.steps
    assert ready.reference("extend_tokenizer") == adapted.reference("extend_tokenizer")


@pytest.mark.slowest
def test_from_a_ready_extended_model(world, adapted):
    extended = adapted.reference("extend_tokenizer")
    ready = world.run("extended", until="train_embeddings", weights="", extended_model=extended)
    assert ready.reference("train_embeddings") == adapted.reference("train_embeddings")


@pytest.mark.slowest
def test_published_adapters_are_merged_without_training(world, adapted):
    published = f"{adapted.reference('train_lora')},{adapted.reference('train_sft')}"
    merged = world.run("published", weights="", model=adapted.reference("train_embeddings"), adapters=published)
    assert summary(merged, "merge_published")["weights_digest"] == summary(adapted, "merge_sft")["weights_digest"]
    assert not {"train_embeddings", "train_lora", "train_sft"} & set(merged.steps)
    assert {merged.steps[name]["state"] for name in ("evaluate", "generate")} == {"done"}


@pytest.mark.slowest
def test_without_stage_1(world, adapted):
    without = world.run("no-stage-1", until="merge_lora", run_stage1="false")
    assert "train_embeddings" not in without.steps
    assert without.steps["train_lora"]["inputs"]["model"] == adapted.reference("extend_tokenizer")


@pytest.mark.slowest
def test_without_sft_and_without_instructions(world, adapted):
    without = world.run("no-sft", run_sft="false", instructions="")
    assert not {"train_sft", "merge_sft", "prepare_instructions"} & set(without.steps)
    assert without.steps["evaluate"]["inputs"]["model"] == adapted.reference("merge_lora")


# --- bad input, and the run after it ----------------------------------------------------------------------------------


def flipped(content: bytes) -> bytes:
    return content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]


@pytest.mark.parametrize(
    ("argument", "file", "damage", "step", "said"),
    [
        (
            "weights",
            "consolidated.01.pth",
            flipped,
            "fetch_weights",
            r"consolidated\.01\.pth: sha256 .* expected .*, .* found",
        ),
        ("text", "reviews.txt", lambda _: b"\n\n", "train_tokenizer", r"the text files are empty"),
        ("instructions", "items.json", lambda content: content[:-2], "prepare_instructions", r"items\.json: not JSON"),
    ],
    ids=["corrupted shard", "empty text", "invalid JSON"],
)
def test_bad_input_is_one_line_and_the_next_run_goes_on(world, adapted, argument, file, damage, step, said):
    good = world.arguments[argument]
    bad = f"{good}-bad"
    for item in storage.listing(good):
        storage.copy(f"{good}/{item.name}", f"{bad}/{item.name}")
    storage.write_bytes(f"{bad}/{file}", damage(storage.read_bytes(f"{good}/{file}")))
    changed = {"expect": f"{good}/sha256sums.txt"} if argument == "weights" else {}
    failed = world.ends(f"bad-{argument}", until=step, **changed, **{argument: bad})
    assert failed.exit_code == 2
    assert re.search(f"^{step}: .*{said}", failed.error), failed.error
    world.run(f"bad-{argument}", until=step, **changed, **{argument: good})
