"""`report.html` of an evaluation: turns report.json into what `page.html` draws."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from zhllama.stage import report_figures, report_page
from zhllama.stage.report_figures import LANGUAGE_NAMES, fact_rows, task_rows
from zhllama.stage.report_page import curves, number, percent, ticks

MOST_LOST = 30
"""Facts that were lost which are shown."""


class Bars(NamedTuple):
    """The models' bars under one heading, and where chance stands in percent of the track, if it has a place there."""

    title: str
    note: str
    bars: Sequence[tuple[str, float, str, str, tuple[float, float] | None]]
    """Label; length in percent of the track; the text at its end, and the note on that; the marks of its margin."""
    chance: float | None = None


def render(report: Mapping[str, Any], answer_tokens: int) -> str:
    """The page as text. answer_tokens: where the samples were cut."""
    return report_page.render(
        Path(__file__).with_name("page.html"),
        report=report,
        models=report["models"],
        headlines=headlines(report),
        bits=list(filter(None, (bits_bars(report, language) for language in LANGUAGE_NAMES))),
        accuracy=accuracy_bars(report),
        exams=exam_bars(report),
        facts=[
            (name, [report_figures.UNMEASURED if value is None else form.format(value) for value in values])
            for name, form, values in fact_rows(report["models"])
        ],
        lost=lost_facts(report),
        front=front_chart(report),
        requirements=report.get("requirements", []),
        tasks=task_rows(report["models"]),
        curves=[curves(training) for training in report["trainings"] if len(training["points"]) > 1],
        languages=LANGUAGE_NAMES,
        answer_tokens=answer_tokens,
        ratio=ratio,
    )


def headlines(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What changed from the first model to the last: up to four figures, what each is, and what it was."""
    first, last = report["models"][0], report["models"][-1]
    compared = len(report["models"]) > 1
    found = []
    before, after = (model["tokens_per_character"]["zh"] for model in (first, last))
    if after is not None:
        title = "tokens per Chinese character"
        times, _, direction = ratio(before, after).partition(" ")
        if compared and direction in ("fewer", "more"):
            title = f"{direction} tokens for the same Chinese"
            found.append((times, title, f"{before:.2f} → {after:.2f} per character"))
        else:
            found.append((number(after), title, "the same as before" if compared else ""))
    for language, name in LANGUAGE_NAMES.items():
        before, after = (model["bits_per_byte"][language] for model in (first, last))
        if after is not None:
            note = f"from {before:.2f} ({change(before, after)})" if compared else "lower is better"
            found.append((number(after), f"bits per byte, {name}", note))
    scored, was = last["instructions"], first["instructions"]
    if scored and scored["accuracy"] is not None:
        note = f"chance {percent(scored['chance'], 0)}"
        if compared and was and was["accuracy"] is not None:
            note = f"from {percent(was['accuracy'], 0)}; {note}"
        found.append((percent(scored["accuracy"], 0), "accuracy, held-out instructions", note))
    return found


def ratio(before: float, after: float) -> str:
    """`1.94× fewer`, `1.10× more`, or `the same`."""
    text = f"{max(before / after, after / before):.2f}×"
    return "the same" if text == "1.00×" else f"{text} {'fewer' if after < before else 'more'}"


def change(before: float, after: float) -> str:
    """`−41%`, with a real minus sign."""
    text = f"{abs(after / before - 1):.0%}"
    return text if text == "0%" else f"{'−' if after < before else '+'}{text}"


def bits_bars(report: Mapping[str, Any], language: str) -> Bars | None:
    """Bits per byte of one language, longest bar 100%; None where it was not measured."""
    models = report["models"]
    values = [model["bits_per_byte"][language] for model in models]
    if None in values:
        return None
    bars = [
        (model["label"], 100 * value / max(values), number(value), change(values[0], value) if index else "", None)
        for index, (model, value) in enumerate(zip(models, values))
    ]
    text = report["texts"][language]
    return Bars(LANGUAGE_NAMES[language], f"{text['documents']:,} documents, {text['bytes'] / 1000:,.0f} kB", bars)


def share_bars(
    models: Sequence[Mapping[str, Any]], figures: Sequence[Mapping[str, Any]], title: str, note: str
) -> Bars:
    """The accuracy of each model with its margin, where it has one; figures: one of each model, in their order."""
    bars = []
    for model, each in zip(models, figures):
        value, margin = each["accuracy"], each.get("margin")
        span = None if margin is None else (100 * max(0.0, value - margin), 100 * min(1.0, value + margin))
        ends = "" if margin is None else f"±{100 * margin:.1f}"
        bars.append((model["label"], 100 * value, percent(value), ends, span))
    return Bars(title, note, bars, 100 * figures[-1]["chance"])


def accuracy_bars(report: Mapping[str, Any]) -> list[Bars]:
    """Accuracy over all items, and of each instruction where there are several."""
    models = report["models"]
    scored = [model["instructions"] for model in models]
    if any(each is None or each["accuracy"] is None for each in scored):
        return []
    found = [share_bars(models, scored, "All multiple-choice items", f"{scored[-1]['items']:,} items")]
    groups = scored[-1]["groups"]
    for last in groups if len(groups) > 1 else []:
        name, note = last["instruction"], f"{last['items']:,} items; {' / '.join(last['choices'])}"
        of_each = [group for each in scored for group in each["groups"] if group["instruction"] == name]
        if len(of_each) == len(models):
            found.append(share_bars(models, of_each, name, note))
    return found


def front_chart(report: Mapping[str, Any]) -> SimpleNamespace | None:
    """Chinese over English, a point for each weight: dots (percent from the left and from below, label, whether it is
    chosen), the line through them in a 100 × 100 box, ticks; None where it was not measured."""
    front = report.get("front")
    if front is None:
        return None
    base, model = report["models"][0]["label"], report["models"][-1]["label"]
    ends = {0.0: model, 1.0: base}
    places = [(point["bits_per_byte"]["en"], point["bits_per_byte"]["zh"]) for point in front["points"]]
    axes = []
    for values in zip(*places):
        at = ticks(min(values), max(values), 4)
        low, high = min(at[0], *values), max(at[-1], *values)
        axes.append((low, max(high - low, 1e-9), at))
    (left, width, across), (bottom, height, up) = axes
    dots = [
        (
            100 * (x - left) / width, 100 * (y - bottom) / height,
            ends.get(point["weight"], f"{point['weight']:.0%}"), point["weight"] == front["chosen"],
        )
        for point, (x, y) in zip(front["points"], places)
    ]  # fmt: skip
    return SimpleNamespace(
        dots=dots,
        line=" ".join(f"{x:.2f},{100 - y:.2f}" for x, y, *_ in dots),
        across=[(100 * (tick - left) / width, f"{tick:g}") for tick in across],
        up=[(100 * (tick - bottom) / height, f"{tick:g}") for tick in up],
        points=front["points"],
        chosen=front["chosen"],
        names=[ends.get(point["weight"], f"{point['weight']:.0%} of {base}") for point in front["points"]],
        base=base,
    )


def lost_facts(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Questions that the first model answers and the last one does not: so many of them."""
    first, last = report["models"][0]["label"], report["models"][-1]["label"]
    asked = report.get("questions", ())
    return [one for one in asked if first in one["right"] and last not in one["right"]][:MOST_LOST]


def exam_bars(report: Mapping[str, Any]) -> list[Bars]:
    """Accuracy in each exam, for each number of examples before a question."""
    models = report["models"]
    found = []
    for each in zip(*(model["exams"] for model in models)):
        if all(one["accuracy"] is not None for one in each):
            exam, subjects = each[-1], len(each[-1]["subjects"])
            note = f"{exam['items']:,} questions, {subjects} {'subject' if subjects == 1 else 'subjects'}"
            found.append(share_bars(models, each, f"{exam['exam']}, {exam['shots']} shots", note))
    return found
