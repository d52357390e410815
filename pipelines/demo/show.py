"""What the demo prints at the end: the report's figures as tables, the proof of the merge, and sample answers."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.text import Text

from zhllama.stage.report_figures import figures_table


def show_report(report: Mapping[str, Any], merge_proof: tuple[str, str], console: Console) -> None:
    """`report` is evaluate's report.json; `merge_proof` the weights' digests of the two ways to merge."""
    models = report["models"]
    console.print()
    console.print(figures_table("What was learnt", models))
    console.print(_proof(*merge_proof))
    # the fixed prompts ask for knowledge, which no model of this size has: they are in the report
    samples = [sample for sample in report["samples"] if sample["kind"] != "prompt"]
    if samples:
        console.print(_answers(samples, [model["label"] for model in models]))


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
