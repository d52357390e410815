"""`report.html`: one file, nothing loaded from anywhere, light and dark, wide and narrow.

A stage's own template extends report.html beside this module and takes cards and curves from report_parts.html.
"""

from pathlib import Path
from typing import Any

from zhllama.stage.report_figures import UNMEASURED


def render(template: Path, **values: Any) -> str:
    """The page as text."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(number=number, percent=percent)
    return environment.get_template(template.name).render(**values)


def number(value: float | None, digits: int = 2) -> str:
    """`3.14`, or a dash for what was not measured."""
    return UNMEASURED if value is None else f"{value:,.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    """`73.4%`, or a dash for what was not measured."""
    return UNMEASURED if value is None else f"{value:.{digits}%}"
