"""The stage as a process: killed, terminated, interrupted. What was paid for is never paid for again."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from components.generate_instructions.generator import INSTRUCTIONS
from tests.components.generate_instructions.model_server import Do, ModelServer
from tests.components.generate_instructions.test_generator import agrees, card_of, run
from tests.soak import instructions


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [range(1), range(1, 2)], ids=["on one disk", "from machine to machine"])
def test_kill_9_anywhere_costs_at_most_what_is_in_flight(seeds: range, tmp_path: Path) -> None:
    counted = instructions.run(seeds, tmp_path)
    assert counted["seeds"] == 1
    assert counted["kills"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 143)], ids=["SIGTERM", "Ctrl-C"])
def test_a_run_that_is_told_to_stop_keeps_what_is_on_its_way(
    model: ModelServer, tmp_path: Path, signum: int, code: int
) -> None:
    """Three requests are out when the signal comes; they are answered after it."""
    told, children = threading.Event(), list[subprocess.Popen[str]]()

    def stop() -> None:
        if model.out >= 3:
            children[0].send_signal(signum)
            told.set()
        told.wait(60)

    model.do = lambda asked: Do(before=stop) if model.answers else None
    words = [sys.executable, "-m", "components.generate_instructions", "--store", str(tmp_path), "--items", "60"]
    words += ["--base-url", model.url, "--model", "writer", "--per-request", "5", "--answer-tokens", "2000"]
    children.append(
        subprocess.Popen([*words, "--concurrency", "3"], stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    )
    _, log = children[0].communicate(timeout=120)
    assert children[0].returncode == code
    assert log.strip().splitlines()[-1] == "cancelled"
    assert not list(tmp_path.rglob(INSTRUCTIONS))
    assert model.answers == len(model.asked)
    asked = model.answers
    model.do = lambda one: None
    manifest = run(model, tmp_path, items=60)
    assert agrees(model, manifest)
    assert len({one.text for one in model.asked}) == len(model.asked) > asked
    # what was open at the end of the first run would be charged, and never billed
    assert sum(card_of(manifest)["cost"]["at_most"].values()) == model.billed


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_second_signal_ends_it_at_once(model: ModelServer, tmp_path: Path, signum: int) -> None:
    model.do = lambda asked: Do(before=lambda: child.send_signal(signum), hang=True) if model.answers else None
    words = [sys.executable, "-m", "components.generate_instructions", "--store", str(tmp_path), "--items", "60"]
    words += ["--base-url", model.url, "--model", "writer", "--per-request", "5", "--answer-tokens", "2000"]
    words += ["--concurrency", "1"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=dict(os.environ)) as child:
        assert child.stderr is not None
        log = []
        for line in child.stderr:
            log.append(line)
            if "waiting for" in line:
                child.send_signal(signum)
    assert child.returncode == 143
    assert log[-1] == "cancelled\n"
    assert not any("Traceback" in line for line in log)


def test_a_kill_while_an_answer_is_written_to_the_journal_costs_that_answer(model: ModelServer, tmp_path: Path) -> None:
    """The journal ends in half a line; the answer in it is asked for again, and everything else is kept."""
    few = run(model, tmp_path, items=20)
    (journal,) = tmp_path.rglob("journal.jsonl")
    lines = journal.read_bytes().splitlines(keepends=True)
    answered = [index for index, line in enumerate(lines) if b'"event":"answered"' in line]
    journal.write_bytes(b"".join(lines[: answered[-1]]) + lines[answered[-1]][:100])
    before = [one.text for one in model.asked]
    manifest = run(model, tmp_path, items=40)
    after = [one.text for one in model.asked[len(before) :]]
    assert len(set(after) & set(before)) == 1
    cost = card_of(manifest)["cost"]
    assert sum(cost["billed"].values()) < model.billed <= sum(cost["at_most"].values())
    assert few.metrics["items"] == 20
