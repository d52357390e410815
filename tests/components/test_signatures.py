"""The KFP signature of each stage against the command that it runs: the same names, types and defaults."""

import ast
import dataclasses
import importlib
import re
import typing
from pathlib import Path
from typing import Any

import pytest

from zhllama.stage.options import StageOptions

ROOT = Path(__file__).resolve().parents[2]
STAGES = sorted(path.parent.name for path in (ROOT / "components").glob("*/__main__.py"))
PLUMBING = {"output", "reference", "report", "executor_output", "executor_input"}
every_stage = pytest.mark.parametrize("stage", STAGES)


def config_of(stage: str) -> type:
    """The dataclass that the stage's command parses: train_tokenizer's is TrainTokenizer."""
    name = "".join(word.capitalize() for word in stage.split("_"))
    tree = ast.parse((ROOT / "components" / stage / "__main__.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(f"components.{stage}."):
            found = getattr(importlib.import_module(str(node.module)), name)
            assert issubclass(found, StageOptions)
            return found
    raise AssertionError(f"{stage}: its command imports no module of its own")


def options_of(stage: str) -> dict[str, tuple[dataclasses.Field, Any]]:
    """The command's options, each with its type. launch_training hands some on to the training, after `--`."""
    from zhllama.training.options import FinetuneOptions, PretrainOptions

    found: dict[str, tuple[dataclasses.Field, Any]] = {}
    for config in (config_of(stage), *((PretrainOptions, FinetuneOptions) if stage == "launch_training" else ())):
        hints = typing.get_type_hints(config)
        for field in dataclasses.fields(config):
            found.setdefault(field.name, (field, hints[field.name]))
    return found


def signature_of(stage: str) -> Any:
    return getattr(importlib.import_module(f"components.{stage}.component"), stage)


def parameters(stage: str) -> dict[str, Any]:
    return dict(signature_of(stage).component_spec.inputs or {})


def option_of(name: str) -> str:
    """The option that an input feeds: `baseline_2` is a second --baseline, for a list that no step can put together."""
    return re.sub(r"_[23]$", "", name)


def arguments(stage: str) -> list[str]:
    """The container's arguments, placeholders as KFP writes them."""
    implementation = signature_of(stage).component_spec.implementation
    return [str(word) for word in implementation.container.args]


@every_stage
def test_every_parameter_is_an_option_of_the_command(stage):
    assert set(map(option_of, parameters(stage))) <= set(options_of(stage)) - PLUMBING
    assert "store" in parameters(stage)


@every_stage
def test_every_parameter_reaches_its_option_and_no_other(stage):
    words = arguments(stage)
    for name in parameters(stage):
        option, value = f"--{option_of(name).replace('_', '-')}", f"{{{{$.inputs.parameters['{name}']}}}}"
        assert f"{option}={value}" in words or words[words.index(value) - 1] == option


@every_stage
def test_defaults_are_those_of_the_command(stage):
    for name, parameter in parameters(stage).items():
        default = options_of(stage)[option_of(name)][0].default
        if parameter.default is None or name != option_of(name):
            continue
        if default in (None, ""):
            # absent; a step may still have something to say there (what to ask a server, say)
            assert isinstance(parameter.default, str) or not parameter.default
        else:
            assert parameter.default == default, f"--{name}: the command's default is {default!r}"


@every_stage
def test_what_the_command_can_do_without_the_step_can_do_without(stage):
    for name, parameter in parameters(stage).items():
        if options_of(stage)[option_of(name)][0].default is dataclasses.MISSING and name == option_of(name):
            assert not parameter.optional, f"--{name} is required by the command"


@every_stage
def test_types_are_those_of_the_command(stage):
    kinds = {str: "STRING", int: "NUMBER_INTEGER", float: "NUMBER_DOUBLE", bool: "BOOLEAN"}
    named = {"String": str, "Integer": int, "Float": float, "Double": float, "Boolean": bool}
    for name, parameter in parameters(stage).items():
        if parameter.type in ("Dict", "List"):
            # which the command takes as JSON
            assert options_of(stage)[option_of(name)][1] is str
            continue
        kind = named.get(parameter.type)
        assert kind in kinds, f"--{name}: the type {parameter.type}"
        hint = options_of(stage)[option_of(name)][1]
        if hint in kinds:
            # a number that may be left out is text for KFP: only text can be empty
            assert kind in (hint, str), f"--{name} is {hint.__name__}"


@every_stage
def test_a_step_hands_on_its_reference_and_its_manifest(stage):
    outputs = dict(signature_of(stage).component_spec.outputs or {})
    words = arguments(stage)
    assert outputs["ref"].type == "String"
    assert words[words.index("--reference") + 1] == "{{$.outputs.parameters['ref'].output_file}}"
    place = words[words.index("--output") + 1]
    artifacts = [name for name, output in outputs.items() if place == f"{{{{$.outputs.artifacts['{name}'].path}}}}"]
    assert len(artifacts) == 1
