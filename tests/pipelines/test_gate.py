"""The gate in the compiled pipeline: what misses its requirement is not deployed, and the next run says so again."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.adapt_llama import compile_pipeline
from pipelines.configuration import configure
from pipelines.local.ir import read_package
from pipelines.local.plan import State
from pipelines.local.runner import RunResult, run_pipeline

Run = Callable[[str], RunResult]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: str, english_text: list[str]) -> Run:
    """Evaluates a ready model and deploys it, all that the pipeline can leave out left out."""
    root = tmp_path_factory.mktemp("gate")
    (root / "english.txt").write_text("\n".join(english_text[:40]), "utf-8")
    settings = {
        "store": str(root / "store"), "model": tiny_model, "tokenizer": "keep", "run_pretraining": "false",
        "run_sft": "false", "english_text": str(root / "english.txt"), "deploy": "kubernetes", "backend": "local",
    }  # fmt: skip

    def start(require: str) -> RunResult:
        told = configure("tiny", {**settings, "require": require}, write=False)
        package = root / "pipeline.yaml"
        compile_pipeline(told, package)
        return run_pipeline(package, told.arguments, root / "work", until="deploy")

    return start


@pytest.mark.slow
def test_a_missed_requirement_stops_the_deployment_and_does_so_again(run: Run) -> None:
    first = run("english_bits_per_byte<=0.1")
    assert first.exit_code == 2
    assert first.error.startswith("evaluate: --require english_bits_per_byte<=0.1: it is ")
    assert first.steps["evaluate"]["state"] == State.FAILED
    assert first.steps["deploy"]["state"] == State.NOT_RUN
    assert not Path(first.steps["deploy"]["log"]).exists()

    again = run("english_bits_per_byte<=0.1")
    assert (again.exit_code, again.error) == (2, first.error)
    assert not Path(again.steps["deploy"]["log"]).exists()
    # nothing is measured a second time
    assert "already done" in Path(again.steps["evaluate"]["log"]).read_text("utf-8")

    # what holds goes on to the deployment, which says here that there is no cluster or no key for it
    passed = run("english_bits_per_byte<=100")
    assert passed.steps["evaluate"]["state"] == State.DONE
    assert passed.steps["deploy"]["state"] == State.FAILED
    assert passed.error.startswith("deploy: ")
    assert "loading" not in Path(passed.steps["evaluate"]["log"]).read_text("utf-8")


def test_the_compiled_deployment_waits_for_the_evaluation_and_nothing_is_tried_again(tmp_path: Path) -> None:
    package = tmp_path / "pipeline.yaml"
    compile_pipeline(configure("7b", {"deploy": "kserve", "weights": "s3://bucket/w"}), package)
    text = package.read_text("utf-8")
    assert "retryPolicy" not in text
    tasks = {
        name: task
        for component in read_package(package).components.values()
        for name, task in getattr(component, "tasks", {}).items()
    }
    assert "evaluate" in tasks["deploy"].after
    assert "evaluate" not in tasks["generate"].after
