"""The stage: one report for several models, the same on every run, and one line for what is wrong."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from components.evaluate.evaluate import METRICS, evaluate
from components.evaluate.held_out import fixed_prompts
from components.evaluate.options import Evaluate
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.stage.run import run_stage


def options(held_out: Path, **more: Any) -> dict[str, Any]:
    given = {
        "text": str(held_out / "zh"),
        "english": str(held_out / "en"),
        "instructions": str(held_out / "instructions"),
        "samples": 3,
        "max_prompts": 2,
        "max_bytes": 3000,
    }
    return {**given, **more}


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a training publishes, as far as evaluate reads it."""
    out = ArtifactWriter(str(tmp_path_factory.mktemp("training")), "pretrain", "key", {"stage": "lora"})
    lines = [{"step": step, "loss": 7 - step / 10} for step in range(1, 21)] + [{"step": 20, "eval_loss": 5.5}]
    out.add_bytes(METRICS, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return out.publish("adapter").reference


@pytest.fixture(scope="module")
def published(
    tmp_path_factory: pytest.TempPathFactory, held_out: Path, tiny_model: str, judge: Path, training: str
) -> Manifest:
    """The judge against the tiny model it was trained from."""
    config = Evaluate(
        **options(
            held_out, baseline=tiny_model, model=str(judge), labels="base,judge", trainings=f"{training},{tiny_model}"
        ),
        store=str(tmp_path_factory.mktemp("store")),
    )
    return run_stage(config, evaluate)


@pytest.fixture(scope="module")
def report(published: Manifest) -> dict[str, Any]:
    return dict(json.loads(open_artifact(published.reference).read("report.json")))


@pytest.mark.slow
def test_the_report_sets_the_models_side_by_side(report: dict[str, Any]) -> None:
    base, judge = report["models"]
    assert (base["label"], judge["label"]) == ("base", "judge")
    assert base["tokens_per_character"] == judge["tokens_per_character"]
    assert base["instructions"]["accuracy"] < 0.75
    assert judge["instructions"]["accuracy"] > 0.9
    assert judge["instructions"]["chance"] == 0.5
    assert (judge["instructions"]["items"], judge["instructions"]["exact_match_items"]) == (60, 64)
    assert judge["bits_per_byte"]["zh"] != base["bits_per_byte"]["zh"]
    assert report["texts"]["zh"]["bytes"] <= 3000


@pytest.mark.slow
def test_samples_are_answered_by_every_model(report: dict[str, Any]) -> None:
    kinds = [sample["kind"] for sample in report["samples"]]
    # the sentences are too short to be continued
    assert kinds == ["prompt", "prompt", "instruction", "instruction", "instruction"]
    assert all(set(sample["answers"]) == {"base", "judge"} for sample in report["samples"])
    judged = next(sample for sample in report["samples"] if sample["prompt"].startswith("判断"))
    assert judged["answers"]["judge"] == judged["expected"]


@pytest.mark.slow
def test_loss_curves_are_read_and_what_has_none_is_left_out(report: dict[str, Any]) -> None:
    (curve,) = report["trainings"]
    assert curve["label"] == "pretrain lora"
    assert curve["points"][0] == {"step": 1, "loss": 6.9, "eval_loss": None}
    assert curve["points"][-1] == {"step": 20, "loss": None, "eval_loss": 5.5}


@pytest.mark.slow
def test_metrics_are_of_the_model_and_of_the_first_baseline(published: Manifest, report: dict[str, Any]) -> None:
    base, judge = report["models"]
    assert published.metrics["bits_per_byte_zh"] == judge["bits_per_byte"]["zh"]
    assert published.metrics["bits_per_byte_en_baseline"] == base["bits_per_byte"]["en"]
    assert published.metrics["tokens_per_character"] == judge["tokens_per_character"]["zh"]
    assert published.metrics["accuracy"] == judge["instructions"]["accuracy"]
    assert "bits/byte" in published.facts["summary"]


@pytest.mark.slow
def test_the_page_is_published_beside_the_figures(published: Manifest) -> None:
    page = open_artifact(published.reference).read("report.html").decode()
    assert "judge" in page
    assert "pretrain lora" in page


def test_models_of_equal_digest_are_scored_once(
    held_out: Path, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from components.evaluate import evaluate as module

    measured = []
    real = module.measure
    monkeypatch.setattr(module, "measure", lambda *given: measured.append(given) or real(*given))
    config = Evaluate(
        model=tiny_model, baseline=f"{tiny_model},{tiny_model}", text=str(held_out / "zh"), store=str(tmp_path)
    )
    manifest = run_stage(config, evaluate)
    report = json.loads(open_artifact(manifest.reference).read("report.json"))
    assert [model["label"] for model in report["models"]] == ["baseline 1", "baseline 2", "model"]
    assert len(measured) == 1


@pytest.mark.slow
def test_the_command_writes_what_kfp_reads(held_out: Path, tiny_model: str, s3_store: str, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "components.evaluate", "--store", s3_store, "--model", tiny_model),
        *("--baseline", "", "--labels", "", "--text", str(held_out / "zh"), "--english", ""),
        *("--instructions", str(held_out / "instructions"), "--trainings", "", "--samples", "1", "--max-bytes", "2000"),
        *("--output", str(tmp_path / "manifest"), "--reference", str(tmp_path / "ref")),
        *("--report", str(tmp_path / "report"), "--executor-output", str(tmp_path / "executor")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    manifest = open_artifact((tmp_path / "ref").read_text()).manifest
    assert manifest.kind == "report"
    assert (tmp_path / "report").read_bytes().startswith(b"<!doctype html>")
    metadata = json.loads((tmp_path / "executor").read_text())["artifacts"]["metrics"]["artifacts"][0]["metadata"]
    assert metadata["bits_per_byte_zh"] == manifest.metrics["bits_per_byte_zh"]


def test_the_users_own_prompts_and_exams_are_used(tiny_model: str, tmp_path: Path) -> None:
    exam = tmp_path / "exam"
    (exam / "val").mkdir(parents=True)
    (exam / "val" / "law.csv").write_text("question,A,B,answer\n" + "".join(f"问{n},甲,乙,B\n" for n in range(4)))
    (tmp_path / "prompts.txt").write_text("你好\n\n再见\n天气\n", "utf-8")
    config = Evaluate(
        model=tiny_model, exams=str(exam), shots="0", prompts=str(tmp_path / "prompts.txt"), max_prompts=2,
        store=str(tmp_path / "store"),
    )  # fmt: skip
    manifest = run_stage(config, evaluate)
    report = json.loads(open_artifact(manifest.reference).read("report.json"))
    assert [(sample["kind"], sample["prompt"]) for sample in report["samples"]] == [
        ("prompt", "你好"),
        ("prompt", "再见"),
    ]
    (figures,) = report["models"][0]["exams"]
    assert (figures["exam"], figures["shots"], figures["items"], figures["chance"]) == ("exam", 0, 4, 0.5)
    assert manifest.metrics["exam_0_shots"] == figures["accuracy"]
    assert "exam " in manifest.facts["summary"]


def test_alpaca_items_may_be_the_prompts(tmp_path: Path) -> None:
    (tmp_path / "items.json").write_text(json.dumps([{"instruction": "翻译", "input": "猫", "output": "cat"}]))
    (sample,) = fixed_prompts(open_artifact(str(tmp_path)), 5)
    assert (sample.asked, sample.expected) == ("翻译\n猫", "cat")


def test_a_conversation_may_be_a_prompt(tmp_path: Path) -> None:
    said = [
        {"role": "user", "content": "翻译"},
        {"role": "assistant", "content": "什么？"},
        {"role": "user", "content": "猫"},
    ]
    (tmp_path / "items.json").write_text(json.dumps([{"messages": said}]))
    (sample,) = fixed_prompts(open_artifact(str(tmp_path)), 5)
    assert sample.messages == said
    assert sample.asked == "user: 翻译\n\nassistant: 什么？\n\nuser: 猫"


def test_the_projects_own_prompts_are_as_many_as_the_default_asks() -> None:
    assert len(fixed_prompts(None, 99)) == Evaluate(model="m", text="t", store="s").max_prompts


# --- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"text": "", "english": "", "instructions": ""}, "give --text, --english, --instructions, --exams or"),
        ({"labels": "a,b,c"}, "--labels has 3 names"),
        ({"labels": "a,a", "baseline": "x"}, "--labels has 2 names"),
        ({"max_bytes": 0}, "--max-bytes is 0"),
        ({"samples": -1}, "--samples is -1"),
        ({"shots": "0,five"}, "--shots is '0,five'"),
    ],
    ids=[
        "nothing to measure on",
        "too many labels",
        "one label twice",
        "no bytes",
        "negative samples",
        "shots in words",
    ],
)
def test_options_that_contradict_are_refused(held_out: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Evaluate(**options(held_out, **{"model": "m", **given}), store="s")


def test_a_wrong_reference_is_named_before_a_model_is_loaded(held_out: Path, tiny_model: str, tmp_path: Path) -> None:
    config = Evaluate(**options(held_out, model=tiny_model, english=str(tmp_path / "none")), store=str(tmp_path / "s"))
    with pytest.raises(InputError, match=r"--english .*none: nothing is there"):
        run_stage(config, evaluate)
    assert not list((tmp_path / "s").rglob("manifest.json"))


@pytest.mark.parametrize("line", ["not json", '{"loss": 1}', '{"step": 1, "loss": "low"}', "[1]"])
def test_metrics_that_are_none_are_refused_by_line(held_out: Path, tiny_model: str, tmp_path: Path, line: str) -> None:
    (tmp_path / METRICS).write_text('{"step": 1, "loss": 2.5}\n' + line + "\n")
    config = Evaluate(**options(held_out, model=tiny_model, trainings=str(tmp_path)), store=str(tmp_path / "s"))
    with pytest.raises(InputError, match=r"--trainings .*metrics\.jsonl: line 2 is not a training's metrics"):
        run_stage(config, evaluate)
