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


def figures_table(title: str, models: Sequence[Mapping[str, Any]]) -> "Table":
    """`models`: as evaluate's report.json has them. What no model has a figure for is left out."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    table.add_column("on held-out text")
    for model in models:
        table.add_column(str(model["label"]), justify="right")
    for name, path, form in _ROWS:
        _add(table, name, [_at(model, path) for model in models], form)
    for index, exam in enumerate(models[-1].get("exams", ())):
        name = f"{exam['exam']}, {exam['shots']} shots"
        _add(table, name, [model["exams"][index]["accuracy"] for model in models], "{:.1%}")
        _add(table, "  chance", [model["exams"][index]["chance"] for model in models], "{:.1%}")
    for task, figures in models[-1].get("lm_eval", {}).items():
        for metric in figures:
            name = f"{task}, {metric.removesuffix(',none')}"
            _add(table, name, [_at(model, ("lm_eval", task, metric)) for model in models], "{:.3f}")
    return table


def _add(table: "Table", name: str, values: Sequence[Any], form: str) -> None:
    if any(value is not None for value in values):
        table.add_row(name, *(UNMEASURED if value is None else form.format(value) for value in values))


def _at(value: Any, path: Sequence[str]) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
