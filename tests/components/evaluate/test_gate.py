"""The stage with requirements: the report is there in any case, the command fails, and again, without measuring."""

import json
from pathlib import Path
from typing import Any

import pytest

from components.evaluate import evaluate as module
from components.evaluate.evaluate import evaluate
from components.evaluate.held_out import HeldOut
from components.evaluate.options import Evaluate
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.stage.options import configuration_of
from zhllama.stage.requirements import TEXT_FIGURES
from zhllama.stage.run import run_stage

NEVER, ALWAYS = "english_bits_per_byte<=0.5*base", "english_bits_per_byte<=2*base,accuracy?>0.99"
BITS = {"start": 1.30, "judge": 1.42}


def canned(config: Evaluate, held_out: HeldOut, model: Artifact, label: str, option: str) -> module.Measured:
    """What a model might say: the first one knows everything, the other every second fact."""
    figures = {
        "pieces": 10, "parameters": 20, "instructions": None, "exams": [], "lm_eval": {},
        **{name: {"zh": None, "en": BITS[label]} for name in TEXT_FIGURES},
    }  # fmt: skip
    said = [fact.answer if label == "start" or at % 2 else "?" for at, fact in enumerate(held_out.facts)]
    return module.Measured(figures, ["over and over and over"] * len(held_out.prompts), said)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, held_out: Path) -> dict[str, Any]:
    """An evaluation of two folders, which nobody loads."""
    root = tmp_path_factory.mktemp("gated")
    for name in BITS:
        (root / name).mkdir()
        (root / name / "model").write_text(name)
    return {
        "model": str(root / "judge"), "baseline": str(root / "start"), "labels": "start,judge",
        "english": str(held_out / "en"), "max_bytes": 1000, "samples": 0, "max_prompts": 1, "questions": 2,
        "store": str(root / "store"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def refused(given: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a run said whose requirement does not hold, and the folder with its outputs."""
    folder = tmp_path_factory.mktemp("outputs")
    places = {name: str(folder / name) for name in ("output", "report", "reference")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "measure", canned)
        with pytest.raises(InputError) as error:
            run_stage(Evaluate(**given, **places, require=NEVER), evaluate)
    return str(error.value), folder


@pytest.fixture
def nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("a model is measured"))


def report_of(reference: str) -> dict[str, Any]:
    return dict(json.loads(open_artifact(reference).read("report.json")))


def published(said: str) -> dict[str, Any]:
    """The report beside the page that the line names."""
    return report_of(str(Path(said.rpartition("the report is ")[2]).with_name("manifest.json")))


def test_the_line_says_the_figure_the_gap_and_where_the_report_is(refused: tuple[str, Path]) -> None:
    said, _ = refused
    assert said.startswith(f"--require {NEVER}: it is ")
    assert "above" in said
    assert "× " in said
    page = said.rpartition("the report is ")[2]
    assert Path(page).read_text("utf-8").startswith("<!doctype html>")


def test_the_report_is_published_with_its_verdict_and_no_reference_is_handed_on(refused: tuple[str, Path]) -> None:
    said, folder = refused
    report = published(said)
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


def test_a_figure_that_no_run_can_have_is_refused_before_a_model_is_loaded(given) -> None:
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


def test_what_the_first_model_knows_is_what_the_other_may_keep(refused) -> None:
    report = published(refused[0])
    assert [one["language"] for one in report["questions"]] == ["zh", "zh", "en", "en"]
    assert [one["right"] for one in report["questions"]] == [["start"], ["start", "judge"]] * 2
    start, judge = report["models"]
    for language in ("zh", "en"):
        assert [start["facts"][language][name] for name in ("right", "known", "kept")] == [2, None, None]
        assert [judge["facts"][language][name] for name in ("right", "known", "kept")] == [1, 2, 1]
    assert judge["repetition"] == 0


@pytest.mark.slow
def test_a_model_is_asked_and_its_answers_are_its_own(tiny_model: str, tmp_path: Path) -> None:
    config = Evaluate(model=tiny_model, baseline=tiny_model, questions=2, max_prompts=1, samples=0, store=str(tmp_path))
    manifest = run_stage(config, evaluate)
    report = report_of(manifest.reference)
    assert [set(one["answers"]) for one in report["questions"]] == [{"baseline", "model"}] * 4
    assert all(one["answers"]["baseline"] == one["answers"]["model"] for one in report["questions"])
    for language in ("zh", "en"):
        before, after = (model["facts"][language] for model in report["models"])
        assert after["known"] == after["kept"] == before["right"]
        assert 0 <= manifest.metrics[f"answer_language_{language}"] <= 1
    assert 0 <= manifest.metrics["repetition"] < 1


def test_without_them_options_and_keys_are_those_of_before(given) -> None:
    plain = configuration_of(Evaluate(**{**given, "questions": 0}))
    assert not {"questions", "require"} & plain.keys()
    assert {"questions", "require"} <= configuration_of(Evaluate(**given, require=ALWAYS)).keys()


def test_more_questions_than_there_are_ask_all_and_fewer_than_none_are_refused(given) -> None:
    with pytest.raises(InputError, match="--questions is -1"):
        Evaluate(**{**given, "questions": -1})
