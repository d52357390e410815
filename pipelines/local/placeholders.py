"""What KFP's placeholders stand for, and how its values look in a command: as KFP 2.17.0's driver and launcher do it.

Two programs look at a word, one after the other. The driver replaces the inputs, from what the task passes alone: a
component's defaults come later, so an input that is not passed is an error. It decides {"IfPresent": …}. The launcher
replaces what is left: outputs, `{{$}}`, and inputs that a constant of the task names. Each writes numbers its own way:
0.00001 is `1e-05` in a word that the driver filled in, and `0.00001` in one of the launcher's. A word that names an
output is the launcher's alone. What the two would leave as it stands, or replace in an order that nobody knows, is
refused. Pure: no I/O.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from zhllama.errors import InputError

Value = str | float | int | bool | list[Any] | dict[str, Any] | None
"""A parameter's value; None is null: an optional parameter of a pipeline that was not given."""

JOB = (
    "pipeline_job_uuid",
    "pipeline_job_name",
    "pipeline_job_resource_name",
    "pipeline_task_name",
    "pipeline_task_uuid",
)
"""Placeholders of the run and of the task. The driver knows each where it is an input's whole value, nowhere else."""

_PLACEHOLDER = re.compile(r"\{\{\$(.*?)\}\}")
_INPUT_PARAMETER = re.compile(r"\.inputs\.parameters\['([^']+)'\]")
_INPUT_ARTIFACT = re.compile(r"\.inputs\.artifacts\['([^']+)'\]\.(uri|path)")
_OUTPUT_PARAMETER = re.compile(r"\.outputs\.parameters\['([^']+)'\]\.output_file")
_OUTPUT_ARTIFACT = re.compile(r"\.outputs\.artifacts\['([^']+)'\]\.(uri|path)")
_OUTPUT_FILE = ".outputs.output_file"
_LAUNCHERS = "$.outputs"
"""What makes the driver leave a word alone."""
_IF_PRESENT = '{"IfPresent":'


def check_placeholders(text: str, inputs: set[str], parameters: set[str], artifacts: set[str], where: str) -> None:
    """InputError for a placeholder that names what there is not, or that would not be replaced there."""
    for inner in _PLACEHOLDER.findall(text):
        named = dict.fromkeys(_first(_INPUT_PARAMETER, inner) + _first(_INPUT_ARTIFACT, inner), inputs)
        named |= dict.fromkeys(_first(_OUTPUT_PARAMETER, inner), parameters)
        named |= dict.fromkeys(_first(_OUTPUT_ARTIFACT, inner), artifacts)
        for name, there in named.items():
            if name not in there:
                raise InputError(f"{where}: {{{{${inner}}}}} names {name}, which there is not")
        if inner.removeprefix(".") in JOB:
            raise InputError(
                f"{where}: KFP 2.17 leaves {{{{${inner}}}}} as it stands in {text!r}; pass it as an input's whole value"
            )
        if not named and inner not in (_OUTPUT_FILE, ""):
            raise InputError(f"{where}: it uses {{{{${inner}}}}}, which the local runner does not know")


def check_word(word: str, inputs: set[str], parameters: set[str], artifacts: set[str], where: str) -> None:
    """InputError for a word of a command that KFP 2.17 would not resolve."""
    if word.startswith('{"Concat": '):
        raise InputError(f'{where}: KFP 2.17 hands {{"Concat": …}} on as it stands; write the parts as one text')
    texts = [word]
    if _is_conditional(word):
        choice = _choice(word, where)
        texts = [text for key in ("Then", "Else") for text in _listed(choice.get(key), where)]
        if _LAUNCHERS in word:
            raise InputError(f'{where}: KFP 2.17 hands {{"IfPresent": …}} with an output in it on as it stands')
    for text in texts:
        check_placeholders(text, inputs, parameters, artifacts, where)


def asked_for(word: str) -> str:
    """The input whose presence a word looks at ({"IfPresent": …}), so that it may be left out; empty when none."""
    return str(_choice(word, "").get("InputName", "")) if _is_conditional(word) else ""


def check_once(text: Value, where: str) -> None:
    """InputError for a value of a user or a step that would itself be taken for a placeholder in a second round."""
    if isinstance(text, str) and (found := _PLACEHOLDER.search(text)):
        raise InputError(f"{where}: its text holds {found[0]}, which KFP would take for a placeholder; change the text")


def _first(pattern: re.Pattern[str], text: str) -> list[str]:
    found = pattern.fullmatch(text)
    return [found[1]] if found else []


# --- values as texts --------------------------------------------------------------------------------------------------


def text_of(value: Value) -> str:
    """A value as KFP's launcher writes it into a command: `true`, `3`, `0.00001`, JSON for lists and mappings."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        text = format(Decimal(repr(value)), "f")
        return text.rstrip("0").rstrip(".") if "." in text else text
    return value if isinstance(value, str) else json_of(value)


def driver_text_of(value: Value) -> str:
    """A value as KFP's driver writes it: as the launcher, but for fractions of many digits (`1e-05`, `1.5e+06`)."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        # a whole number that fits in 64 bits is written as one
        if value == int(value) and -(2**63) <= value < 2**63:
            return str(int(value))
        return _number(float(value), lambda exponent: -4 <= exponent < 6, 2)
    return text_of(value)


def _number(value: float, plain: Callable[[int], bool], width: int) -> str:
    """The shortest digits that are this number, without an exponent where `plain` says so of it."""
    sign, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
    assert isinstance(exponent, int)
    exponent += len(digits) - 1
    if plain(exponent):
        return text_of(value)
    first, rest = str(digits[0]), "".join(map(str, digits[1:]))
    mantissa = f"{'-' if sign else ''}{first}{'.' if rest else ''}{rest}"
    return f"{mantissa}e{'-' if exponent < 0 else '+'}{abs(exponent):0{width}}"


def json_of(value: Any) -> str:
    """JSON as Go writes it: compact, keys sorted, <, > and & escaped, numbers without a needless exponent or `.0`."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{json_of(str(key))}:{json_of(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(json_of(item) for item in value) + "]"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _number(float(value), lambda exponent: value == 0 or -6 <= exponent < 21, 1)
    text = json.dumps(value, ensure_ascii=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def value_of(text: str, kind: str, where: str) -> Value:
    """A value of a KFP type from a text (a step's output file, a command line). InputError when it does not fit."""
    try:
        if kind == "STRING":
            return text
        if kind == "NUMBER_INTEGER":
            return int(text)
        if kind == "NUMBER_DOUBLE" and math.isfinite(float(text)):
            return float(text)
        if kind == "BOOLEAN":
            return {"true": True, "false": False}[text.strip().lower()]
        found: Value = json.loads(text)
        if not is_of(found, kind):
            raise ValueError(f"not a {kind.lower()}")
        return found
    except (ValueError, KeyError) as error:
        words = {"NUMBER_INTEGER": "a whole number", "NUMBER_DOUBLE": "a number", "BOOLEAN": "true or false"}
        raise InputError(f"{where}: {text!r} where {words.get(kind, f'JSON ({kind.lower()})')} is needed") from error


def is_of(value: Value, kind: str) -> bool:
    """Whether KFP takes a value for one of this type (to its driver, a whole number is a number)."""
    if isinstance(value, bool):
        return kind == "BOOLEAN"
    if isinstance(value, int | float):
        return kind in ("NUMBER_INTEGER", "NUMBER_DOUBLE") and math.isfinite(value)
    kinds: tuple[tuple[type, str], ...] = ((str, "STRING"), (list, "LIST"), (dict, "STRUCT"))
    return any(isinstance(value, one) and kind == name for one, name in kinds)


# --- a step's command -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Surroundings:
    """What the placeholders of one step stand for."""

    parameters: Mapping[str, Value]
    """The inputs that the task passes, and no others. A constant may hold placeholders of its own."""
    artifacts: Mapping[str, str] = field(default_factory=dict)
    """Input artifact → its path (here the same as its URI)."""
    output_parameters: Mapping[str, str] = field(default_factory=dict)
    """Output parameter → the file it is written to."""
    output_artifacts: Mapping[str, str] = field(default_factory=dict)
    output_file: str = ""

    def executor_input(self) -> str:
        """`{{$}}`: everything at once, as JSON, in which the launcher replaces what a constant names."""
        values = {name: self.launcher(value) if isinstance(value, str) else value for name, value in self._there()}
        inputs: dict[str, Any] = {"parameterValues": values}
        inputs["artifacts"] = {name: {"artifacts": [{"uri": path}]} for name, path in self.artifacts.items()}
        outputs: dict[str, Any] = {"outputFile": self.output_file}
        outputs["parameters"] = {name: {"outputFile": path} for name, path in self.output_parameters.items()}
        outputs["artifacts"] = {name: {"artifacts": [{"uri": path}]} for name, path in self.output_artifacts.items()}
        return json.dumps({"inputs": inputs, "outputs": outputs}, ensure_ascii=False)

    def driver(self, text: str) -> str:
        """The driver's round: inputs alone."""

        def replace(match: re.Match[str]) -> str:
            found = _INPUT_PARAMETER.fullmatch(match[1])
            return driver_text_of(self._passed(found[1])) if found else match[0]

        return _PLACEHOLDER.sub(replace, text)

    def launcher(self, text: str) -> str:
        """The launcher's round: all that is left."""

        def replace(match: re.Match[str]) -> str:
            inner = match[1]
            if found := _INPUT_PARAMETER.fullmatch(inner):
                value = self._passed(found[1])
                check_once(value, found[1])
                return text_of(value)
            if found := _INPUT_ARTIFACT.fullmatch(inner):
                return self.artifacts[found[1]]
            if found := _OUTPUT_PARAMETER.fullmatch(inner):
                return self.output_parameters[found[1]]
            if found := _OUTPUT_ARTIFACT.fullmatch(inner):
                return self.output_artifacts[found[1]]
            return self.output_file if inner == _OUTPUT_FILE else self.executor_input()

        return _PLACEHOLDER.sub(replace, text)

    def _there(self) -> Iterator[tuple[str, Value]]:
        return ((name, value) for name, value in self.parameters.items() if value is not None)

    def _passed(self, name: str) -> Value:
        if name not in self.parameters:
            raise InputError(f'parameter "{name}" not found in executor input (the task passes no value for it)')
        return self.parameters[name]


def command(templates: Sequence[str], around: Surroundings) -> list[str]:
    """The words of a step's command. InputError for an input that is not passed, as KFP's driver has it."""
    return [around.launcher(word) for template in templates for word in _driven(template, around)]


def _driven(word: str, around: Surroundings) -> list[str]:
    if _LAUNCHERS in word:
        return [word]
    if not _is_conditional(word):
        return [around.driver(word)]
    choice = _choice(word, "a word of the command")
    # an artifact is never present to it, and neither is a null
    present = around.parameters.get(str(choice.get("InputName", ""))) is not None
    return [around.driver(text) for text in _listed(choice.get("Then" if present else "Else"), "a word of the command")]


def _is_conditional(word: str) -> bool:
    return word.strip().startswith(_IF_PRESENT)


def _choice(word: str, where: str) -> Mapping[str, Any]:
    try:
        found = json.loads(word)["IfPresent"]
    except ValueError as error:
        raise InputError(f"{where}: {word!r} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise InputError(f"{where}: {word!r} holds no mapping")
    return found


def _listed(texts: Any, where: str) -> Iterator[str]:
    """Then or Else: nothing, a text or texts."""
    for text in texts if isinstance(texts, list) else [texts] if texts is not None else []:
        if not isinstance(text, str):
            raise InputError(f"{where}: KFP 2.17 takes texts alone in an IfPresent, not {text!r}")
        yield text
