"""What a run can be told, as people read it: `zhllama parameters`, and the table in docs/pipeline.md. Both come from
settings.py."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipelines import sizes
from pipelines.local.placeholders import text_of
from pipelines.setting import Value
from pipelines.settings import KINDS, SETTINGS
from pipelines.sizes import Size
from zhllama.errors import InputError

PAGE = Path(__file__).parents[1] / "docs" / "pipeline.md"
BEGIN, END = "<!-- parameters: written by `zhllama render all` -->", "<!-- end of the parameters -->"


@dataclass(frozen=True)
class Parameter:
    """One setting, at one size."""

    name: str
    group: str
    kind: str
    default: Value
    """None: it has none of its own, and the more general one counts."""
    when: str
    """compile: it is decided when the pipeline is compiled; run: each run may say it."""
    note: str

    @property
    def required(self) -> bool:
        return self.default is None and self.when == "run"


def parameters(size: Size) -> list[Parameter]:
    """In the order of the table."""
    return [
        Parameter(
            one.name, one.group, KINDS[one.kind], one.default(size), "compile" if one.compiled else "run", one.note
        )
        for one in SETTINGS.values()
    ]


def table() -> str:
    """Markdown: a table a group, with the sizes' defaults where they differ."""
    by_size = {name: parameters(sizes.load(name)) for name in sizes.names()}
    return "\n".join(_lines(by_size)) + "\n"


def _lines(by_size: dict[str, list[Parameter]]) -> Iterator[str]:
    group = None
    for at in zip(*by_size.values()):
        one = at[0]
        if one.group != group:
            group = one.group
            yield from (f"\n### {group}\n",) if group else ("",)
            yield from ("| setting | of | | default | |", "|---|---|---|---|---|")
        default = "(required)" if one.required else _default(dict(zip(by_size, (other.default for other in at))))
        yield f"| `{one.name}` | {one.when} | {one.kind} | {default} | {one.note.replace('|', '/')} |"


def _default(values: dict[str, Value]) -> str:
    """`8`, or where sizes differ `tiny: 2; 7b, 13b: 8`."""
    texts = {name: text_of(value) for name, value in values.items()}
    if len(set(texts.values())) == 1:
        return _code(texts["tiny"])
    names = {text: [name for name in texts if texts[name] == text] for text in dict.fromkeys(texts.values())}
    return "; ".join(f"{', '.join(names[text])}: {_code(text)}" for text in names)


def _code(text: str) -> str:
    return f"`{text}`" if text else "(empty)"


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
