"""`zhllama plan`: what it prints, for people and for programs, and how it ends."""

import json
import os
import subprocess
import sys

import pytest


def zhllama(*words: str, columns: int = 80) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "pipelines", "plan", *words],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": str(columns)},
    )


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_shows_the_three_trainings_side_by_side_within_the_terminal(columns):
    ended = zhllama("--size", "7b", "--gpu", "h100-80gb", columns=columns)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert max(map(len, lines)) <= columns
    assert [line.split()[:3] for line in lines if line.split()[:1] == ["embeddings"]] == [["embeddings", "lora", "sft"]]
    shown = {line[:26].strip() for line in lines}
    assert {"weights", "needed", "tokens a step", "time", "disk", "memory", "checkpoints"} <= shown
    assert "assumed" in ended.stdout


def test_what_cannot_fit_is_one_line_and_exit_2_after_the_table():
    ended = zhllama("--size", "65b", "--gpu", "h100-80gb", "--stage", "lora", "--nodes", "1")
    assert ended.returncode == 2
    assert "does not fit" in ended.stdout
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("error: --gpu h100-80gb has 85.5 GB, and needed are: lora 14")
    assert "--arguments '--deepspeed zero3'" in ended.stderr


def test_json_has_every_figure():
    ended = zhllama("--size", "13b", "--gpu", "a100-40gb", "--json")
    assert ended.returncode == 0, ended.stderr
    value = json.loads(ended.stdout)
    assert value["size"] == "13b"
    assert [one["stage"] for one in value["plans"]] == ["embeddings", "lora", "sft"]
    lora = value["plans"][1]
    assert lora["fits"] is True
    assert lora["memory"]["needed"] > sum(lora["memory"]["tensors"].values())
    assert lora["tokens_per_step"] == 1024 * 512
    assert "a100-40gb" in lora["fits_on"]
    assert lora["warnings"] == []


def test_json_of_what_does_not_fit_says_what_would():
    ended = zhllama("--size", "65b", "--gpu", "a100-80gb", "--stage", "sft", "--json")
    assert ended.returncode == 2
    (sft,) = json.loads(ended.stdout)["plans"]
    assert sft["fits"] is False
    assert any("zero3" in remedy for remedy in sft["would_fit_with"])


def test_a_size_without_gpus_is_planned_on_its_processors_and_fits_its_nodes():
    ended = zhllama("--size", "tiny")
    assert ended.returncode == 0, ended.stderr
    assert "warning" not in ended.stdout
    assert "2 processes, no GPU" in ended.stdout


@pytest.mark.slow
def test_a_server_that_has_no_room_says_for_how_many_requests_there_is():
    ended = zhllama("--size", "13b", "--gpu", "a100-40gb", "--stage", "serve")
    assert ended.returncode == 2
    assert "--concurrency 6" in ended.stderr
    assert zhllama("--size", "13b", "--gpu", "a100-40gb", "--stage", "serve", "--concurrency", "6").returncode == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--size", "7b"], "--gpu: name the GPUs"),
        (["--size", "7b", "--gpu", "h100"], "--gpu h100: not known"),
        (["--size", "7b", "--gpu", "h100-80gb", "--stage", "loras"], "--stage loras: there is no such stage"),
        (["--size", "7b", "--gpu", "h100-80gb", "--arguments", "--lora-rr 8"], "--lora-rr"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(words, said):
    ended = zhllama(*words)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_planning_loads_nothing_heavy():
    program = (
        "import sys; from pipelines.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'kfp', 'deepspeed'} & set(sys.modules)))"
    )
    words = ["plan", "--size", "7b", "--gpu", "h100-80gb", "--json"]
    ended = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=120)
    assert ended.stdout.splitlines()[-1] == "[]", ended.stderr
