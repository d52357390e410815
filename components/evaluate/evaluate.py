"""The evaluation: select held-out data once, score every model on it, write one report, judge it.

Models of equal digest (a stage that was skipped) are scored once. Measured at 4 layers × 128, 38,000 pieces, 100 kB of
Chinese, 100 kB of English and 500 two-way items: 8 to 10 CPU seconds a model, the output layer being most of them.

With `--require` the figures are published first, as without it, and then the report that judges them: other
requirements of the same models are judged in a second. That they hold is asked by Evaluate.accept, of a published
report too.
"""

import dataclasses
import logging
import math
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from components.evaluate.answers import repetition, say
from components.evaluate.facts import TOKENS, figures_of, is_right
from components.evaluate.figures import figures_of as measured_of
from components.evaluate.figures import metrics_of, summary
from components.evaluate.front import choose, measure_front, plan_front
from components.evaluate.held_out import LANGUAGES, HeldOut, select
from components.evaluate.options import Evaluate, labels_of, shots_of, split
from components.evaluate.page import render
from zhllama import terminal
from zhllama.artifacts.json_file import value_of
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.published import find_published
from zhllama.artifacts.reader import Artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.inference.load import LoadedModel, load_model
from zhllama.stage.inputs import Inputs
from zhllama.stage.options import configuration_of, split_references
from zhllama.stage.report_figures import figures_table
from zhllama.stage.requirements import TEXT_FIGURES, check_requirements, judge, parse_requirements
from zhllama.stage.run import REPORT, cache_key
from zhllama.tokenizer.chat import asked

log = logging.getLogger("evaluate")

METRICS = "metrics.jsonl"
ANSWER_TOKENS = 96
"""Of a sample: enough to judge it, short enough to stand beside the others."""
QUESTIONS_AT_ONCE = 32


def evaluate(config: Evaluate, inputs: Inputs, out: ArtifactWriter) -> Manifest:
    """Writes report.json and report.html. InputError before a model is loaded where a reference is wrong, or a figure
    that is required cannot be measured; whether requirements hold is for Evaluate.accept to say."""
    if not config.require:
        report = measured_report(config, inputs)
    else:
        plain = dataclasses.replace(config, require="")
        key = cache_key(plain, inputs.records)
        figures = find_published(config.store, out.stage, key)
        if figures is None:
            own = ArtifactWriter(
                config.store, out.stage, key, configuration_of(plain), inputs.records, inputs.require_unchanged
            )
            figures = publish(measured_report(config, inputs), own)
        else:
            log.info("these models are measured already, and are judged: %s", figures.reference)
        report = dict(value_of(open_artifact(figures.reference).read("report.json")))
        labels, measured = labels_of(config), [measured_of(model) for model in report["models"]]
        requirements = parse_requirements(config.require)
        report["requirements"] = judge(requirements, labels, measured)
        if "front" in report:
            report["front"] = choose(report["front"], requirements, labels, measured)
    manifest = publish(report, out)
    if sys.stdout.isatty():
        terminal.console().print(figures_table("Held-out figures", report["models"]))
    return manifest


def publish(report: dict[str, Any], out: ArtifactWriter) -> Manifest:
    out.add_json("report.json", report, beside=True)
    out.add_bytes(REPORT, render(report, ANSWER_TOKENS).encode(), beside=True)
    out.metrics = metrics_of(report)
    out.facts["summary"] = summary(report)
    return out.publish("report")


def measured_report(config: Evaluate, inputs: Inputs) -> dict[str, Any]:
    """report.json, but for what is required."""
    references = [*split_references(config.baseline), config.model]
    artifacts = [*inputs.all("baseline"), inputs["model"]]
    trainings = read_trainings(split_references(config.trainings), inputs.all("trainings"))
    held_out, texts = select(config, inputs)
    check_requirements(
        parse_requirements(config.require),
        labels_of(config),
        held_out.measured(),
        [f"{exam.name}_{shots}_shots" for exam in held_out.exams for shots in shots_of(config.shots)],
        split(config.lm_eval),
    )
    plan = plan_front(artifacts[-1], artifacts[0]) if config.front else None

    models: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = [
        {"kind": sample.kind, "prompt": sample.asked, "expected": sample.expected, "answers": {}}
        for sample in held_out.prompts
    ]
    questions: list[dict[str, Any]] = [
        {"language": fact.language, "question": fact.question, "answer": fact.answer, "answers": {}, "right": []}
        for fact in held_out.facts
    ]
    measured: dict[str, Measured] = {}
    # of the first baseline, which of the facts it knows
    known: list[bool] | None = None
    for label, reference, artifact in zip(labels_of(config), references, artifacts):
        if artifact.digest not in measured:
            option = "--model" if artifact is artifacts[-1] else "--baseline"
            measured[artifact.digest] = measure(config, held_out, artifact, label, option)
        found = measured[artifact.digest]
        models.append({"label": label, "reference": reference, "digest": artifact.digest, **found.figures})
        for sample, text in zip(samples, found.samples):
            if text is not None:
                sample["answers"][label] = text
        right = [is_right(fact, text) for fact, text in zip(held_out.facts, found.facts)]
        for question, text, one in zip(questions, found.facts, right):
            question["answers"][label] = text
            question["right"] += [label] * one
        if held_out.facts:
            models[-1] |= facts_of(held_out, found, known)
        if known is None and len(artifacts) > 1:
            known = right
    more: dict[str, Any] = {"questions": questions} if questions else {}
    if plan is not None:
        ends = [model["bits_per_byte"] for model in (models[-1], models[0])]
        more["front"] = measure_front(plan, config.front, ends, partial(score_texts, held_out))
    return {"models": models, "texts": texts, "samples": samples, "trainings": trainings, **more}


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
class Measured(NamedTuple):
    figures: dict[str, Any]
    """As report.json has them, but for facts."""
    samples: list[str | None]
    """Its answers to the samples; None where the prompt does not fit."""
    facts: list[str]
    """Its answers to the questions."""


def measure(config: Evaluate, held_out: HeldOut, model: Artifact, label: str, option: str) -> Measured:
    """What there is to know of a model."""
    log.info("%s: loading %s", label, model.root)
    loaded = load_model(model, option=option)
    # imports torch, which load_model has set up by now
    from components.evaluate.scoring import score_exam, score_items

    texts = score_texts(held_out, loaded, label)
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
    return Measured(figures, _samples(loaded, held_out, label), _answers(loaded, held_out, label))


def score_texts(held_out: HeldOut, loaded: LoadedModel, label: str) -> dict[str, dict[str, Any]]:
    """Language → its figures; None each where there is no text."""
    from zhllama.inference.scoring import score_text

    return {
        language: score_text(loaded, texts, f"{label}: {language}") if texts else dict.fromkeys(TEXT_FIGURES)
        for language, texts in held_out.texts.items()
    }


def _samples(loaded: LoadedModel, held_out: HeldOut, label: str) -> list[str | None]:
    prompts = [
        loaded.chat.ids(one.messages, trained=True) if one.messages else loaded.prompt_ids(one.asked)
        for one in held_out.prompts
    ]
    return say(loaded, prompts, ANSWER_TOKENS, f"{label}: samples")


def _answers(loaded: LoadedModel, held_out: HeldOut, label: str) -> list[str]:
    prompts = [loaded.chat.ids(asked(fact.question), trained=True) for fact in held_out.facts]
    said = say(loaded, prompts, TOKENS, f"{label}: questions", QUESTIONS_AT_ONCE)
    return [text or "" for text in said]


def facts_of(held_out: HeldOut, found: Measured, known: Sequence[bool] | None) -> dict[str, Any]:
    """What is said of a model where questions are asked. known: of each, whether the first baseline knows it."""
    facts = {}
    for language in LANGUAGES:
        chosen = [at for at, fact in enumerate(held_out.facts) if fact.language == language]
        before = None if known is None else [known[at] for at in chosen]
        facts[language] = figures_of([held_out.facts[at] for at in chosen], [found.facts[at] for at in chosen], before)
    return {"facts": facts, "repetition": repetition(found.samples)}
