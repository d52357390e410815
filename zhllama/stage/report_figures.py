"""An evaluation's figures as a table for a terminal: a line each figure, a column each model."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

UNMEASURED = "–"

_ROWS = (
    ("vocab size", ("pieces",), "{:,}"),
    ("tokens per Chinese character", ("tokens_per_character", "zh"), "{:.2f}"),
    ("tokens per English character", ("tokens_per_character", "en"), "{:.2f}"),
    ("bits per byte, Chinese", ("bits_per_byte", "zh"), "{:.3f}"),
    ("bits per byte, English", ("bits_per_byte", "en"), "{:.3f}"),
    ("next-token accuracy, Chinese", ("next_token_accuracy", "zh"), "{:.1%}"),
    ("next-token accuracy, English", ("next_token_accuracy", "en"), "{:.1%}"),
    ("accuracy", ("instructions", "accuracy"), "{:.1%}"),
    ("  ±", ("instructions", "margin"), "{:.1%}"),
    ("  chance", ("instructions", "chance"), "{:.1%}"),
    ("  questions", ("instructions", "items"), "{:,}"),
)


_FACTS = (
    ("facts right, {}", "right", "{:,}"),
    ("  of", "items", "{:,}"),
    ("  of the base's, kept", "kept_share", "{:.1%}"),
    ("  of so many", "known", "{:,}"),
    ("answers in {}", "in_language", "{:.1%}"),
    ("distinct answers, {}", "distinct", "{:.1%}"),
)
LANGUAGE_NAMES = {"zh": "Chinese", "en": "English"}


def figures_table(title: str, models: Sequence[Mapping[str, Any]]) -> "Table":
    """`models`: as evaluate's report.json has them. What no model has a figure for is left out."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    table.add_column("on held-out text")
    for model in models:
        table.add_column(str(model["label"]), justify="right")
    rows = [(name, form, [_at(model, path) for model in models]) for name, path, form in _ROWS]
    for index, exam in enumerate(models[-1].get("exams", ())):
        of_exam = [model["exams"][index] for model in models]
        rows.append((f"{exam['exam']}, {exam['shots']} shots", "{:.1%}", [one["accuracy"] for one in of_exam]))
        rows.append(("  chance", "{:.1%}", [one["chance"] for one in of_exam]))
    rows += fact_rows(models)
    rows += [(name, "{:.3f}", values) for name, values in task_rows(models)]
    for name, form, values in rows:
        if any(value is not None for value in values):
            table.add_row(name, *(UNMEASURED if value is None else form.format(value) for value in values))
    return table


def fact_rows(models: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, list[Any]]]:
    """(name, form, its value for each model) of what the models know and how they answer; none where nothing was
    asked."""
    rows = [
        (name.format(LANGUAGE_NAMES[language]), form, [_at(model, ("facts", language, key)) for model in models])
        for language in LANGUAGE_NAMES
        for name, key, form in _FACTS
    ]
    rows.append(("repetition", "{:.1%}", [model.get("repetition") for model in models]))
    return [row for row in rows if any(value is not None for value in row[2])]


def task_rows(models: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[float | None]]]:
    """(task and metric, its value for each model) of lm-evaluation-harness."""
    return [
        (f"{task}, {metric.removesuffix(',none')}", [_at(model, ("lm_eval", task, metric)) for model in models])
        for task, figures in models[-1].get("lm_eval", {}).items()
        for metric in figures
    ]


def _at(value: Any, path: Sequence[str]) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
