"""The figures of report.json as metrics and as a line for people."""

from collections.abc import Mapping
from typing import Any

from components.evaluate.held_out import LANGUAGES
from zhllama.stage.requirements import TEXT_FIGURES

FACTS = {
    "accuracy": "facts",
    "kept_share": "facts_kept",
    "in_language": "answer_language",
    "distinct": "distinct_answers",
}
"""Figure of a language's facts in report.json → what metrics call it."""


def metrics_of(report: Mapping[str, Any]) -> dict[str, float]:
    """The figures of the model, and of the first baseline with `_baseline` behind their names."""
    found = figures_of(report["models"][-1])
    if len(report["models"]) > 1:
        found |= {f"{name}_baseline": value for name, value in figures_of(report["models"][0]).items()}
    return found


def figures_of(model: Mapping[str, Any]) -> dict[str, float]:
    """What was measured of a model, by the names that metrics have, and requirements."""
    found: dict[str, float | None] = {
        "tokens_per_character": model["tokens_per_character"]["zh"],
        "tokens_per_character_en": model["tokens_per_character"]["en"],
    }
    for language in LANGUAGES:
        for name in TEXT_FIGURES[1:]:
            found[f"{name}_{language}"] = model[name][language]
        facts = model.get("facts", {}).get(language) or {}
        found |= {f"{called}_{language}": facts.get(name) for name, called in FACTS.items()}
    found["repetition"] = model.get("repetition")
    for name in ("accuracy", "chance", "exact_match", "items"):
        found[name] = (model["instructions"] or {}).get(name)
    for exam in model["exams"]:
        found[f"{exam['exam']}_{exam['shots']}_shots"] = exam["accuracy"]
    for task, figures in model["lm_eval"].items():
        found |= {f"{task}_{name.removesuffix(',none')}": value for name, value in figures.items()}
    return {name: float(value) for name, value in found.items() if value is not None}


def summary(report: Mapping[str, Any]) -> str:
    """`zh 3.10 → 1.82 bits/byte, accuracy 74.0% (chance 51.0%), 2 of 2 requirements hold`."""
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
    for language in LANGUAGES:
        if facts := last.get("facts", {}).get(language):
            kept = "" if facts["kept"] is None else f" ({facts['kept']} of the base's {facts['known']})"
            said.append(f"{language} facts {facts['right']} of {facts['items']}{kept}")
    judged = [one["holds"] for one in report.get("requirements", ()) if one["holds"] is not None]
    if judged:
        said.append(f"{sum(judged)} of {len(judged)} requirements hold")
    return ", ".join(said) or f"{len(report['models'])} models"
