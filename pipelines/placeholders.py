"""What KFP's placeholders stand for, and how its values look in a command: as its driver and launcher do it.

`{{$.inputs.parameters['x']}}`, `{{$.inputs.artifacts['x'].path}}`, `{{$.outputs.…}}`, `{{$.pipeline_job_uuid}}`,
`{{$}}`, and the structures that the SDK writes as JSON into a word: {"Concat": […]}, {"IfPresent": {…}}. Numbers come
without exponent, booleans as true / false. Pure: no I/O.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from components.shared.errors import InputError

Value = str | float | int | bool | list[Any] | dict[str, Any] | None
"""A parameter's value; None is an optional one that was not given."""

JOB = (
    "pipeline_job_uuid",
    "pipeline_job_name",
    "pipeline_job_resource_name",
    "pipeline_task_name",
    "pipeline_task_uuid",
)
"""Placeholders of the run and of the task that the runner gives."""

_PLACEHOLDER = re.compile(r"\{\{\$(.*?)\}\}")
_INPUT_PARAMETER = re.compile(r"\.inputs\.parameters\['([^']+)'\]")
_INPUT_ARTIFACT = re.compile(r"\.inputs\.artifacts\['([^']+)'\]\.(uri|path)")
_OUTPUT_PARAMETER = re.compile(r"\.outputs\.parameters\['([^']+)'\]\.output_file")
_OUTPUT_ARTIFACT = re.compile(r"\.outputs\.artifacts\['([^']+)'\]\.(uri|path)")
_OUTPUT_FILE = ".outputs.output_file"


def check_placeholders(text: str, inputs: set[str], parameters: set[str], artifacts: set[str], where: str) -> None:
    for inner in _PLACEHOLDER.findall(text):
        named = dict.fromkeys(_first(_INPUT_PARAMETER, inner) + _first(_INPUT_ARTIFACT, inner), inputs)
        named |= dict.fromkeys(_first(_OUTPUT_PARAMETER, inner), parameters)
        named |= dict.fromkeys(_first(_OUTPUT_ARTIFACT, inner), artifacts)
        for name, there in named.items():
            if name not in there:
                raise InputError(f"{where}: {{{{${inner}}}}} names {name}, which there is not")
        known = (*(f".{name}" for name in JOB), _OUTPUT_FILE, "")
        if not named and inner not in known:
            raise InputError(f"{where}: it uses {{{{${inner}}}}}, which the local runner does not know")


def _first(pattern: re.Pattern[str], text: str) -> list[str]:
    found = pattern.fullmatch(text)
    return [found[1]] if found else []


def text_of(value: Value) -> str:
    """A value as KFP's launcher writes it into a command: `true`, `3`, `0.00001`, JSON for lists and mappings."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        text = format(Decimal(repr(value)), "f")
        return text.rstrip("0").rstrip(".") if "." in text else text
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def value_of(text: str, kind: str, where: str) -> Value:
    """A value of a KFP type from a text (a step's output file, a command line). InputError when it does not fit."""
    try:
        if kind == "STRING":
            return text
        if kind == "NUMBER_INTEGER":
            return int(text)
        if kind == "NUMBER_DOUBLE":
            return float(text)
        if kind == "BOOLEAN":
            return {"true": True, "false": False}[text.strip().lower()]
        return _of_kind(json.loads(text), kind)
    except (ValueError, KeyError) as error:
        words = {"NUMBER_INTEGER": "a whole number", "NUMBER_DOUBLE": "a number", "BOOLEAN": "true or false"}
        raise InputError(f"{where}: {text!r} where {words.get(kind, f'JSON ({kind.lower()})')} is needed") from error


def _of_kind(value: Any, kind: str) -> Value:
    wanted = {"LIST": list, "STRUCT": dict}.get(kind)
    if wanted is not None and not isinstance(value, wanted):
        raise ValueError(f"not a {kind.lower()}")
    found: Value = value
    return found


@dataclass(frozen=True)
class Surroundings:
    """What the placeholders of one step stand for."""

    parameters: Mapping[str, Value]
    artifacts: Mapping[str, str] = field(default_factory=dict)
    """Input artifact → its path (here the same as its URI)."""
    output_parameters: Mapping[str, str] = field(default_factory=dict)
    """Output parameter → the file it is written to."""
    output_artifacts: Mapping[str, str] = field(default_factory=dict)
    output_file: str = ""
    job: Mapping[str, str] = field(default_factory=dict)
    """pipeline_job_uuid and its like."""

    def executor_input(self) -> str:
        """`{{$}}`: everything at once, as JSON."""
        inputs: dict[str, Any] = {"parameterValues": {k: v for k, v in self.parameters.items() if v is not None}}
        inputs["artifacts"] = {name: {"artifacts": [{"uri": path}]} for name, path in self.artifacts.items()}
        outputs: dict[str, Any] = {"outputFile": self.output_file}
        outputs["parameters"] = {name: {"outputFile": path} for name, path in self.output_parameters.items()}
        outputs["artifacts"] = {name: {"artifacts": [{"uri": path}]} for name, path in self.output_artifacts.items()}
        return json.dumps({"inputs": inputs, "outputs": outputs}, ensure_ascii=False)

    def replace(self, match: re.Match[str]) -> str:
        inner = match[1]
        if found := _INPUT_PARAMETER.fullmatch(inner):
            return text_of(self.parameters[found[1]])
        if found := _INPUT_ARTIFACT.fullmatch(inner):
            return self.artifacts[found[1]]
        if found := _OUTPUT_PARAMETER.fullmatch(inner):
            return self.output_parameters[found[1]]
        if found := _OUTPUT_ARTIFACT.fullmatch(inner):
            return self.output_artifacts[found[1]]
        if inner == _OUTPUT_FILE:
            return self.output_file
        if inner == "":
            return self.executor_input()
        return self.job[inner.removeprefix(".")]


def fill(text: str, around: Surroundings) -> str:
    """A text with its placeholders replaced, once: what a user's value looks like is not looked at again."""
    return _PLACEHOLDER.sub(around.replace, text)


def command(templates: Sequence[str], around: Surroundings) -> list[str]:
    """The words of a step's command, placeholders, Concat and IfPresent resolved."""
    return [word for template in templates for word in _words(structure_of(template), around)]


def structure_of(word: str) -> Any:
    """A word, or the structure that the SDK writes as JSON into one: {"Concat": […]}, {"IfPresent": {…}}."""
    if word.startswith(('{"Concat": ', '{"IfPresent": ')):
        return json.loads(word)
    return word


def texts_in(structure: Any) -> Iterator[str]:
    if isinstance(structure, str):
        yield structure
    elif isinstance(structure, list):
        for item in structure:
            yield from texts_in(item)
    elif "Concat" in structure:
        yield from texts_in(structure["Concat"])
    else:
        for key in ("Then", "Else"):
            yield from texts_in(structure["IfPresent"].get(key, []))


def _words(structure: Any, around: Surroundings) -> list[str]:
    if isinstance(structure, str):
        return [fill(structure, around)]
    if isinstance(structure, list):
        return [word for item in structure for word in _words(item, around)]
    if "Concat" in structure:
        return ["".join(word for item in structure["Concat"] for word in _words(item, around))]
    choice = structure["IfPresent"]
    present = around.parameters.get(choice["InputName"]) is not None or choice["InputName"] in around.artifacts
    return _words(choice["Then"] if present else choice.get("Else") or [], around)
