"""The loop against a real server: enough items, none twice, patience with what passes and none with what does not."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from components.generate_instructions import generator
from components.generate_instructions.generator import GenerateInstructions, generate_instructions
from components.generate_instructions.request import load_catalogue, request
from components.shared.artifact import Manifest, open_artifact
from components.shared.cli import parse, run_stage
from components.shared.errors import InputError, StorageFault
from components.shared.instructions import read_instructions


def item(number: int) -> dict[str, str]:
    return {"instruction": f"第{number}题", "input": "", "output": f"第{number}答"}


def said(*numbers: int) -> str:
    return json.dumps([item(number) for number in numbers], ensure_ascii=False)


def run(model: Any, store: Path | str, **more: Any) -> Manifest:
    given = {"items": 4, "base_url": model.url, "model": "writer", **more}
    return run_stage(GenerateInstructions(store=str(store), **given), generate_instructions)


def items_of(manifest: Manifest) -> list[dict[str, str]]:
    return list(read_instructions(open_artifact(manifest.reference)))


def test_it_asks_until_there_are_enough_and_keeps_nothing_twice(model: Any, store: str) -> None:
    model.script = [said(1, 2, 2), said(2, 1, 3), said(3, 4, 5)]
    manifest = run(model, store)
    assert manifest.kind == "instructions"
    assert items_of(manifest) == [item(1), item(2), item(3), item(4)]
    assert manifest.metrics == {"items": 4, "requests": 3, "duplicates": 4, "malformed": 0}
    assert len(model.asked) == 3


def test_what_was_generated_is_not_paid_for_again(model: Any, tmp_path: Path) -> None:
    model.script = [said(1, 2, 3, 4)]
    first = run(model, tmp_path)
    assert run(model, tmp_path).digest == first.digest
    assert len(model.asked) == 1


def test_the_request_names_count_topics_and_types(model: Any, tmp_path: Path, key: str) -> None:
    model.script = [said(1, 2, 3, 4)]
    run(model, tmp_path, per_request=7)
    (body,) = model.asked
    text = body["messages"][0]["content"]
    catalogue = load_catalogue()
    assert body["model"] == "writer"
    assert "请编写 7 条" in text
    assert sum(topic in text for topic in catalogue.topics) >= 10
    assert sum(name in text for name in catalogue.task_types) == 10
    assert model.keys == [f"Bearer {key}"]


def test_seeds_are_shown_and_not_given_back(model: Any, tmp_path: Path) -> None:
    (tmp_path / "seeds.json").write_text(said(1, 2))
    model.script = [said(1, 2, 3), said(4, 5, 6)]
    manifest = run(model, tmp_path / "store", seeds=str(tmp_path / "seeds.json"))
    assert "第1题" in model.asked[0]["messages"][0]["content"]
    assert [found["instruction"] for found in items_of(manifest)] == ["第3题", "第4题", "第5题", "第6题"]


def test_requests_differ_and_the_same_seed_draws_the_same() -> None:
    catalogue = load_catalogue()
    drawn = [request(catalogue, 20, [], random.Random(seed))[0]["content"] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_catalogue_is_as_broad_as_the_recipes() -> None:
    catalogue = load_catalogue()
    assert len(set(catalogue.topics)) >= 82
    assert len(set(catalogue.task_types)) >= 14


# --- what passes, and what does not -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", [(429, {"Retry-After": "0"}), (500, {}), (503, {"Retry-After": "0.01"}), "drop"], ids=str
)
def test_what_passes_is_tried_again(model: Any, tmp_path: Path, fault: Any) -> None:
    model.script = [fault, fault, said(1, 2, 3, 4)]
    assert len(items_of(run(model, tmp_path))) == 4
    assert len(model.asked) == 3


def test_the_servers_wait_is_kept(monkeypatch: pytest.MonkeyPatch, model: Any, tmp_path: Path) -> None:
    from tenacity import nap

    slept: list[float] = []
    monkeypatch.setattr(nap.time, "sleep", slept.append)
    model.script = [(429, {"Retry-After": "7"}), (429, {"Retry-After": "999"}), said(1, 2, 3, 4)]
    run(model, tmp_path)
    assert [seconds for seconds in slept if seconds >= 1] == [7, 60]


def test_a_server_that_keeps_failing_is_a_fault(monkeypatch: pytest.MonkeyPatch, model: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(generator, "LONGEST_WAIT", 0.01)
    model.script = [(500, {})]
    with pytest.raises(StorageFault, match="failed 6 times"):
        run(model, tmp_path)
    assert len(model.asked) == 6
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ((401, {}), r"refuses the key \(401\); set OPENAI_API_KEY"),
        ((403, {}), r"refuses the key \(403\)"),
        ((404, {}), r"refuses the request \(404: .*check --model and --base-url"),
        ((400, {}), r"refuses the request \(400"),
        (b"<html>a page</html>", "does not answer as a chat completions API"),
    ],
    ids=["401", "403", "404", "400", "a web page"],
)
def test_what_no_waiting_mends_ends_at_once(model: Any, tmp_path: Path, entry: Any, line: str) -> None:
    model.script = [entry]
    with pytest.raises(InputError, match=line):
        run(model, tmp_path)
    assert len(model.asked) == 1


@pytest.mark.parametrize("rubbish", ["抱歉，我不能。", "", '[{"instruction": "x"}]'])
def test_a_model_that_gives_rubbish_ends_with_a_sample_of_it(model: Any, tmp_path: Path, rubbish: str) -> None:
    model.script = [rubbish]
    with pytest.raises(InputError, match="gave no usable item in 3 requests; its last answer begins") as caught:
        run(model, tmp_path, fruitless=3)
    assert repr(rubbish)[:20] in str(caught.value)
    assert len(model.asked) == 3


def test_a_model_that_runs_dry_ends_with_what_there_is(model: Any, tmp_path: Path) -> None:
    model.script = [said(1), said(2), said(2)]
    manifest = run(model, tmp_path, fruitless=2)
    assert items_of(manifest) == [item(1), item(2)]
    assert len(model.asked) == 4
    assert manifest.facts["summary"] == "only 2 of 4 items"


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--base-url", "localhost:8000"], "--base-url localhost:8000 is no address"),
        (["--base-url", "http://user:pass@host/v1"], "put the key into OPENAI_API_KEY"),
        (["--items", "0"], "--items is 0"),
        (["--per-request", "500"], "--per-request is 500"),
        (["--api-key", "sk-1"], "there is no option --api-key"),
    ],
)
def test_wrong_options_are_refused(more: list[str], line: str) -> None:
    given = ["--store", "s", "--items", "4", "--base-url", "http://host/v1", "--model", "m"]
    with pytest.raises(InputError, match=line):
        parse(GenerateInstructions, [*given, *more])


def test_the_command_ends_with_2_and_no_key_in_its_log(model: Any, tmp_path: Path, key: str) -> None:
    model.script = [(401, {})]
    command = [sys.executable, "-m", "components.generate_instructions", "--store", str(tmp_path), "--items", "4"]
    command += ["--base-url", model.url, "--model", "writer", "--seeds", ""]
    environment = {**os.environ, "ZHLLAMA_LOG": "DEBUG"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: generate_instructions: http://127.0.0.1")
    assert key not in done.stderr + done.stdout
