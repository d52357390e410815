"""A stage's options as a KFP component: each option once, with its type, default and text."""

from dataclasses import dataclass
from typing import Any, Literal

from kfp import dsl

from zhllama.stage.component import component_of
from zhllama.stage.options import NotKeyed, Ref, Refs, StageOptions


@dataclass(frozen=True, kw_only=True)
class Stew(StageOptions):
    """Cook what is given."""

    carrots: Ref
    """Reference to the carrots."""
    spices: Refs = ""
    """References to spices."""
    minutes: int = 90
    """How long."""
    heat: Literal["low", "high"] = "low"
    """Of the fire."""
    stirred: NotKeyed[bool] = True
    """Whether somebody stirs."""
    words: str = ""
    """Said over it."""


@dataclass(frozen=True, kw_only=True)
class Guests(StageOptions):
    """Who eats."""

    minutes: int = 0
    hunger: float = 0.5
    """Of a guest."""


def made(**more: Any) -> Any:
    return component_of(
        Stew, name="stew", command="components.stew", pot=dsl.Artifact, report=dsl.HTML, metrics=dsl.Metrics, **more
    ).component_spec


def words(spec: Any) -> list[str]:
    return [str(word) for word in spec.implementation.container.args]


def test_options_are_inputs_with_their_types_defaults_and_texts() -> None:
    spec = made()
    found = {name: (one.type, one.default, one.description) for name, one in spec.inputs.items()}
    assert found == {
        "store": ("String", None, "Where the data is put: a folder or an s3:// prefix."),
        "carrots": ("String", None, "Reference to the carrots."),
        "spices": ("String", "", "References to spices."),
        "minutes": ("Integer", 90, "How long."),
        "heat": ("String", "low", "Of the fire."),
        "stirred": ("Boolean", True, "Whether somebody stirs."),
        "words": ("String", "", "Said over it."),
    }
    assert spec.description == "Cook what is given."
    assert spec.name == "stew"


def test_each_input_reaches_its_option_and_outputs_theirs() -> None:
    spec = made()
    for name in spec.inputs:
        at = words(spec).index(f"--{name}")
        assert words(spec)[at + 1] == f"{{{{$.inputs.parameters['{name}']}}}}"
    assert words(spec)[-8:] == [
        "--output", "{{$.outputs.artifacts['pot'].path}}",
        "--report", "{{$.outputs.artifacts['report'].path}}",
        "--reference", "{{$.outputs.parameters['ref'].output_file}}",
        "--executor-input", "{{$}}",
    ]  # fmt: skip
    assert spec.implementation.container.command == ["python", "-m", "components.stew"]


def test_references_that_no_step_can_put_together_are_given_one_by_one() -> None:
    spec = made(repeated={"spices": 3})
    assert [name for name in spec.inputs if name.startswith("spices")] == ["spices", "spices_2", "spices_3"]
    assert words(spec).count("--spices") == 3


def test_a_value_that_may_begin_with_dashes_is_joined_to_its_option() -> None:
    assert "--words={{$.inputs.parameters['words']}}" in words(made(joined=("words",)))


def test_options_of_another_command_stand_after_two_dashes_and_what_both_have_before() -> None:
    spec = made(after=(Guests,))
    cut = words(spec).index("--")
    assert words(spec)[cut + 1 :] == ["--hunger", "{{$.inputs.parameters['hunger']}}"]
    assert "--minutes" in words(spec)[:cut]


def test_a_component_of_some_options() -> None:
    spec = component_of(Stew, name="taste", only=("minutes",), pot=dsl.Artifact).component_spec
    assert list(spec.inputs) == ["minutes"]
    assert spec.name == "taste"
