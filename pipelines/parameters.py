"""The pipeline's parameters as people read them: `zhllama parameters`, and the table in docs/pipeline.md.

Both come from the signature and the docstring of the pipeline's function (adapt_llama.py), so that there is one place
where a parameter has its name, its default and its explanation.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import docstring_parser

from components.shared import storage
from components.shared.cli import nearest
from components.shared.errors import InputError
from pipelines import sizes
from pipelines.adapt_llama import course
from pipelines.placeholders import Value, text_of
from pipelines.sizes import Size

PAGE = Path(__file__).parents[1] / "docs" / "pipeline.md"
BEGIN, END = "<!-- parameters: written by `zhllama render all` -->", "<!-- end of the parameters -->"
GROUPS = {
    "store": "",
    "weights": "The model",
    "text": "What it learns from",
    "generate_items": "Instructions that a model writes",
    "run_pretraining": "Which stages run",
    "embeddings_steps": "How it is trained",
    "backend": "The training jobs",
    "control_cpu": "The steps",
    "node_selector": "Where pods run",
    "s3_secret": "Secrets, certificates, proxy",
    "serve_name": "The served model",
}
"""Where a group begins → its heading."""
KINDS = {
    "str": "text",
    "int": "whole number",
    "float": "number",
    "bool": "true or false",
    "dict": "JSON",
    "list": "JSON",
}


CHOICES = {
    "deploy": ("none", "kubernetes", "kserve"),
    "backend": ("pytorchjob", "trainjob", "local"),
    "lora_embedding_rows": ("auto", "all", "new"),
}
"""What steps take that run late: the last one, after days of training."""
ADDRESSES = (
    "weights", "expect", "model", "chinese_tokenizer", "extended_model", "adapters", "lora_adapter", "sft_adapter",
    "text", "text_validation", "english_text", "exams", "instructions", "instructions_validation",
    "import_instructions", "prompts", "evaluation", "generate_seeds", "generate_against", "generate_catalogue",
)  # fmt: skip


def check_choices(given: Mapping[str, str]) -> None:
    """InputError for a value that a step would refuse when its turn comes."""
    for name, choices in CHOICES.items():
        value = given.get(name, choices[0])
        if value not in choices:
            raise InputError(f"--set {name}: {value!r}{nearest(value, choices)}; use {' or '.join(choices)}")


def check_for_cluster(given: Mapping[str, str]) -> None:
    """InputError for what only works on one's own machine."""
    check_choices(given)
    if given.get("backend") == "local":
        raise InputError("--set backend=local: steps of a cluster train nothing themselves; use pytorchjob or trainjob")
    if not storage.is_s3(storage.normalise(given["store"])):
        raise InputError(f"--set store={given['store']}: steps of a cluster share S3 alone; give s3://bucket/prefix")
    for name in ADDRESSES:
        for part in given.get(name, "").split(","):
            if part.startswith(("/", "./", "../", "~", "file:")):
                raise InputError(f"--set {name}: {part} is of this machine, which no pod sees; copy it to S3 first")


@dataclass(frozen=True)
class Parameter:
    """One parameter, at one size."""

    name: str
    group: str
    kind: str
    default: Value
    """None: it has to be given."""
    note: str


def parameters(size: Size) -> list[Parameter]:
    """In the order of the pipeline's signature."""
    function = course(size)
    notes = {one.arg_name: one.description for one in docstring_parser.parse(function.__doc__ or "").params}
    found, group = [], ""
    for name, parameter in inspect.signature(function).parameters.items():
        group = GROUPS.get(name, group)
        default = None if parameter.default is inspect.Parameter.empty else parameter.default
        note = " ".join((notes.get(name) or "").split())
        found.append(Parameter(name, group, KINDS[parameter.annotation.__name__], default, note))
    return found


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
            yield from ("| parameter | | default | |", "|---|---|---|---|")
        default = _default(dict(zip(by_size, (other.default for other in at))))
        yield f"| `{one.name}` | {one.kind} | {default} | {one.note} |"


def _default(values: dict[str, Value]) -> str:
    """`8`, or where sizes differ `tiny: 2; 7b, 13b: 8`."""
    texts = {name: text_of(value) for name, value in values.items()}
    if None in values.values():
        return "(required)"
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
