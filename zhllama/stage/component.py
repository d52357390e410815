"""A stage as a component of Kubeflow Pipelines, made of its options: types, defaults and descriptions are theirs.

    merge_adapters = component_of(MergeAdapters, repeated={"adapters": 2}, merged=dsl.Model, metrics=dsl.Metrics)

Each output is named by what it is: `metrics` (dsl.Metrics) comes through KFP's executor output, `report` (dsl.HTML) is
the stage's page, any other one the manifest. What the stage made is handed on as text: `ref`.
"""

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, get_origin

from kfp import dsl

from zhllama.stage.images import image
from zhllama.stage.options import PLUMBING, StageOptions, described, option_of, stage_of

_TYPES = (str, int, float, bool)
_KIND = inspect.Parameter.POSITIONAL_OR_KEYWORD
_Input = tuple[str, tuple[str, Any, Any]]


def component_of(
    options: type,
    *,
    name: str = "",
    command: str = "",
    only: Sequence[str] = (),
    repeated: Mapping[str, int] = MappingProxyType({}),
    joined: Sequence[str] = (),
    after: Sequence[type] = (),
    only_after: Collection[str] = (),
    defaults: Mapping[str, Any] = MappingProxyType({}),
    **outputs: type,
) -> Any:
    """The component of an options class. name: by default the stage's. command: its module; by default the stage's.
    only: the options that are inputs; by default all. repeated: option → how often it may be given (`adapters_2` is a
    second --adapters), for references that no step can put together. joined: options whose value may begin with dashes.
    after: classes whose options stand after `--`, for another command, and only_after: which of them; of one that
    several classes have, the first one's default. defaults: of inputs, where they are not the command's."""
    stage = stage_of(options)
    own = dict(_inputs(options, only, repeated))
    # what stands on both sides of `--` is said once, to this command
    others: dict[str, tuple[str, Any, Any]] = {}
    for one, given in (input for other in after for input in _inputs(other, only_after, {})):
        if one not in own:
            others.setdefault(one, given)
    signature = [
        *(
            inspect.Parameter(one, _KIND, default=defaults.get(one, default), annotation=hint)
            for one, (_, hint, default) in (own | others).items()
        ),
        *(inspect.Parameter(one, _KIND, annotation=dsl.Output[kind]) for one, kind in outputs.items()),
    ]
    if issubclass(options, StageOptions):
        signature.append(inspect.Parameter("ref", _KIND, annotation=dsl.OutputPath(str)))

    def called(*values: Any) -> dsl.ContainerSpec:
        given = dict(zip((one.name for one in signature), values, strict=True))
        words: list[Any] = []
        for one, (option, _, _) in own.items():
            words += [f"{option}={given[one]}"] if one in joined else [option, given[one]]
        for one, kind in outputs.items():
            if kind is not dsl.Metrics:
                words += ["--report" if one == "report" else "--output", given[one].path]
        if "ref" in given:
            words += ["--reference", given["ref"]]
        if dsl.Metrics in outputs.values():
            words += ["--executor-input", "{{$}}"]
        if others:
            words += ["--", *(word for one, (option, _, _) in others.items() for word in (option, given[one]))]
        program = ["python", "-m", command or f"components.{stage}"]
        return dsl.ContainerSpec(image=image(stage), command=program, args=words)

    called.__name__ = called.__qualname__ = name or stage
    called.__doc__ = _text((*reversed(after), options), own | others)
    # those that have to be given come first, as in any signature
    signature.sort(key=lambda one: one.default is not inspect.Parameter.empty)
    called.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    made = dsl.container_component(called)
    made.defaults = dict(defaults)
    return made


def _inputs(options: type, only: Collection[str], repeated: Mapping[str, int]) -> Iterator[_Input]:
    """Input → the option that it feeds, its type, its default."""
    for one, option in described(options).items():
        # what stands after `--` (a tuple) has options of its own
        if (one in PLUMBING and one != "store") or (only and one not in only) or get_origin(option.kind) is tuple:
            continue
        hint = option.kind if option.kind in _TYPES else str
        # KFP's absent value is an empty text
        yield one, (option_of(one), hint, "" if option.default is None else option.default)
        for number in range(2, repeated.get(one, 1) + 1):
            yield f"{one}_{number}", (option_of(one), hint, "")


def _text(kinds: Sequence[type], inputs: Iterable[str]) -> str:
    """A docstring as KFP reads it; of an option that several have, the last one's words."""
    notes = {name: option.note for kind in kinds for name, option in described(kind).items()}
    lines = [f"    {one}: {notes[one]}" for one in inputs if notes.get(one)]
    return "\n\n".join([inspect.cleandoc(kinds[-1].__doc__ or ""), "Args:\n" + "\n".join(lines)])
