"""`report.html`: one file, nothing loaded from anywhere, light and dark, wide and narrow.

A stage's own template extends report.html beside this module and takes cards and curves from report_parts.html. A curve
is the loss of a training over its steps: SVG points in a 100 × 100 box, round ticks.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from zhllama.stage.report_figures import UNMEASURED

MAX_POINTS = 240
"""Of a curve: longer ones are averaged down to it."""


def render(template: Path, **values: Any) -> str:
    import jinja2

    loader = jinja2.FileSystemLoader([template.parent, Path(__file__).parent])
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(number=number, percent=percent)
    return environment.get_template(template.name).render(**values)


def number(value: float | None, digits: int = 2) -> str:
    """`3.14`, or a dash for what was not measured."""
    return UNMEASURED if value is None else f"{value:,.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    """`73.4%`, or a dash for what was not measured."""
    return UNMEASURED if value is None else f"{value:.{digits}%}"


def curves(training: Mapping[str, Any]) -> SimpleNamespace:
    """Training and evaluation loss over the steps: title, note, lines (each a name, SVG points in the box, the last
    value), and the ticks `across` and `up`: (percent from the left or from below, text)."""
    points = training["points"]
    series = {
        name: averaged(found, MAX_POINTS)
        for name, key in (("training", "loss"), ("held out", "eval_loss"))
        if (found := [(point["step"], point[key]) for point in points if point[key] is not None])
    }
    steps, losses = zip(*(point for found in series.values() for point in found))
    up = ticks(min(losses), max(losses), 4)
    low, high = min(up[0], min(losses)), max(up[-1], max(losses))
    first, last = min(steps), max(steps)
    width, height = max(last - first, 1e-9), max(high - low, 1e-9)
    lines = []
    for name, found in series.items():
        drawn = [f"{100 * (x - first) / width:.2f},{100 - 100 * (y - low) / height:.2f}" for x, y in found]
        # a point alone is a line to itself, which is drawn as a dot
        drawn = drawn * 2 if len(drawn) == 1 else drawn
        lines.append(SimpleNamespace(name=name, points=" ".join(drawn), last=number(found[-1][1])))
    across = [tick for tick in ticks(first, last, 4) if first <= tick <= last]
    return SimpleNamespace(
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
