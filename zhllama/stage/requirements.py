"""The gate: what has to hold of a model's figures, as `--require` says it.

    english_bits_per_byte<=1.03*base,accuracy>=0.85,facts_kept_en?>=0.95

Comma-separated: a figure, <=, >=, < or >, and a number, or a number times the same figure of another model: `base` (the
first baseline) or a name of --labels. A figure is called as in the report's metrics, or `english_X` and `chinese_X` for
`X_en` and `X_zh`. With `?` behind its name it counts where it is measured; without, a figure that is not measured is
refused, before a model is loaded wherever that can be known.
"""

import math
import operator
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from zhllama.errors import InputError
from zhllama.stage.command_line import nearest

COMPARISONS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
BASE = "base"
_FORM = re.compile(
    r"(?P<figure>[^<>=?*]+?)\s*(?P<optional>\?)?\s*(?P<comparison><=|>=|<|>)\s*"
    r"(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)\s*(?:\*\s*(?P<label>[^<>=?*]+?))?",
    re.ASCII,
)
TEXT_FIGURES = ("tokens_per_character", "bits_per_byte", "perplexity", "next_token_accuracy")
_FACTS = ("facts", "facts_kept", "answer_language", "distinct_answers")
SOURCES: Mapping[str, str] = {
    **{f"{name}_zh": "text" for name in TEXT_FIGURES[1:]}, "tokens_per_character": "text",
    **{f"{name}_en": "english" for name in TEXT_FIGURES},
    "accuracy": "choices", "chance": "choices", "items": "choices", "exact_match": "instructions",
    **{f"{name}_{language}": "questions" for name in _FACTS for language in ("zh", "en")}, "repetition": "questions",
}  # fmt: skip
"""Figure → what it is measured on; besides them there are those of exams and of tasks."""
OPTIONS = {
    "text": "give --text", "english": "give --english", "instructions": "give --instructions",
    "choices": "give --instructions that have few answers each", "questions": "give --questions 200",
}  # fmt: skip
"""What it is measured on → how to come by it."""


class Requirement(NamedTuple):
    text: str
    """As it was written."""
    figure: str
    """As the report's metrics call it."""
    optional: bool
    comparison: str
    number: float
    label: str
    """Of the model whose figure the number multiplies; "" for none."""


def parse_requirements(text: str, option: str = "--require") -> list[Requirement]:
    """InputError for what is none, by its own words."""
    found = []
    for part in text.split(",") if text.strip() else ():
        match = _FORM.fullmatch(part.strip())
        if match is None or not math.isfinite(number := float(match["number"])):
            raise InputError(
                f"{option} {part.strip() or repr(text)}: write figure<=number or figure<=number*base (<=, >=, < or >), "
                "comma-separated, as english_bits_per_byte<=1.03*base,accuracy>=0.85"
            )
        figure, optional = canonical(match["figure"]), bool(match["optional"])
        found.append(
            Requirement(part.strip(), figure, optional, match["comparison"], number, (match["label"] or "").strip())
        )
    return found


def canonical(name: str) -> str:
    """`english_bits_per_byte` → `bits_per_byte_en`: the name in the report's metrics."""
    for language, code in (("english_", "en"), ("chinese_", "zh")):
        if name.startswith(language) and (other := f"{name.removeprefix(language)}_{code}") != name:
            name = other if other in SOURCES or other == "tokens_per_character_zh" else name
    return name.removesuffix("_zh") if name == "tokens_per_character_zh" else name


def check_requirements(
    requirements: Iterable[Requirement],
    labels: Sequence[str],
    measured: Collection[str],
    exams: Collection[str] = (),
    tasks: Collection[str] = (),
    option: str = "--require",
    mends: Mapping[str, str] = OPTIONS,
) -> None:
    """InputError, before anything is measured, for an unknown figure or label, and for a figure that will not be.
    labels: of the baselines, then of the model. measured: the sources (of OPTIONS) that there are. exams: the
    figures of exams, or [""] where they are not known yet; tasks: of the harness, whose figures are not known yet."""
    for one in requirements:
        where = f"{option} {one.text}"
        source = SOURCES.get(one.figure)
        later = re.fullmatch(r".+_\d+_shots", one.figure) if "" in exams else one.figure in exams
        if source is None and not later and not any(one.figure.startswith(f"{task}_") for task in tasks):
            known = [
                *SOURCES,
                *(f"{code}_{name}" for name in (*TEXT_FIGURES, *_FACTS) for code in ("english", "chinese")),
                *exams,
            ]
            raise InputError(
                f"{where}: there is no figure {one.figure}{nearest(one.figure, known)}; they are called as in the "
                "report's metrics (docs/evaluation.md)"
            )
        if source and source not in measured and not one.optional:
            raise _unmeasured(one, mends[source], option)
        if one.label:
            _of_label(one, labels, option)
        if one.figure.startswith("facts_kept") and len(labels) == 1 and not one.optional:
            raise _unmeasured(one, "give a --baseline whose facts may be kept", option)


def _of_label(one: Requirement, labels: Sequence[str], option: str) -> int | None:
    """Which of the models it is compared with; None where it counts only if that model is there."""
    where = f"{option} {one.text}"
    if one.label == labels[-1]:
        raise InputError(f"{where}: {one.label} is the model itself; name one that it is compared with")
    at = labels[:-1].index(one.label) if one.label in labels[:-1] else None
    if one.label == BASE and at:
        raise InputError(f"{where}: base is the first baseline, {labels[0]}, and another one is called so; rename it")
    if one.label == BASE and len(labels) > 1:
        return 0
    if at is None and not (one.optional and one.label == BASE):
        there = ", ".join(dict.fromkeys((BASE, *labels[:-1]))) if len(labels) > 1 else "none: there is no --baseline"
        raise InputError(f"{where}: there is no model {one.label}{nearest(one.label, labels[:-1])}; there is {there}")
    return at


def judge(
    requirements: Iterable[Requirement], labels: Sequence[str], figures: Sequence[Mapping[str, float]]
) -> list[dict[str, Any]]:
    """Each requirement as report.json has it. labels, figures: of the baselines, then of the model; the figures as
    metrics have them. InputError for one that was not measured and had to be."""
    found = []
    for one in requirements:
        at = _of_label(one, labels, "--require") if one.label else None
        value = figures[-1].get(one.figure)
        of = None if at is None else figures[at].get(one.figure)
        bound = one.number if not one.label else None if of is None else one.number * of
        if (value is None or bound is None) and not one.optional:
            raise _unmeasured(one, "it has no figure in the report" + (f" of {one.label}" if value is not None else ""))
        holds = None if value is None or bound is None else COMPARISONS[one.comparison](value, bound)
        found.append({
            "requirement": one.text, "figure": one.figure, "value": value, "comparison": one.comparison,
            "bound": bound, "number": one.number, "label": None if at is None else labels[at], "holds": holds,
        })  # fmt: skip
    return found


def _unmeasured(one: Requirement, why: str, option: str = "--require") -> InputError:
    name = re.split("[<>?]", one.text)[0].strip()
    return InputError(
        f"{option} {one.text}: {name} is not measured here; {why}, or write {name}? where it may be missing"
    )


def missed(verdicts: Iterable[Mapping[str, Any]]) -> str:
    """Which figures missed, and by how much; "" where everything holds that was measured."""
    return "; ".join(_missed(one) for one in verdicts if one["holds"] is False)


def _missed(one: Mapping[str, Any]) -> str:
    value, bound = one["value"], one["bound"]
    gap = abs(value - bound)
    # as many digits as tell the two apart
    digits = next((digits for digits in range(4, 18) if f"{value:.{digits}g}" != f"{bound:.{digits}g}"), 4)
    share = f" ({gap / abs(bound):.1%})" if bound else ""
    of = (
        f" ({one['number']:g} × {bound / one['number']:.4g} of {one['label']})"
        if one["label"] and one["number"]
        else ""
    )
    over = "above" if "<" in one["comparison"] else "below"
    by = f"{gap:.2g}{share} {over}" if gap else f"not {'below' if '<' in one['comparison'] else 'above'}"
    return f"{one['requirement']}: it is {value:.{digits}g}, {by} {bound:.{digits}g}{of}"
