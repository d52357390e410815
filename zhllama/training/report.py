"""The report page of a training: its loss curve and its last figures."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from zhllama.stage.report_page import curves, render

FIGURES = {
    "loss": ("last training loss", "{:.4f}"),
    "eval_loss": ("held-out loss", "{:.4f}"),
    "eval_perplexity": ("held-out perplexity", "{:,.4g}"),
    "eval_accuracy": ("next-token accuracy", "{:.2%}"),
    "tokens_per_second": ("tokens per second, last", "{:,.0f}"),
    "mfu": ("of the GPUs' peak (MFU), last", "{:.1%}"),
    "peak_memory_gb": ("peak memory of a process, GB", "{:.1f}"),
    "step": ("steps", "{:,.0f}"),
}
"""Field of a line of metrics.jsonl → what the page calls it, and how it is written."""


def loss_report(title: str, lines: Sequence[Mapping[str, float]], summary: str) -> str:
    """The page for the lines of a metrics.jsonl; `summary` stands under the title."""
    points = [
        {"step": line["step"], **{name: finite(line.get(name)) for name in ("loss", "eval_loss")}} for line in lines
    ]
    drawn = [point for point in points if point["loss"] is not None or point["eval_loss"] is not None]
    last = {name: value for line in lines for name, value in line.items()}
    return render(
        Path(__file__).with_name("loss_report.html"),
        title=title,
        summary=summary,
        curves=[curves({"label": "loss per token, in nats", "points": drawn})] if drawn else [],
        rows=[(text, form.format(last[name])) for name, (text, form) in FIGURES.items() if name in last],
    )


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
