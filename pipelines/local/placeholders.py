"""What KFP's placeholders stand for, and how its values look in a command: as KFP 2.17.0's driver and launcher do it.

The driver replaces the inputs, from what the task passes alone (not passed: an error), and decides {"IfPresent": …}.
The launcher replaces what is left: outputs, `{{$}}`, and inputs that a constant of the task names. 0.00001 is `1e-05`
in a word of the driver's, `0.00001` in one of the launcher's, whose alone a word is that names an output. What the two
would leave as it stands, or replace in an order that nobody knows, is refused. Pure: no I/O.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from zhllama.artifacts.json_file import STRICT
from zhllama.artifacts.json_file import value_of as json_value
from zhllama.errors import InputError

Value = str | float | int | bool | list[Any] | dict[str, Any] | None
"""A parameter's value; None is null: an optional parameter of a pipeline that was not given."""

JOB = tuple(f"pipeline_{name}" for name in ("job_uuid", "job_name", "job_resource_name", "task_name", "task_uuid"))
"""Placeholders of the run and of the task. The driver knows each where it is an input's whole value, nowhere else."""

_PLACEHOLDER = re.compile(r"\{\{\$(.{0,300}?)\}\}")
"""Of a length, since looking for the end of each of many that have none takes for ever; no name has so many bytes."""
_NAMED = re.compile(r"\.((?:inputs|outputs)\.(?:parameters|artifacts))\['([^']+)'\](?:\.(\w+))?")
_ENDS = {
    "inputs.parameters": (None,),
    "inputs.artifacts": ("uri", "path"),
    "outputs.parameters": ("output_file",),
    "outputs.artifacts": ("uri", "path"),
}
_OUTPUT_FILE = ".outputs.output_file"
MOST = 2**24
"""Characters in all that a step's placeholders may become: no command takes a tenth of it."""
_LAUNCHERS = "$.outputs"
"""What makes the driver leave a word alone."""


def _named(inner: str) -> tuple[str, str]:
    """What a placeholder names: ("inputs.parameters", "rate"), …; two empty texts when it is of another form."""
    found = _NAMED.fullmatch(inner)
    return (found[1], found[2]) if found and found[3] in _ENDS[found[1]] else ("", "")


def check_placeholders(text: str, inputs: set[str], parameters: set[str], artifacts: set[str], where: str) -> None:
    """InputError for a placeholder that names what there is not, or that would not be replaced there."""
    outputs = {"outputs.parameters": parameters, "outputs.artifacts": artifacts}
    for inner in _PLACEHOLDER.findall(text):
        kind, name = _named(inner)
        if name and name not in outputs.get(kind, inputs):
            raise InputError(f"{where}: {{{{${inner}}}}} names {name}, which there is not")
        if inner.removeprefix(".") in JOB:
            raise InputError(
                f"{where}: KFP 2.17 leaves {{{{${inner}}}}} as it stands in {text!r}; pass it as an input's whole value"
            )
        if not name and inner not in (_OUTPUT_FILE, ""):
            raise InputError(f"{where}: it uses {{{{${inner}}}}}, which the local runner does not know")


def check_word(word: str, inputs: set[str], parameters: set[str], artifacts: set[str], where: str) -> None:
    """InputError for a word of a command that KFP 2.17 would not resolve."""
    if word.startswith('{"Concat": '):
        raise InputError(f'{where}: KFP 2.17 hands {{"Concat": …}} on as it stands; write the parts as one text')
    texts = [word]
    if choice := choice_of(word, where):
        texts = [*_texts(choice.get("Then"), where), *_texts(choice.get("Else"), where)]
        if _LAUNCHERS in word:
            raise InputError(f'{where}: KFP 2.17 hands {{"IfPresent": …}} with an output in it on as it stands')
    for text in texts:
        check_placeholders(text, inputs, parameters, artifacts, where)


def choice_of(word: str, where: str) -> Mapping[str, Any]:
    """What stands in {"IfPresent": …}: InputName, the input that may be left out, Then and Else; else empty."""
    if not word.strip().startswith('{"IfPresent":'):
        return {}
    try:
        found = json.loads(word)["IfPresent"]
    except (ValueError, RecursionError, LookupError, TypeError) as error:
        raise InputError(f"{where}: {word!r} is not JSON ({error})") from error
    if not isinstance(found, dict) or not found:
        raise InputError(f"{where}: {word!r} holds no mapping")
    return found


def _texts(given: Any, where: str) -> list[str]:
    """Then or Else: nothing, a text or texts."""
    texts = given if isinstance(given, list) else [given] if given is not None else []
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"{where}: KFP 2.17 takes texts alone in an IfPresent, not {text!r}")
    return texts


def check_once(text: Value, where: str) -> None:
    """InputError for a value of a user or a step that would itself be taken for a placeholder in a second round."""
    if isinstance(text, str) and (found := _PLACEHOLDER.search(text)):
        raise InputError(f"{where}: its text holds {found[0]}, which KFP would take for a placeholder; change the text")


# --- values as texts --------------------------------------------------------------------------------------------------


def text_of(value: Value) -> str:
    """A value as KFP's launcher writes it into a command: `true`, `3`, `0.00001`, JSON for lists and mappings."""
    if value is None:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        text = format(Decimal(repr(value)), "f")
        return text.rstrip("0").rstrip(".") if "." in text else text
    return value if isinstance(value, str) else json_of(value)


def driver_text_of(value: Value) -> str:
    """A value as KFP's driver writes it: as the launcher, but for fractions of many digits (`1e-05`, `1.5e+06`)."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        # a whole number that fits in 64 bits is written as one
        whole = value == int(value) and -(2**63) <= value < 2**63
        return str(int(value)) if whole else _number(value, -4, 6, 2)
    return text_of(value)


def _number(value: float, low: int, high: int, width: int) -> str:
    """The shortest digits that are this number, without an exponent from 10**low up to 10**high."""
    mantissa, exponent = format(Decimal(repr(float(value))).normalize(), "e").split("e")
    if value == 0 or low <= int(exponent) < high:
        return text_of(float(value))
    return f"{mantissa}e{exponent[0]}{exponent[1:]:0>{width}}"


def json_of(value: Any) -> str:
    """JSON as Go writes it: compact, keys sorted, <, > and & escaped, numbers without a needless exponent or `.0`."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{json_of(str(key))}:{json_of(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(json_of(item) for item in value) + "]"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _number(value, -6, 21, 1)
    text = json.dumps(value, ensure_ascii=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def value_of(text: str, kind: str, where: str) -> Value:
    """A value of a KFP type from a text (a step's output file, a command line). InputError when it does not fit."""
    readers: dict[str, Callable[[str], Value]] = {"STRING": str, "NUMBER_INTEGER": int, "NUMBER_DOUBLE": float}
    readers["BOOLEAN"] = lambda told: {"true": True, "false": False}[told.strip().lower()]
    words = {"NUMBER_INTEGER": "a whole number", "NUMBER_DOUBLE": "a number", "BOOLEAN": "true or false"}
    with suppress(ValueError, KeyError, OverflowError):
        found: Value = readers.get(kind, lambda told: json_value(told, STRICT))(text)
        if is_of(found, kind):
            return found
    raise InputError(f"{where}: {text!r} where {words.get(kind, f'JSON ({kind.lower()})')} is needed")


def is_of(value: Value, kind: str) -> bool:
    """Whether KFP takes a value for one of this type (to its driver, a whole number is a number)."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return kind in ("NUMBER_INTEGER", "NUMBER_DOUBLE") and math.isfinite(value)
    kinds: dict[type, str] = {bool: "BOOLEAN", str: "STRING", list: "LIST", dict: "STRUCT"}
    return kinds.get(type(value)) == kind


# --- a step's command -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Surroundings:
    """What the placeholders of one step stand for."""

    parameters: Mapping[str, Value]
    """The inputs that the task passes, and no others. A constant may hold placeholders of its own."""
    artifacts: Mapping[str, str] = field(default_factory=dict)
    """Input artifact → its path (here the same as its URI); so with the outputs below."""
    output_parameters: Mapping[str, str] = field(default_factory=dict)
    output_artifacts: Mapping[str, str] = field(default_factory=dict)
    output_file: str = ""
    _room: list[int] = field(default_factory=lambda: [MOST], init=False, repr=False, compare=False)

    def _put(self, text: str) -> str:
        """What a placeholder becomes. InputError where all of them become more than any command takes."""
        self._room[0] -= len(text)
        if self._room[0] < 0:
            raise InputError(f"its placeholders become more than {MOST:,} characters")
        return text

    def executor_input(self) -> str:
        """`{{$}}`: everything at once, as JSON, in which the launcher replaces what a constant names."""
        given = {name: value for name, value in self.parameters.items() if value is not None}
        values = {name: self.launcher(value) if isinstance(value, str) else value for name, value in given.items()}
        artifacts, made = (
            {name: {"artifacts": [{"uri": path}]} for name, path in paths.items()}
            for paths in (self.artifacts, self.output_artifacts)
        )
        files = {name: {"outputFile": path} for name, path in self.output_parameters.items()}
        inputs = {"parameterValues": values, "artifacts": artifacts}
        outputs = {"outputFile": self.output_file, "parameters": files, "artifacts": made}
        return json.dumps({"inputs": inputs, "outputs": outputs}, ensure_ascii=False)

    def driver(self, text: str) -> str:
        """The driver's round: inputs alone."""

        def replace(match: re.Match[str]) -> str:
            kind, name = _named(match[1])
            return self._put(driver_text_of(self._passed(name))) if kind == "inputs.parameters" else match[0]

        return _PLACEHOLDER.sub(replace, text)

    def launcher(self, text: str) -> str:
        """The launcher's round: all that is left."""
        paths = {
            "inputs.artifacts": self.artifacts,
            "outputs.parameters": self.output_parameters,
            "outputs.artifacts": self.output_artifacts,
        }

        def replaced(match: re.Match[str]) -> str:
            kind, name = _named(match[1])
            if kind == "inputs.parameters":
                value = self._passed(name)
                check_once(value, name)
                return text_of(value)
            if kind:
                return paths[kind][name]
            return self.output_file if match[1] == _OUTPUT_FILE else self.executor_input()

        return _PLACEHOLDER.sub(lambda match: self._put(replaced(match)), text)

    def _passed(self, name: str) -> Value:
        if name not in self.parameters:
            raise InputError(f'parameter "{name}" not found in executor input (the task passes no value for it)')
        return self.parameters[name]


def command(templates: Sequence[str], around: Surroundings) -> list[str]:
    """The words of a step's command. InputError for an input that is not passed, as KFP's driver has it."""
    words: list[str] = []
    for template in templates:
        texts = [template]
        if _LAUNCHERS not in template:
            if choice := choice_of(template, "a word of the command"):
                # an artifact is never present to it, and neither is a null
                present = around.parameters.get(str(choice.get("InputName", ""))) is not None
                texts = _texts(choice.get("Then" if present else "Else"), "a word of the command")
            texts = [around.driver(text) for text in texts]
        words += map(around.launcher, texts)
    return words
