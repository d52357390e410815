"""What the demo prints at the end: the report's figures as tables, the proof of the merge, and sample answers."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text


def show_report(report: Mapping[str, Any], merge_proof: tuple[str, str], console: Console) -> None:
    """`report` is evaluate's report.json; `merge_proof` the weights' digests of the two ways to merge."""
    models = report["models"]
    console.print()
    console.print(_figures(models))
    console.print(_proof(*merge_proof))
    if report["samples"]:
        console.print(_answers(report["samples"], [model["label"] for model in models]))


def _figures(models: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="What was learnt", title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    table.add_column("on held-out text")
    for model in models:
        table.add_column(str(model["label"]), justify="right")
    rows = (
        ("tokens per Chinese character", ("tokens_per_character", "zh"), "{:.2f}"),
        ("tokens per English character", ("tokens_per_character", "en"), "{:.2f}"),
        ("bits per byte, Chinese", ("bits_per_byte", "zh"), "{:.3f}"),
        ("bits per byte, English", ("bits_per_byte", "en"), "{:.3f}"),
        ("right answers", ("instructions", "accuracy"), "{:.1%}"),
        ("  chance", ("instructions", "chance"), "{:.1%}"),
        ("  questions", ("instructions", "items"), "{:,}"),
    )
    for title, path, form in rows:
        values = [_at(model, path) for model in models]
        if any(value is not None for value in values):
            table.add_row(title, *("–" if value is None else form.format(value) for value in values))
    return table


def _at(value: Any, path: Sequence[str]) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _proof(one_by_one: str, in_one_call: str) -> Text:
    if one_by_one == in_one_call:
        return Text(f"Merged one by one and in one call: the same weights, bit for bit ({one_by_one[:12]}).", "green")
    return Text(
        f"Merged one by one ({one_by_one[:12]}) and in one call ({in_one_call[:12]}): DIFFERENT weights.", "red"
    )


def _answers(samples: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> Group:
    panels = []
    for sample in samples:
        body = Text()
        for label in (labels[0], labels[-1]):
            body.append(f"{label}: ", "bold")
            body.append(f"{' '.join(sample['answers'].get(label, '–').split()) or '(nothing)'}\n")
        body.rstrip()
        panels.append(Panel(body, title=Text(sample["prompt"].replace("\n", " · ")), title_align="left"))
    return Group(*panels)
