"""`report.html`: one file, nothing loaded from anywhere, light and dark, wide and narrow.

Bars and text are HTML (they reflow on a phone), curves are SVG stretched to their box with lines of constant width.
This module turns report.json into what `page.html` draws: lengths in percent, points in a 100 × 100 box.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.evaluate.report import number, percent

LANGUAGE_NAMES = {"zh": "Chinese", "en": "English"}
MAX_POINTS = 240
"""Of a curve: longer ones are averaged down to it."""


@dataclass(frozen=True)
class Headline:
    """A figure to be seen first: what it is, the figure, and what it was."""

    title: str
    figure: str
    note: str


@dataclass(frozen=True)
class Bar:
    """One model's bar: length and marks in percent of the track, the text at its end."""

    label: str
    length: float
    text: str
    note: str
    model: bool
    margin: tuple[float, float] | None = None


@dataclass(frozen=True)
class Bars:
    """Bars under one heading, and where chance stands in percent of the track, if it has a place there."""

    title: str
    note: str
    bars: Sequence[Bar]
    chance: float | None = None


@dataclass(frozen=True)
class Line:
    """A curve: its name, SVG points in the 100 × 100 box, its last value and that value's height from below."""

    name: str
    points: str
    last: str
    height: float


@dataclass(frozen=True)
class Curves:
    """The curves of a training: ticks are (percent from the left or from below, text)."""

    title: str
    note: str
    lines: Sequence[Line]
    across: Sequence[tuple[float, str]]
    up: Sequence[tuple[float, str]]


def render(report: Mapping[str, Any], answer_tokens: int) -> str:
    """The page as text. answer_tokens: where the samples were cut."""
    import jinja2

    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(number=number, percent=percent)
    return environment.get_template("page.html").render(
        report=report,
        models=report["models"],
        headlines=headlines(report),
        bits=[found for language in LANGUAGE_NAMES if (found := bits_bars(report, language))],
        accuracy=accuracy_bars(report),
        exams=exam_bars(report),
        tasks=task_rows(report),
        curves=[curves(training) for training in report["trainings"] if len(training["points"]) > 1],
        languages=LANGUAGE_NAMES,
        answer_tokens=answer_tokens,
        ratio=ratio,
    )


def headlines(report: Mapping[str, Any]) -> list[Headline]:
    """What changed from the first model to the last, in up to four figures."""
    first, last = report["models"][0], report["models"][-1]
    compared = len(report["models"]) > 1
    found = []
    before, after = (model["tokens_per_character"]["zh"] for model in (first, last))
    if after is not None:
        title = "tokens per Chinese character"
        times, _, direction = ratio(before, after).partition(" ")
        if compared and direction in ("fewer", "more"):
            title = f"{direction} tokens for the same Chinese"
            found.append(Headline(title, times, f"{before:.2f} → {after:.2f} per character"))
        else:
            found.append(Headline(title, number(after), "the same as before" if compared else ""))
    for language, name in LANGUAGE_NAMES.items():
        before, after = (model["bits_per_byte"][language] for model in (first, last))
        if after is not None:
            note = f"from {before:.2f} ({change(before, after)})" if compared else "lower is better"
            found.append(Headline(f"bits per byte, {name}", number(after), note))
    scored, was = last["instructions"], first["instructions"]
    if scored and scored["accuracy"] is not None:
        note = f"chance {percent(scored['chance'], 0)}"
        if compared and was and was["accuracy"] is not None:
            note = f"from {percent(was['accuracy'], 0)}; {note}"
        found.append(Headline("right answers, held-out instructions", percent(scored["accuracy"], 0), note))
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
    if any(value is None for value in values):
        return None
    bars = []
    for index, (model, value) in enumerate(zip(models, values)):
        note = change(values[0], value) if index else ""
        bars.append(Bar(model["label"], 100 * value / max(values), number(value), note, index == len(models) - 1))
    text = report["texts"][language]
    note = f"{text['documents']:,} documents, {text['bytes'] / 1000:,.0f} kB"
    return Bars(LANGUAGE_NAMES[language], note, bars)


def share_bars(
    models: Sequence[Mapping[str, Any]], figures: Sequence[Mapping[str, Any]], title: str, note: str
) -> Bars:
    """The accuracy of each model with its margin, where it has one; figures: one of each model, in their order."""
    bars = []
    for index, (model, each) in enumerate(zip(models, figures)):
        value, margin = each["accuracy"], each.get("margin")
        span = None if margin is None else (100 * max(0.0, value - margin), 100 * min(1.0, value + margin))
        ends = "" if margin is None else f"±{100 * margin:.1f}"
        bars.append(Bar(model["label"], 100 * value, percent(value), ends, index == len(models) - 1, span))
    return Bars(title, note, bars, 100 * figures[-1]["chance"])


def accuracy_bars(report: Mapping[str, Any]) -> list[Bars]:
    """Accuracy over all items, and of each instruction where there are several."""
    models = report["models"]
    scored = [model["instructions"] for model in models]
    if any(each is None or each["accuracy"] is None for each in scored):
        return []

    found = [share_bars(models, scored, "All multiple-choice items", f"{scored[-1]['items']:,} items")]
    names = [group["instruction"] for group in scored[-1]["groups"]]
    for name in names if len(names) > 1 else []:
        groups = [[group for group in each["groups"] if group["instruction"] == name] for each in scored]
        if all(groups):
            last = groups[-1][0]
            choices = " / ".join(last["choices"])
            found.append(
                share_bars(models, [group[0] for group in groups], name, f"{last['items']:,} items; {choices}")
            )
    return found


def exam_bars(report: Mapping[str, Any]) -> list[Bars]:
    """Accuracy in each exam, for each number of examples before a question."""
    models = report["models"]
    found = []
    for index, exam in enumerate(models[-1]["exams"]):
        each = [model["exams"][index] for model in models]
        if any(one["accuracy"] is None for one in each):
            continue
        subjects = len(exam["subjects"])
        note = f"{exam['items']:,} questions, {subjects} {'subject' if subjects == 1 else 'subjects'}"
        found.append(share_bars(models, each, f"{exam['exam']}, {exam['shots']} shots", note))
    return found


def task_rows(report: Mapping[str, Any]) -> list[tuple[str, list[float | None]]]:
    """(task and metric, its value for each model) of lm-evaluation-harness."""
    models = report["models"]
    return [
        (f"{task}, {metric.removesuffix(',none')}", [model["lm_eval"].get(task, {}).get(metric) for model in models])
        for task, figures in models[-1]["lm_eval"].items()
        for metric in figures
    ]


def curves(training: Mapping[str, Any]) -> Curves:
    """Training and evaluation loss over the steps, of at least two points."""
    points = training["points"]
    series = {
        name: [(point["step"], point[key]) for point in points if point[key] is not None]
        for name, key in (("training", "loss"), ("held out", "eval_loss"))
    }
    series = {name: averaged(found, MAX_POINTS) for name, found in series.items() if found}
    steps = [step for found in series.values() for step, _ in found]
    losses = [loss for found in series.values() for _, loss in found]
    up = ticks(min(losses), max(losses), 4)
    low, high = min(up[0], min(losses)), max(up[-1], max(losses))
    first, last = min(steps), max(steps)
    width, height = max(last - first, 1e-9), max(high - low, 1e-9)
    lines = []
    for name, found in series.items():
        drawn = " ".join(f"{100 * (x - first) / width:.2f},{100 - 100 * (y - low) / height:.2f}" for x, y in found)
        lines.append(Line(name, drawn, number(found[-1][1]), 100 * (found[-1][1] - low) / height))
    across = [tick for tick in ticks(first, last, 4) if first <= tick <= last]
    return Curves(
        title=training["label"],
        note=f"{max(point['step'] for point in points):,} steps",
        lines=lines,
        across=[(100 * (tick - first) / width, f"{tick:,.0f}") for tick in across],
        up=[(100 * (tick - low) / height, f"{tick:g}") for tick in up],
    )


def averaged(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most `most` points: neighbours are averaged, and the first and the last stay what they are."""
    if len(points) <= most:
        return list(points)
    inner = points[1:-1]
    size = -(-len(inner) // (most - 2))
    groups = [inner[start : start + size] for start in range(0, len(inner), size)]
    means = [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
    return [points[0], *means, points[-1]]


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round values (1, 2, 5 × 10ⁿ apart), about `count` of them, from the last one below `low` to past `high`."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    begin, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(begin, end + 1)]
