"""The evaluation: select held-out data once, score every model on it, write one report.

Models of equal digest (a stage that was skipped) are scored once. Measured at 4 layers × 128, 38,000 pieces, 100 kB of
Chinese, 100 kB of English and 500 two-way items: 8 to 10 CPU seconds a model, the output layer being most of them.
"""

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from components.evaluate.held_out import LANGUAGES, HeldOut, Sample, select
from components.evaluate.options import Evaluate, labels_of, shots_of, split
from components.evaluate.page import render
from zhllama import terminal
from zhllama.artifacts.json_file import value_of
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.reader import Artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.inference.generate import answer
from zhllama.inference.load import LoadedModel, load_model
from zhllama.inference.sampling import Sampling
from zhllama.stage.inputs import Inputs
from zhllama.stage.options import split_references
from zhllama.stage.report_figures import figures_table
from zhllama.stage.run import REPORT

log = logging.getLogger("evaluate")

METRICS = "metrics.jsonl"
ANSWER_TOKENS = 96
"""Of a sample: enough to judge it, short enough to stand beside the others."""
TEXT_FIGURES = ("tokens_per_character", "bits_per_byte", "perplexity", "next_token_accuracy")


def evaluate(config: Evaluate, inputs: Inputs, out: ArtifactWriter) -> Manifest:
    """Writes report.json and report.html. InputError before a model is loaded where a reference is wrong."""
    references = [*split_references(config.baseline), config.model]
    artifacts = [*inputs.all("baseline"), inputs["model"]]
    trainings = read_trainings(split_references(config.trainings), inputs.all("trainings"))
    held_out, texts = select(config, inputs)

    models: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = [
        {"kind": sample.kind, "prompt": sample.asked, "expected": sample.expected, "answers": {}}
        for sample in held_out.prompts
    ]
    measured: dict[str, tuple[dict[str, Any], list[str | None]]] = {}
    for label, reference, artifact in zip(labels_of(config), references, artifacts):
        if artifact.digest not in measured:
            option = "--model" if artifact is artifacts[-1] else "--baseline"
            measured[artifact.digest] = measure(config, held_out, artifact, label, option)
        figures, said = measured[artifact.digest]
        models.append({"label": label, "reference": reference, "digest": artifact.digest, **figures})
        for sample, text in zip(samples, said):
            if text is not None:
                sample["answers"][label] = text
    report: dict[str, Any] = {"models": models, "texts": texts, "samples": samples, "trainings": trainings}
    out.add_json("report.json", report, beside=True)
    out.add_bytes(REPORT, render(report, ANSWER_TOKENS).encode(), beside=True)
    out.metrics = metrics_of(report)
    out.facts["summary"] = summary(report)
    if sys.stdout.isatty():
        terminal.console().print(figures_table("Held-out figures", report["models"]))
    return out.publish("report")


def read_trainings(references: Sequence[str], artifacts: Sequence[Artifact]) -> list[dict[str, Any]]:
    """The loss curves of what `--trainings` names; what holds no metrics.jsonl (a skipped stage) is left out."""
    found = []
    for reference, artifact in zip(references, artifacts, strict=True):
        if METRICS not in (*artifact.names, *artifact.beside):
            log.info("%s: no %s in it, so no loss curve is shown", artifact.root, METRICS)
            continue
        points = []
        for count, line in enumerate(artifact.read(METRICS).splitlines(), start=1):
            try:
                value = value_of(line)
                step = int(value["step"])
                losses = {name: _finite(value.get(name)) for name in ("loss", "eval_loss")}
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise InputError(
                    f"--trainings {artifact.root}/{METRICS}: line {count} is not a training's metrics ({error}); give "
                    "what a training published"
                ) from error
            if any(loss is not None for loss in losses.values()):
                points.append({"step": step, **losses})
        stage = str(artifact.manifest.configuration.get("stage", ""))
        label = f"{artifact.manifest.stage} {stage}".strip() or artifact.root.rsplit("/", 1)[-1]
        found.append({"label": label, "reference": reference, "points": points})
    return found


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(float(value)) else None


# --- one model --------------------------------------------------------------------------------------------------------
def measure(
    config: Evaluate, held_out: HeldOut, model: Artifact, label: str, option: str
) -> tuple[dict[str, Any], list[str | None]]:
    """A model's figures, as report.json has them, and its answers to the samples."""
    log.info("%s: loading %s", label, model.root)
    loaded = load_model(model, option=option)
    # imports torch, which load_model has set up by now
    from components.evaluate.scoring import score_exam, score_items
    from zhllama.inference.scoring import score_text

    texts = {
        language: score_text(loaded, texts, f"{label}: {language}") if texts else dict.fromkeys(TEXT_FIGURES)
        for language, texts in held_out.texts.items()
    }
    figures = {
        "pieces": loaded.encoder.size,
        "parameters": sum(tensor.numel() for tensor in loaded.model.parameters()),
        **{name: {language: score[name] for language, score in texts.items()} for name in TEXT_FIGURES},
        "instructions": score_items(loaded, items, f"{label}: instructions") if (items := held_out.items) else None,
        "exams": [
            score_exam(loaded, exam, shots, f"{label}: {exam.name}, {shots} shots")
            for exam in held_out.exams
            for shots in shots_of(config.shots)
        ],
        "lm_eval": {},
    }
    if config.lm_eval:
        from components.evaluate.harness import run_tasks

        tasks = split(config.lm_eval)
        figures["lm_eval"] = run_tasks(loaded, tasks, held_out.task_folder, config.max_questions)
    return figures, say(loaded, held_out.prompts)


def say(loaded: LoadedModel, samples: Sequence[Sample]) -> list[str | None]:
    """The model's answers to the samples, greedy, so that they can be had again; None where the prompt does not fit."""
    greedy = Sampling(do_sample=False, max_new_tokens=ANSWER_TOKENS)
    prompts = [
        loaded.chat.ids(one.messages, trained=True) if one.messages else loaded.prompt_ids(one.asked) for one in samples
    ]
    said = iter(answer(loaded, [ids for ids in prompts if len(ids) < loaded.positions], greedy))
    return [loaded.encoder.decode(next(said)) if len(ids) < loaded.positions else None for ids in prompts]


# --- what is said of it -----------------------------------------------------------------------------------------------
def metrics_of(report: Mapping[str, Any]) -> dict[str, float]:
    """The figures of the model, and of the first baseline with `_baseline` behind their names."""
    found: dict[str, float | None] = {}
    first, last = report["models"][0], report["models"][-1]
    for model, suffix in ((last, ""), (first, "_baseline"))[: len(report["models"])]:
        found[f"tokens_per_character{suffix}"] = model["tokens_per_character"]["zh"]
        found[f"tokens_per_character_en{suffix}"] = model["tokens_per_character"]["en"]
        for language in LANGUAGES:
            for name in TEXT_FIGURES[1:]:
                found[f"{name}_{language}{suffix}"] = model[name][language]
        for name in ("accuracy", "chance", "exact_match", "items"):
            found[f"{name}{suffix}"] = (model["instructions"] or {}).get(name)
        for exam in model["exams"]:
            found[f"{exam['exam']}_{exam['shots']}_shots{suffix}"] = exam["accuracy"]
        for task, figures in model["lm_eval"].items():
            found |= {f"{task}_{name.removesuffix(',none')}{suffix}": value for name, value in figures.items()}
    return {name: float(value) for name, value in found.items() if value is not None}


def summary(report: Mapping[str, Any]) -> str:
    """`zh 3.10 → 1.82 bits/byte, accuracy 74.0% (chance 51.0%)`."""
    first, last = report["models"][0], report["models"][-1]
    said = []
    for language in LANGUAGES:
        before, after = first["bits_per_byte"][language], last["bits_per_byte"][language]
        if after is not None:
            said.append(f"{language} " + (f"{before:.2f} → " if first is not last else "") + f"{after:.2f} bits/byte")
    scored = last["instructions"]
    if scored and scored["accuracy"] is not None:
        said.append(f"accuracy {scored['accuracy']:.1%} (chance {scored['chance']:.1%})")
    asked = [exam for exam in last["exams"] if exam["accuracy"] is not None]
    said += [f"{exam['exam']} {exam['accuracy']:.1%} ({exam['shots']} shots)" for exam in asked]
    return ", ".join(said) or f"{len(report['models'])} models"
