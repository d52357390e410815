"""The report page of a training: its loss curve, as one HTML file without scripts, styles or fonts from elsewhere."""

import html
import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 860, 380
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 18, 44
_COLOURS = {"loss": "#2a6fdb", "eval_loss": "#d9480f"}
_NAMES = {"loss": "training loss", "eval_loss": "held-out loss"}

Points = list[tuple[float, float]]


def loss_report(title: str, lines: Sequence[Mapping[str, float]], summary: str) -> str:
    """The page for the lines of a metrics.jsonl; `summary` stands under the title."""
    series = {name: points for name in _NAMES if (points := _series(lines, name))}
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}: {html.escape(summary)}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: {WIDTH}px; margin: 2rem auto; padding: 0 1rem; color: #222; }}
h1 {{ font-size: 1.4rem; margin: 0; }} p {{ margin: .2rem 0 1.2rem; color: #555; }}
table {{ border-collapse: collapse; }} td {{ padding: .25rem 1.4rem .25rem 0; border-top: 1px solid #ddd; }}
td + td {{ text-align: right; font-variant-numeric: tabular-nums; padding-right: 0; }}
svg text {{ font-size: 12px; fill: #555; }}
</style></head><body>
<h1>{html.escape(title)}</h1><p>{html.escape(summary)}</p>
{curve(series)}
{_table(lines)}
</body></html>
"""


def _series(lines: Sequence[Mapping[str, float]], name: str) -> Points:
    return [(line["step"], line[name]) for line in lines if name in line and math.isfinite(line[name])]


def curve(series: Mapping[str, Points]) -> str:
    """An SVG of losses over steps. Empty text when there is nothing to draw."""
    points = [point for one in series.values() for point in one]
    if not points:
        return ""
    last_step = max(max(step for step, _ in points), 1)
    low, high = min(value for _, value in points), max(value for _, value in points)
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last_step

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / max(high - low, 1e-9)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="100%" role="img" aria-label="loss over steps">']
    for tick in ticks:
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#e5e5e5"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in _ticks(0, last_step, whole=True):
        parts += [f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:g}</text>']
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>')
    for number, (name, one) in enumerate(series.items()):
        colour = _COLOURS[name]
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in one)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if name == "eval_loss" or len(one) == 1:
            parts += [
                f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="3.5" fill="{colour}"/>' for step, value in one
            ]
        at = TOP + 8 + 20 * number
        parts.append(f'<rect x="{WIDTH - RIGHT - 150}" y="{at - 5}" width="22" height="3" fill="{colour}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT - 120}" y="{at}">{_NAMES[name]}</text>')
    return "\n".join([*parts, "</svg>"])


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Four to nine round numbers from at most `low` up to at least `high` (with `whole`: within, and whole)."""
    span = max(high - low, 1e-6)
    unit = 10.0 ** math.floor(math.log10(span / 4))
    step = next(unit * factor for factor in (1, 2, 5, 10) if span / (unit * factor) <= 7)
    if whole:
        step = max(1.0, step)
        return [step * number for number in range(math.floor(high / step) + 1)]
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(step * number, 10) for number in range(first, last + 1)]


def _table(lines: Sequence[Mapping[str, float]]) -> str:
    rows = []
    names = {
        "loss": ("last training loss", "{:.4f}"),
        "eval_loss": ("held-out loss", "{:.4f}"),
        "eval_perplexity": ("held-out perplexity", "{:,.4g}"),
        "eval_accuracy": ("next token right", "{:.2%}"),
        "tokens_per_second": ("tokens per second, last", "{:,.0f}"),
        "mfu": ("of the GPUs' peak (MFU), last", "{:.1%}"),
        "peak_memory_gb": ("peak memory of a process, GB", "{:.1f}"),
        "step": ("steps", "{:,.0f}"),
    }
    for name, (text, form) in names.items():
        found = [line[name] for line in lines if name in line]
        if found:
            rows.append(f"<tr><td>{text}</td><td>{form.format(found[-1])}</td></tr>")
    return f"<table>{''.join(rows)}</table>"
