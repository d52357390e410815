"""The gate in the compiled pipeline: what misses its requirement is not deployed, and the next run says so again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.evaluate import evaluate as module
from components.evaluate.options import Evaluate
from pipelines.adapt_llama import compile_pipeline
from pipelines.configuration import configure
from pipelines.local.ir import read_package
from pipelines.local.plan import State
from pipelines.local.runner import RunResult, run_pipeline
from zhllama.stage.requirements import TEXT_FIGURES
from zhllama.stage.run import run_stage

Run = Callable[[str], RunResult]


def canned(*_: Any) -> module.Measured:
    figures = {name: {"zh": None, "en": 1.5} for name in TEXT_FIGURES}
    return module.Measured(
        {"pieces": 10, "parameters": 20, "instructions": None, "exams": [], "lm_eval": {}, **figures}, [], []
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Evaluates a ready model and deploys it; all that the pipeline can leave out is left out, and the model is
    measured before, by nobody: its figures are in the store."""
    root = tmp_path_factory.mktemp("gate")
    for name in ("model", "english"):
        (root / name).mkdir()
        (root / name / "one.txt").write_text(f"{name}\n", "utf-8")
    inputs = {"store": str(root / "store"), "model": str(root / "model")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "measure", canned)
        run_stage(Evaluate(**inputs, english=str(root / "english")), module.evaluate)
    settings = {
        **inputs, "english_text": str(root / "english"), "tokenizer": "keep", "run_pretraining": "false",
        "run_sft": "false", "deploy": "kubernetes", "backend": "local", "questions": "0",
    }  # fmt: skip
    package = root / "pipeline.yaml"
    compile_pipeline(configure("7b", settings, write=False), package)

    def start(require: str) -> RunResult:
        told = configure("7b", {**settings, "require": require}, write=False)
        return run_pipeline(package, told.arguments, root / "work", until="deploy")

    return start


def test_a_missed_requirement_stops_the_deployment_and_does_so_again(run: Run) -> None:
    first = run("english_bits_per_byte<=1.34")
    assert first.exit_code == 2
    assert first.error.startswith(
        "evaluate: --require english_bits_per_byte<=1.34: it is 1.5, 0.16 (11.9%) above 1.34; the report is "
    )
    assert first.steps["evaluate"]["state"] == State.FAILED
    assert first.steps["deploy"]["state"] == State.NOT_RUN
    assert not Path(first.steps["deploy"]["log"]).exists()

    again = run("english_bits_per_byte<=1.34")
    assert (again.exit_code, again.error, again.steps["deploy"]["state"]) == (2, first.error, State.NOT_RUN)
    assert "already done" in Path(again.steps["evaluate"]["log"]).read_text("utf-8")


def test_what_holds_goes_on_to_the_deployment(run: Run) -> None:
    passed = run("english_bits_per_byte<=1.6")
    assert passed.steps["evaluate"]["state"] == State.DONE
    # there is no cluster here, and no key to it
    assert passed.steps["deploy"]["state"] == State.FAILED
    assert passed.error.startswith("deploy: ")


def test_the_compiled_deployment_waits_for_the_evaluation_and_nothing_is_tried_again(tmp_path: Path) -> None:
    package = tmp_path / "pipeline.yaml"
    compile_pipeline(configure("7b", {"deploy": "kserve", "weights": "s3://bucket/w"}), package)
    assert "retryPolicy" not in package.read_text("utf-8")
    tasks = {name: task for one in read_package(package).components.values() for name, task in one.tasks.items()}
    assert "evaluate" in tasks["deploy"].after
    assert "evaluate" not in tasks["generate"].after
