"""One model: its figures, as report.json has them, and what it says."""

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from components.evaluate.exams import Exam
from components.evaluate.held_out import HeldOut, Sample
from components.evaluate.selection import ChoiceItem, chance
from components.evaluate.trainings import finite
from zhllama.artifacts.reader import Artifact

if TYPE_CHECKING:
    from components.evaluate.scoring import ItemScores, SubjectScore
    from zhllama.inference.load import LoadedModel

log = logging.getLogger("evaluate")

ANSWER_TOKENS = 96
"""Of a sample: enough to judge it, short enough to stand beside the others."""


# --- one model --------------------------------------------------------------------------------------------------------
def measure(model: Artifact, held_out: HeldOut, label: str, option: str) -> tuple[dict[str, Any], list[str | None]]:
    """A model's figures, as report.json has them, and its answers to the samples."""
    from components.evaluate.scoring import score_exam, score_items, score_text
    from zhllama.inference.load import load_model

    log.info("%s: loading %s", label, model.root)
    loaded = load_model(model, option=option)
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
    return {
        "exam": exam.name,
        "shots": shots,
        **shares(right, asked),
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


def shares(right: int, count: int) -> dict[str, Any]:
    """How many were right, as report.json has it. margin: half the 95% interval, by the normal approximation."""
    share = right / count if count else None
    margin = None if share is None else 1.96 * math.sqrt(share * (1 - share) / count)
    return {"items": count, "accuracy": share, "margin": margin}


def instruction_figures(scores: "ItemScores") -> dict[str, Any]:
    """ItemScores as report.json has them."""
    groups: dict[str, list[tuple[ChoiceItem, bool]]] = {}
    for item, right in zip(scores.items, scores.right):
        groups.setdefault(item.item["instruction"], []).append((item, right))
    return {
        **shares(sum(scores.right), len(scores.items)),
        "chance": chance(scores.items) if scores.items else None,
        "exact_match": sum(scores.exact) / len(scores.exact) if scores.exact else None,
        "exact_match_items": len(scores.exact),
        "answer_bits_per_byte": finite(scores.answer_bits_per_byte),
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
    from zhllama.inference.generate import answer
    from zhllama.inference.sampling import Sampling

    greedy = Sampling(do_sample=False, max_new_tokens=ANSWER_TOKENS)
    prompts = [loaded.prompt_ids(sample.prompt) for sample in samples]
    fitting = [index for index, ids in enumerate(prompts) if len(ids) < loaded.positions]
    said: list[str | None] = [None] * len(samples)
    for index, ids in zip(fitting, answer(loaded, [prompts[index] for index in fitting], greedy)):
        said[index] = loaded.encoder.decode(ids)
    return said
