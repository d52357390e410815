"""The evaluation: select held-out data once, score every model on it, write one report.

Models of equal digest (a stage that was skipped) are scored once. Measured at 4 layers × 128, 38,000 pieces, 100 kB of
Chinese, 100 kB of English and 500 two-way items: 8 to 10 CPU seconds a model, the output layer being most of them.
"""

import itertools
import json
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from components.evaluate.exams import Exam, read_exam
from components.evaluate.report import REPORT_JSON
from components.evaluate.selection import ChoiceItem, Selection, chance, choose_items, choose_texts, content_hash
from zhllama.artifacts.cache import materialize
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.reader import Artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.stage.inputs import Inputs
from zhllama.stage.options import Ref, Refs, StageOptions, split_references
from zhllama.stage.report_figures import figures_table
from zhllama.stage.run import REPORT

if TYPE_CHECKING:
    from components.evaluate.scoring import ItemScores, SubjectScore
    from zhllama.inference.load import LoadedModel

log = logging.getLogger("evaluate")

METRICS = "metrics.jsonl"
LANGUAGES = ("zh", "en")
ANSWER_TOKENS = 96
"""Of a sample: enough to judge it, short enough to stand beside the others."""
CONTINUED = 24
"""Characters of a held-out document that a model is given to continue."""


@dataclass(frozen=True, kw_only=True)
class Evaluate(StageOptions):
    """Measure a model against its baselines on held-out text and instructions."""

    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "sentencepiece")

    model: Ref
    """Reference to the model that was made."""
    baseline: Refs = ""
    """References to the models it is compared with, comma-separated, in the order they are shown."""
    labels: str = ""
    """Names for the baselines and the model, comma-separated: "base,stage 1,adapted"."""
    text: Ref = ""
    """Held-out Chinese text: .txt or .jsonl files, or a packed dataset, whose held-out part is read."""
    english: Ref = ""
    """Held-out English text, likewise: what was forgotten."""
    instructions: Ref = ""
    """Held-out instructions: Alpaca items, or a packed dataset, whose held-out part is read."""
    text_validation: Ref = ""
    """Read in place of --text where it is given: text that was held out as a whole."""
    instructions_validation: Ref = ""
    """Read in place of --instructions where it is given."""
    trainings: Refs = ""
    """What the trainings published (with metrics.jsonl), comma-separated: their loss curves are shown."""
    exams: Refs = ""
    """Exams, comma-separated: folders of CSV files in C-Eval's or CMMLU's layout (dev/, val/ or test/)."""
    shots: str = "0,5"
    """Worked examples before an exam's question, comma-separated: each number is a figure of its own."""
    max_questions: int = 0
    """Questions of each subject of an exam that are asked; 0 for all of them."""
    prompts: Ref = ""
    """Fixed prompts that every model answers: .txt (one a line) or Alpaca items. "": the project's own twelve."""
    max_prompts: int = 12
    """How many of the fixed prompts are asked; 0 for none."""
    lm_eval: str = ""
    """Tasks of lm-evaluation-harness, comma-separated; needs `pip install 'zhllama[lm-eval]'`."""
    lm_eval_tasks: Ref = ""
    """A folder with YAML files of more such tasks. They may run code that they name: only your own."""
    samples: int = 6
    """Answers to held-out instructions and continuations of held-out text shown side by side."""
    max_bytes: int = 200_000
    """Bytes of each text that are scored."""
    max_items: int = 500
    """Multiple-choice items that are scored (a fifth of it of the other items)."""

    def __post_init__(self) -> None:
        if not any((self.text_option[1], self.english, self.instructions_option[1], self.exams, self.lm_eval)):
            raise InputError(
                "evaluate: nothing to measure on; give --text, --english, --instructions, --exams or --lm-eval"
            )
        for name, value, least in (
            ("--samples", self.samples, 0),
            ("--max-bytes", self.max_bytes, 1),
            ("--max-items", self.max_items, 1),
            ("--max-questions", self.max_questions, 0),
            ("--max-prompts", self.max_prompts, 0),
        ):
            if value < least:
                raise InputError(f"evaluate: {name} is {value}; it must be {least} or more")
        shots_of(self.shots)
        count = len(split_references(self.baseline)) + 1
        named = [label for label in _split(self.labels) if label]
        if named and (len(named) != count or len(set(named)) != count):
            raise InputError(
                f"evaluate: --labels has {len(named)} names ({self.labels}) for {count} models, the baselines and the "
                "model; give each one its own, comma-separated"
            )

    @property
    def text_option(self) -> tuple[str, str]:
        """The option that names the Chinese text that is measured, and its value."""
        return ("--text-validation", self.text_validation) if self.text_validation else ("--text", self.text)

    @property
    def instructions_option(self) -> tuple[str, str]:
        """Likewise, of the instructions."""
        if self.instructions_validation:
            return "--instructions-validation", self.instructions_validation
        return "--instructions", self.instructions


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")] if text else []


def shots_of(text: str) -> list[int]:
    """`0,5` as numbers, each once. InputError for what is none."""
    parts = _split(text)
    if not parts or not all(part.isdecimal() and part.isascii() for part in parts):
        raise InputError(f"evaluate: --shots is {text!r}; write numbers, comma-separated: 0,5")
    return list(dict.fromkeys(map(int, parts)))


def labels_of(config: Evaluate) -> list[str]:
    """The given names, or `baseline` (numbered when there are several) and `model`."""
    given = [label for label in _split(config.labels) if label]
    if given:
        return given
    count = len(split_references(config.baseline))
    return [*(("baseline" if count == 1 else f"baseline {index + 1}") for index in range(count)), "model"]


@dataclass(frozen=True)
class HeldOut:
    """What the models are scored on."""

    texts: Mapping[str, Sequence[str]]
    """Language → documents; empty where none was given."""
    selection: Selection
    exams: Sequence[Exam]
    shots: Sequence[int]
    prompts: Sequence["Sample"]
    tasks: Sequence[str] = ()
    """Of lm-evaluation-harness, with the folder of the user's own ones."""
    task_folder: Path | None = None
    max_questions: int = 0


@dataclass(frozen=True)
class Sample:
    """A prompt that every model answers: a fixed one, an instruction (both wrapped as in training), or a text."""

    kind: str
    prompt: str
    asked: str
    expected: str


def evaluate(config: Evaluate, inputs: Inputs, out: ArtifactWriter) -> Manifest:
    """Writes report.json and report.html. InputError before a model is loaded where a reference is wrong."""
    references = [*split_references(config.baseline), config.model]
    labels = labels_of(config)
    artifacts = [
        open_artifact(reference, "--baseline" if index < len(references) - 1 else "--model")
        for index, reference in enumerate(references)
    ]
    trainings = read_trainings(config.trainings)
    held_out, texts = select(config)

    models: list[dict[str, Any]] = []
    answers: list[dict[str, str]] = [{} for _ in held_out.prompts]
    measured: dict[str, tuple[dict[str, Any], list[str | None]]] = {}
    for label, reference, artifact in zip(labels, references, artifacts):
        if artifact.digest not in measured:
            option = "--model" if artifact is artifacts[-1] else "--baseline"
            measured[artifact.digest] = measure(reference, held_out, label, option)
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


# --- what is measured on ----------------------------------------------------------------------------------------------


def select(config: Evaluate) -> tuple[HeldOut, dict[str, Any]]:
    """The held-out data, and what report.json says of the texts."""
    from zhllama.data.corpus import read_documents
    from zhllama.data.instructions import read_instructions

    texts: dict[str, list[str]] = {language: [] for language in LANGUAGES}
    said: dict[str, Any] = dict.fromkeys(LANGUAGES)
    for language, (option, reference) in (("zh", config.text_option), ("en", ("--english", config.english))):
        if not reference:
            continue
        artifact = open_artifact(reference, option)
        chosen = choose_texts((document.text for document in read_documents(artifact)), config.max_bytes)
        texts[language] = chosen
        said[language] = {
            "reference": reference,
            "documents": len(chosen),
            "bytes": sum(len(text.encode()) for text in chosen),
            "characters": sum(map(len, chosen)),
        }
    selection = Selection((), ())
    option, reference = config.instructions_option
    if reference:
        artifact = open_artifact(reference, option)
        selection = choose_items(read_instructions(artifact), config.max_items)
    exams = [read_exam(open_artifact(exam, "--exams"), config.max_questions) for exam in split_references(config.exams)]
    tasks, task_folder = _split(config.lm_eval), None
    if tasks:
        from components.evaluate.harness import check_tasks

        if config.lm_eval_tasks:
            task_folder = materialize(open_artifact(config.lm_eval_tasks, "--lm-eval-tasks"))
        check_tasks(tasks, task_folder)
    samples = [
        *fixed_prompts(config.prompts, config.max_prompts),
        *choose_samples(texts["zh"], selection, config.samples),
    ]
    held_out = HeldOut(
        texts, selection, exams, shots_of(config.shots), samples, tasks, task_folder, config.max_questions
    )
    return held_out, said


def fixed_prompts(reference: str, count: int) -> list[Sample]:
    """The first `count` of the prompts that are the same in every evaluation: the user's, or the project's own."""
    from zhllama.data.corpus import read_documents
    from zhllama.data.instructions import read_instructions
    from zhllama.tokenizer.prompt import wrap

    if not reference:
        lines = (Path(__file__).parent / "prompts.txt").read_text("utf-8").splitlines()
        return [Sample("prompt", wrap(line), line, "") for line in lines[:count]]
    artifact = open_artifact(reference, "--prompts")
    if any(name.endswith(".txt") for name in artifact.names):
        texts = (document.text for document in read_documents(artifact))
        return [Sample("prompt", wrap(text), text, "") for text in itertools.islice(texts, count)]
    return [_sample("prompt", item) for item in itertools.islice(read_instructions(artifact, answered=False), count)]


def _sample(kind: str, item: Mapping[str, str]) -> Sample:
    from zhllama.tokenizer.prompt import wrap_item

    asked = "\n".join(filter(None, (item["instruction"], item["input"])))
    return Sample(kind, wrap_item(item), asked, item["output"])


def choose_samples(texts: Sequence[str], selection: Selection, count: int) -> list[Sample]:
    """Half instructions (each in turn, the commonest first), half texts to continue; or all of what there is."""
    groups: dict[str, list[Mapping[str, str]]] = {}
    for item in [*(choice.item for choice in selection.choice), *selection.free]:
        groups.setdefault(item["instruction"], []).append(item)
    items: list[Mapping[str, str]] = []
    waiting = [groups[name] for name in sorted(groups, key=lambda name: (-len(groups[name]), content_hash(name)))]
    while waiting and len(items) < count:
        items += [group.pop(0) for group in waiting][: count - len(items)]
        waiting = [group for group in waiting if group]
    long_enough = [text for text in texts if len(text) > 2 * CONTINUED][:count]
    asked = min(len(items), max(count - count // 2, count - len(long_enough)))
    continued = [
        Sample("text", text[:CONTINUED], text[:CONTINUED], text[CONTINUED : 4 * CONTINUED])
        for text in long_enough[: count - asked]
    ]
    return [_sample("instruction", item) for item in items[:asked]] + continued


def read_trainings(references: str) -> list[dict[str, Any]]:
    """The loss curves of what `--trainings` names; what holds no metrics.jsonl (a skipped stage) is left out."""
    found = []
    for reference in split_references(references):
        artifact = open_artifact(reference, "--trainings")
        if METRICS not in artifact:
            log.info("%s: no %s in it, so no loss curve is shown", artifact.root, METRICS)
            continue
        stage = str(artifact.manifest.configuration.get("stage", ""))
        label = f"{artifact.manifest.stage} {stage}".strip() or artifact.root.rsplit("/", 1)[-1]
        found.append({"label": label, "reference": reference, "points": _points(artifact)})
    return found


def _points(artifact: Artifact) -> list[dict[str, float | None]]:
    points = []
    for count, line in enumerate(artifact.read(METRICS).decode().splitlines(), start=1):
        where = f"--trainings {artifact.root}/{METRICS}: line {count}"
        try:
            value = json.loads(line)
            step = int(value["step"])
            losses = {name: _finite(value.get(name)) for name in ("loss", "eval_loss")}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"{where} is not a training's metrics ({error}); give what a training published"
            ) from error
        if any(loss is not None for loss in losses.values()):
            points.append({"step": step, **losses})
    return points


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(float(value)) else None


# --- one model --------------------------------------------------------------------------------------------------------


def measure(reference: str, held_out: HeldOut, label: str, option: str) -> tuple[dict[str, Any], list[str | None]]:
    """A model's figures, as report.json has them, and its answers to the samples."""
    from components.evaluate.scoring import score_exam, score_items, score_text
    from zhllama.inference.load import load_model

    log.info("%s: loading %s", label, reference)
    loaded = load_model(reference, option=option)
    scores = {
        language: score_text(loaded, texts, f"{label}: {language}") if texts else None
        for language, texts in held_out.texts.items()
    }
    selection = held_out.selection
    items = score_items(loaded, selection, f"{label}: instructions") if selection.choice or selection.free else None
    figures = {
        "pieces": loaded.encoder.size,
        "parameters": sum(tensor.numel() for tensor in loaded.model.parameters()),
        **{
            name: {language: getattr(score, name) if score else None for language, score in scores.items()}
            for name in ("tokens_per_character", "bits_per_byte", "perplexity", "next_token_accuracy")
        },
        "instructions": instruction_figures(items) if items else None,
        "exams": [
            exam_figures(exam, shots, score_exam(loaded, exam, shots, f"{label}: {exam.name}, {shots} shots"))
            for exam in held_out.exams
            for shots in held_out.shots
        ],
        "lm_eval": _lm_eval(loaded, held_out),
    }
    return figures, say(loaded, held_out.prompts)


def _lm_eval(loaded: "LoadedModel", held_out: HeldOut) -> dict[str, dict[str, float]]:
    if not held_out.tasks:
        return {}
    from components.evaluate.harness import run_tasks

    return run_tasks(loaded, held_out.tasks, held_out.task_folder, held_out.max_questions)


def exam_figures(exam: Exam, shots: int, scores: Sequence["SubjectScore"]) -> dict[str, Any]:
    """SubjectScores as report.json has them. The accuracy is over questions, not the mean of the subjects'."""
    asked = sum(score.questions for score in scores)
    right = sum(score.right for score in scores)
    questions = [question for subject in exam.subjects for question in subject.questions]
    accuracy = right / asked if asked else None
    return {
        "exam": exam.name,
        "shots": shots,
        "items": asked,
        "accuracy": accuracy,
        "margin": margin(accuracy, asked) if accuracy is not None else None,
        "chance": sum(1 / len(question.choices) for question in questions) / len(questions) if questions else None,
        "too_long": sum(score.too_long for score in scores),
        "subjects": [
            {
                "subject": score.subject,
                "items": score.questions,
                "accuracy": score.right / score.questions if score.questions else None,
            }
            for score in scores
        ],
    }


def margin(share: float, count: int) -> float:
    """Half the 95% interval of a share: the normal approximation of the binomial."""
    return 1.96 * math.sqrt(share * (1 - share) / count)


def instruction_figures(scores: "ItemScores") -> dict[str, Any]:
    """ItemScores as report.json has them."""
    count = len(scores.items)
    accuracy = sum(scores.right) / count if count else None
    groups: dict[str, list[tuple[ChoiceItem, bool]]] = {}
    for item, right in zip(scores.items, scores.right):
        groups.setdefault(item.item["instruction"], []).append((item, right))
    return {
        "accuracy": accuracy,
        "margin": margin(accuracy, count) if accuracy is not None else None,
        "chance": chance(scores.items) if count else None,
        "items": count,
        "exact_match": sum(scores.exact) / len(scores.exact) if scores.exact else None,
        "exact_match_items": len(scores.exact),
        "answer_bits_per_byte": _finite(scores.answer_bits_per_byte),
        "too_long": scores.too_long,
        "groups": [
            {
                "instruction": instruction,
                "choices": list(group[0][0].choices),
                "items": len(group),
                "accuracy": sum(right for _, right in group) / len(group),
                "chance": chance(item for item, _ in group),
            }
            for instruction, group in sorted(groups.items(), key=lambda pair: (-len(pair[1]), pair[0]))
        ],
    }


def say(loaded: "LoadedModel", samples: Sequence[Sample]) -> list[str | None]:
    """The model's answers to the samples, greedy, so that they can be had again; None where the prompt does not fit."""
    from zhllama.inference.load import Sampling, answer

    greedy = Sampling(do_sample=False, max_new_tokens=ANSWER_TOKENS)
    prompts = [loaded.prompt_ids(sample.prompt) for sample in samples]
    fitting = [index for index, ids in enumerate(prompts) if len(ids) < loaded.positions]
    said: list[str | None] = [None] * len(samples)
    for index, ids in zip(fitting, answer(loaded, [prompts[index] for index in fitting], greedy)):
        said[index] = loaded.encoder.decode(ids)
    return said


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
