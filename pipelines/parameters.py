"""What a run can be told, as people read it: the table in docs/pipeline.md. It comes from settings.py."""

import re
from pathlib import Path

from pipelines import sizes
from pipelines.local.placeholders import text_of
from pipelines.settings import SETTINGS, Setting
from zhllama.errors import InputError

PAGE = Path(__file__).parents[1] / "docs" / "pipeline.md"
BEGIN, END = "<!-- parameters: written by `zhllama render all` -->", "<!-- end of the parameters -->"


def shown_default(setting: Setting, size: sizes.Size) -> str:
    """A setting's default at a size, as `--set` would say it; (required) of what each run has to say."""
    default = setting.default(size)
    return "(required)" if default is None and not setting.compiled else text_of(default)


def table() -> str:
    """Markdown: a table a group, with the sizes' defaults where they differ."""
    loaded = [sizes.load(name) for name in sizes.names()]
    lines: list[str] = []
    group = None
    for one in SETTINGS.values():
        if one.group != group:
            group = one.group
            heading = f"\n### {group}\n" if group else ""
            lines += (heading, "| setting | of | | default | |", "|---|---|---|---|---|")
        # `8`, or where sizes differ `tiny: 2; the others: 8`
        names: dict[str, list[str]] = {}
        for size in loaded:
            names.setdefault(_code(shown_default(one, size)), []).append(size.name)
        most = max(names, key=lambda text: len(names[text]))
        if len(names[most]) > 2:
            names = {text: of for text, of in names.items() if text != most} | {most: ["the others"]}
        several = "; ".join(f"{', '.join(of)}: {text}" for text, of in names.items())
        default = several if len(names) > 1 else next(iter(names))
        when, kind = one.described()
        lines.append(f"| `{one.name}` | {when} | {kind} | {default} | {one.note.replace('|', '/')} |")
    return "".join(f"{line}\n" for line in lines)


def _code(text: str) -> str:
    return text if text == "(required)" else f"`{text}`" if text else "(empty)"


def page(old: str) -> str:
    """The page with the table as it is now. InputError for a page without its place."""
    place = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    if not place.search(old):
        raise InputError(f"{PAGE}: the place of the parameters is gone; write {BEGIN} and {END} there")
    return place.sub(lambda _: f"{BEGIN}\n{table()}\n{END}", old)


def write_page() -> Path:
    """Writes the table into docs/pipeline.md. InputError where it cannot be written."""
    try:
        PAGE.write_text(page(PAGE.read_text()))
    except OSError as error:
        raise InputError(f"{PAGE}: {error.strerror}; run it from a clone that can be written") from error
    return PAGE
