"""A stage's options: one dataclass, from which command line, KFP component, settings, docs and cache key come.

A field's type says what it is: a reference to data (`Ref`, `Refs`, `WeightedRefs`) or a value, perhaps `NotKeyed`.
"""

import dataclasses
import functools
import inspect
import json
import re
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar

from zhllama.artifacts.manifest import Input, Manifest
from zhllama.errors import InputError

Config = TypeVar("Config")
Value = TypeVar("Value")
REF, SEVERAL = "reference", "several"
_WEIGHTED, _NOT_KEYED, _LATER = "weighted", "not keyed", "later"

NotKeyed = Annotated[Value, _NOT_KEYED]
"""A field that does not change the result (`workers: NotKeyed[int] = 2`): it is left out of the key."""
Later = Annotated[Value, _LATER]
"""A field of a later release: at its default it is left out of the key, so that what was published before is found."""
Ref = Annotated[str, REF]
"""A field that holds one reference ("" when absent). Its digest, not its address, is part of the input key."""
Refs = Annotated[str, REF, SEVERAL]
"""Several references, comma-separated or by repeating the option."""
WeightedRefs = Annotated[str, REF, SEVERAL, _WEIGHTED]
"""Likewise, and each may end in `:weight`."""


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """What every stage takes."""

    store: str
    """Where the data is put: a folder or an s3:// prefix."""
    output: str = ""
    """Where a copy of the manifest is written (a path or an s3:// address)."""
    reference: str = ""
    """Where the artifact's reference is written, as text."""
    report: str = ""
    """Where a copy of the artifact's HTML report is written, if it has one."""
    executor_output: str = ""
    """Where KFP's executor output (metrics as artifact metadata) is written."""
    executor_input: str = ""
    """KFP's executor input, as JSON (the placeholder `{{$}}`): it names that place, as its outputs.outputFile."""

    cache_version: ClassVar[int] = 1
    """Raised when the same input would give another result: then what was published before is made anew."""
    libraries: ClassVar[tuple[str, ...]] = ()
    """Whose installed versions are part of the key."""

    def cache_versions(self) -> dict[str, int]:
        """Whose code decides the result: the stage's, and that of those it has do its work."""
        return {stage_of(type(self)): self.cache_version}

    def more_inputs(self) -> dict[str, Input]:
        """Inputs that are no artifacts, each with a digest that tells when it has changed. Part of the key."""
        return {}

    def accept(self, manifest: Manifest) -> None:
        """InputError where what is published is not what was asked for: then the command fails, each time it is
        called, and hands on no reference."""


Stage = TypeVar("Stage", bound=StageOptions)
PLUMBING = tuple(field.name for field in dataclasses.fields(StageOptions))


def option_of(name: str) -> str:
    """The option of a field: `--block-size` of block_size."""
    return f"--{name.replace('_', '-')}"


def split_references(value: str) -> list[str]:
    """`a,b:0.5` → [`a`, `b`]: the addresses of a reference field, weights taken off."""
    return [address for address, _ in weighted_references(value)]


def weighted_references(value: str) -> list[tuple[str, float | None]]:
    """`zh:0.9,en:0.1` → [(`zh`, 0.9), (`en`, 0.1)]. Beside one with a weight, one without has 1; else all have None."""
    parts = [part.strip() for part in value.split(",") if part.strip()]
    found = [re.fullmatch(r"(.+):(\d+(?:\.\d+)?|\.\d+)", part) for part in parts]
    without = 1.0 if any(found) else None
    return [(match[1], float(match[2])) if match else (part, without) for part, match in zip(parts, found)]


def marks_of(kind: type) -> dict[str, Collection[str]]:
    """What the fields of a class are besides their type, by their names."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {one.name: getattr(hints[one.name], "__metadata__", ()) for one in dataclasses.fields(kind)}


def references_in(kind: type) -> set[str]:
    """The fields of a class that hold references."""
    return {name for name, marks in marks_of(kind).items() if REF in marks}


def references_of(config: Any) -> dict[str, list[str]]:
    """The reference fields that are set: name → addresses. InputError for a weight where none counts."""
    found = {}
    for name, marks in marks_of(type(config)).items():
        value = getattr(config, name)
        if REF not in marks or not value:
            continue
        given = weighted_references(value) if SEVERAL in marks else [(value, None)]
        if _WEIGHTED not in marks and any(weight is not None for _, weight in given):
            raise InputError(f"{option_of(name)} {value}: weights do not count here; leave them out")
        found[name] = [address for address, _ in given]
    return found


def configuration_of(config: Any) -> dict[str, Any]:
    """The options that change the result, as JSON values: no plumbing, no addresses of inputs."""
    chosen: dict[str, Any] = {}
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, marks in marks_of(type(config)).items():
        if name in PLUMBING or _NOT_KEYED in marks:
            continue
        chosen[name] = getattr(config, name)
        if _LATER in marks and chosen[name] == defaults[name]:
            del chosen[name]
            continue
        if REF in marks:
            # the weights and the order of several inputs count; their addresses do not
            weights = [weight for _, weight in weighted_references(chosen.pop(name))]
            if any(weight is not None for weight in weights):
                chosen[name] = weights
    return typing.cast(dict[str, Any], json.loads(json.dumps(chosen)))


@dataclass(frozen=True)
class Described:
    """An option as its field says it: its type, marks left out, its default (or inspect.Parameter.empty), its note."""

    kind: Any
    default: Any
    note: str


@functools.cache
def described(kind: type) -> Mapping[str, Described]:
    """The options of a class, in order."""
    import docstring_parser

    notes: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        parsed = docstring_parser.parse_from_object(base)
        notes |= {one.arg_name: " ".join((one.description or "").split()) for one in parsed.params}
    hints = typing.get_type_hints(kind)
    missing = {dataclasses.MISSING: inspect.Parameter.empty}
    return {
        one.name: Described(hints[one.name], missing.get(one.default, one.default), notes.get(one.name, ""))
        for one in dataclasses.fields(kind)
    }


def stage_of(kind: type) -> str:
    """The stage whose options these are: the folder below components/ that the class stands in."""
    return kind.__module__.split(".")[1]
