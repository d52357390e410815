"""The evaluation: select held-out data once, score every model on it, write one report.

Models of equal digest (a stage that was skipped) are scored once. Measured at 4 layers × 128, 38,000 pieces, 100 kB of
Chinese, 100 kB of English and 500 two-way items: 8 to 10 CPU seconds a model, the output layer being most of them.
"""

import sys
from collections.abc import Mapping
from typing import Any

from components.evaluate.held_out import LANGUAGES, select
from components.evaluate.measure import ANSWER_TOKENS, measure
from components.evaluate.options import Evaluate, labels_of
from components.evaluate.report import REPORT_JSON
from components.evaluate.trainings import read_trainings
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.stage.inputs import Inputs
from zhllama.stage.options import split_references
from zhllama.stage.report_figures import figures_table
from zhllama.stage.run import REPORT


def evaluate(config: Evaluate, inputs: Inputs, out: ArtifactWriter) -> Manifest:
    """Writes report.json and report.html. InputError before a model is loaded where a reference is wrong."""
    references = [*split_references(config.baseline), config.model]
    labels = labels_of(config)
    artifacts = [*inputs.all("baseline"), inputs["model"]]
    trainings = read_trainings(split_references(config.trainings), inputs.all("trainings"))
    held_out, texts = select(config, inputs)

    models: list[dict[str, Any]] = []
    answers: list[dict[str, str]] = [{} for _ in held_out.prompts]
    measured: dict[str, tuple[dict[str, Any], list[str | None]]] = {}
    for label, reference, artifact in zip(labels, references, artifacts):
        if artifact.digest not in measured:
            option = "--model" if artifact is artifacts[-1] else "--baseline"
            measured[artifact.digest] = measure(artifact, held_out, label, option)
        figures, said = measured[artifact.digest]
        models.append({"label": label, "reference": reference, "digest": artifact.digest, **figures})
        for sample, text in zip(answers, said):
            if text is not None:
                sample[label] = text
    report: dict[str, Any] = {
        "models": models,
        "texts": texts,
        "samples": [
            {"kind": sample.kind, "prompt": sample.asked, "expected": sample.expected, "answers": given}
            for sample, given in zip(held_out.prompts, answers)
        ],
        "trainings": trainings,
    }

    from components.evaluate.page import render

    out.add_json(REPORT_JSON, report)
    out.add_bytes(REPORT, render(report, ANSWER_TOKENS).encode())
    out.metrics = metrics_of(report)
    out.facts["summary"] = summary(report)
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(figures_table("Held-out figures", report["models"]))
    return out.publish("report")


# --- what is said of it -----------------------------------------------------------------------------------------------
def metrics_of(report: Mapping[str, Any]) -> dict[str, float]:
    """The figures of the model, and of the first baseline with `_baseline` behind their names."""
    found: dict[str, float | None] = {}
    models = report["models"]
    for model, suffix in [(models[-1], ""), *([(models[0], "_baseline")] if len(models) > 1 else [])]:
        found[f"tokens_per_character{suffix}"] = model["tokens_per_character"]["zh"]
        found[f"tokens_per_character_en{suffix}"] = model["tokens_per_character"]["en"]
        for language in LANGUAGES:
            found[f"bits_per_byte_{language}{suffix}"] = model["bits_per_byte"][language]
            found[f"perplexity_{language}{suffix}"] = model["perplexity"][language]
            found[f"next_token_accuracy_{language}{suffix}"] = model["next_token_accuracy"][language]
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
    said += [
        f"{exam['exam']} {exam['accuracy']:.1%} ({exam['shots']} shots)"
        for exam in last["exams"]
        if exam["accuracy"] is not None
    ]
    return ", ".join(said) or f"{len(report['models'])} models"
