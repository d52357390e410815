"""The stage with requirements: the report is there in any case, the command fails, and again, without measuring."""

import json
from pathlib import Path
from typing import Any

import pytest

from components.evaluate import evaluate as module
from components.evaluate.evaluate import evaluate
from components.evaluate.options import Evaluate
from zhllama.artifacts.open import open_artifact
from zhllama.errors import InputError
from zhllama.stage.options import configuration_of
from zhllama.stage.run import run_stage

NEVER, ALWAYS = "english_bits_per_byte<=0.5*base", "english_bits_per_byte<=2*base,accuracy?>0.99"


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, held_out: Path, tiny_model: str, judge: Path) -> dict[str, Any]:
    return {
        "model": str(judge), "baseline": tiny_model, "labels": "start,judge", "english": str(held_out / "en"),
        "max_bytes": 1000, "samples": 0, "max_prompts": 1, "questions": 2,
        "store": str(tmp_path_factory.mktemp("gated")),
    }  # fmt: skip


@pytest.fixture(scope="module")
def refused(given: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a run said whose requirement does not hold, and the folder with its outputs."""
    folder = tmp_path_factory.mktemp("outputs")
    places = {name: str(folder / name) for name in ("output", "report", "reference")}
    with pytest.raises(InputError) as error:
        run_stage(Evaluate(**given, **places, require=NEVER), evaluate)
    return str(error.value), folder


@pytest.fixture
def nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_model", lambda *_, **__: pytest.fail("a model is loaded"))


def report_of(reference: str) -> dict[str, Any]:
    return dict(json.loads(open_artifact(reference).read("report.json")))


def test_the_line_says_the_figure_the_gap_and_where_the_report_is(refused: tuple[str, Path]) -> None:
    said, _ = refused
    assert said.startswith(f"--require {NEVER}: it is ")
    assert "above" in said
    assert "× " in said
    page = said.rpartition("the report is ")[2]
    assert Path(page).read_text("utf-8").startswith("<!doctype html>")


def test_the_report_is_published_with_its_verdict_and_no_reference_is_handed_on(refused: tuple[str, Path]) -> None:
    folder = refused[1]
    report = report_of(str(folder / "output"))
    (verdict,) = report["requirements"]
    value, base = (model["bits_per_byte"]["en"] for model in reversed(report["models"]))
    assert (verdict["requirement"], verdict["figure"], verdict["holds"]) == (NEVER, "bits_per_byte_en", False)
    assert (verdict["value"], verdict["bound"], verdict["label"]) == (value, 0.5 * base, "start")
    page = (folder / "report").read_text("utf-8")
    assert "<h2>Requirements</h2>" in page
    assert "the run ends here" in page
    assert not (folder / "reference").exists()


def test_a_second_run_fails_again_from_what_is_published(refused, given, nothing_is_measured) -> None:
    with pytest.raises(InputError) as error:
        run_stage(Evaluate(**given, require=NEVER), evaluate)
    assert str(error.value) == refused[0]


def test_other_requirements_are_judged_by_the_figures_that_there_are(refused, given, nothing_is_measured) -> None:
    manifest = run_stage(Evaluate(**given, require=ALWAYS), evaluate)
    assert [one["holds"] for one in report_of(manifest.reference)["requirements"]] == [True, None]
    assert manifest.facts["summary"].endswith("1 of 1 requirements hold")
    # and without one it is the evaluation that it always was
    plain = run_stage(Evaluate(**given), evaluate)
    assert "requirements" not in report_of(plain.reference)


def test_a_figure_that_no_run_can_have_is_refused_before_a_model_is_loaded(given, nothing_is_measured) -> None:
    for require, said in (("accuracy>0.5", "give --instructions"), ("facts_em>0", "did you mean facts_en")):
        with pytest.raises(InputError, match=said):
            Evaluate(**given, require=require)


def test_an_exam_that_is_not_asked_is_refused_before_a_model_is_loaded(given, tmp_path, nothing_is_measured) -> None:
    (tmp_path / "law" / "val").mkdir(parents=True)
    (tmp_path / "law" / "val" / "law.csv").write_text("question,A,B,answer\n问,甲,乙,B\n", "utf-8")
    config = Evaluate(**given, exams=str(tmp_path / "law"), shots="0", require="lore_0_shots>=0.5")
    with pytest.raises(InputError, match=r"no figure lore_0_shots \(did you mean law_0_shots\?\)"):
        run_stage(config, evaluate)


def test_items_without_choices_have_no_accuracy_and_that_is_known_before(given, tmp_path, nothing_is_measured) -> None:
    items = [{"instruction": f"写{n}", "input": "", "output": f"答{n}"} for n in range(3)]
    (tmp_path / "items.json").write_text(json.dumps(items))
    config = Evaluate(**given, instructions=str(tmp_path), require="accuracy>=0.5")
    with pytest.raises(InputError, match="accuracy is not measured here; give --instructions that have few answers"):
        run_stage(config, evaluate)


def test_questions_are_asked_of_every_model_and_compared_with_the_first(refused, given) -> None:
    report = report_of(str(refused[1] / "output"))
    assert [one["language"] for one in report["questions"]] == ["zh", "zh", "en", "en"]
    assert all(set(one["answers"]) == {"start", "judge"} for one in report["questions"])
    start, judge = report["models"]
    for language in ("zh", "en"):
        figures = judge["facts"][language]
        right = [one["right"] for one in report["questions"] if one["language"] == language]
        assert figures["items"] == 2
        assert figures["right"] == sum("judge" in labels for labels in right)
        assert figures["known"] == start["facts"][language]["right"] == sum("start" in labels for labels in right)
        assert start["facts"][language]["known"] is None
    assert 0 <= judge["repetition"] < 1


def test_without_them_options_and_keys_are_those_of_before(given) -> None:
    plain = configuration_of(Evaluate(**{**given, "questions": 0}))
    assert not {"questions", "require"} & plain.keys()
    assert {"questions", "require"} <= configuration_of(Evaluate(**given, require=ALWAYS)).keys()


def test_more_questions_than_there_are_ask_all_and_fewer_than_none_are_refused(given) -> None:
    with pytest.raises(InputError, match="--questions is -1"):
        Evaluate(**{**given, "questions": -1})
