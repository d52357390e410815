"""A compiled pipeline (KFP's IR, schema 2.1) as data.

`read_package` takes what container components, sub-pipelines and exit handlers compile to. All else (conditions,
loops, importers, retries …) is refused by name before anything runs, lest work be passed over that then counts as done.
So is what KFP 2.17.0 cannot run: a task that leaves an input to its component's default, parts that do not fit.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.local.ir_schema import (
    DEEPEST,
    KINDS,
    MEANINGLESS,
    PACKAGE,
    PLATFORM,
    check_json,
    check_known,
    damaged,
    documents_of,
    keys,
)
from pipelines.local.placeholders import JOB, Value, check_placeholders, check_word, choice_of, is_of
from zhllama.errors import InputError

MOST_STEPS = 1000
"""Steps in all that a pipeline may hold: far more than a cluster takes in one Workflow (about 100)."""
_DECIDED = "which is decided when our pipelines are compiled; run it on a cluster"
_LOADS = re.compile(
    r"PATH|(LD|DYLD)_.*|GCONV_PATH|PYTHON(?!(UNBUFFERED|UTF8|IOENCODING|HASHSEED|DONTWRITEBYTECODE|FAULTHANDLER)$).*"
    r"|BASH_ENV|BASH_FUNC_.*|ENV|SHELLOPTS|PERL5(LIB|OPT)|RUBY(LIB|OPT)|NODE_(OPTIONS|PATH)|JAVA_TOOL_OPTIONS"
)
"""Variables by which a command is not the one that is read: who has looked at a package's commands knows what runs."""
_ALWAYS = {"": False, "ALL_UPSTREAM_TASKS_SUCCEEDED": False, "ALL_UPSTREAM_TASKS_COMPLETED": True}
"""A task's strategy → whether it runs however the tasks before it ended."""


@dataclass(frozen=True)
class Constant:
    """A value written into the pipeline; a text may hold placeholders of the task's other inputs."""

    value: Value


@dataclass(frozen=True)
class FromParent:
    """An input of the pipeline (or group) that the task stands in."""

    name: str


@dataclass(frozen=True)
class FromTask:
    """An output of a task beside this one."""

    task: str
    output: str


Source = Constant | FromParent | FromTask


@dataclass(frozen=True)
class Parameter:
    """A parameter of a component: its KFP type (STRING, NUMBER_INTEGER, …) and what stands in when it is not given."""

    kind: str
    default: Value = None
    optional: bool = False


@dataclass(frozen=True)
class Task:
    name: str
    title: str
    component: str
    parameters: Mapping[str, Source]
    artifacts: Mapping[str, Source]
    after: tuple[str, ...]
    always: bool
    """Whether it runs when the tasks it waits for have ended, however they ended (an exit handler)."""

    @property
    def waits_for(self) -> tuple[str, ...]:
        """The tasks beside it that must have ended first, sorted."""
        sources = (*self.parameters.values(), *self.artifacts.values())
        return tuple(sorted({*self.after, *(source.task for source in sources if isinstance(source, FromTask))}))


@dataclass(frozen=True)
class Component:
    """Either a container, with the words of its command and its environment, or a graph of tasks."""

    name: str
    parameters: Mapping[str, Parameter]
    artifacts: tuple[str, ...]
    output_parameters: Mapping[str, str]
    """Name → KFP type."""
    output_artifacts: tuple[str, ...]
    words: tuple[str, ...]
    tasks: Mapping[str, Task]
    results: Mapping[str, FromTask]
    """Output of a graph (parameter or artifact) → where it comes from."""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Package:
    name: str
    root: Component
    components: Mapping[str, Component]


def read_package(path: Path) -> Package:
    """The pipeline in a compiled YAML file (one or two documents). InputError names what this program cannot run."""
    return parse_package(documents_of(path), str(path))


def parse_package(documents: Sequence[Any], where: str) -> Package:
    """As `read_package`, of the file's documents."""
    if not documents or not isinstance(documents[0], dict) or "pipelineInfo" not in documents[0]:
        raise InputError(f"{where}: not a compiled pipeline; make one with: zhllama compile")
    for document in documents:
        check_json(document, where)
    for document in documents[1:]:
        check_known(document, PLATFORM, where)
        platform = document.get("platforms", {}).get("kubernetes", {}).get("deploymentSpec", {})
        for name, value in platform.get("executors", {}).items():
            # what it mounts would be missed, unless it may be absent on a cluster too
            mounts = {"configMapAsVolume", "secretAsVolume"} & set(value)
            spared = keys(*(key for key in mounts if all(mount.get("optional") for mount in value[key])))
            check_known(value, MEANINGLESS | spared, f"{where}: {name}: Kubernetes settings")
    spec = documents[0]
    version = str(spec.get("schemaVersion", ""))
    if not version.startswith("2.1"):
        raise InputError(f"{where}: IR schema {ascii(version[:20])[1:-1]}; this program reads 2.1")
    check_known(spec, PACKAGE, where)
    executors = spec.get("deploymentSpec", {}).get("executors", {})
    parts = {**spec.get("components", {}), "root": spec.get("root", {})}
    components = {}
    for name, value in parts.items():
        try:
            components[name] = _component(name, value, executors, f"{where}: {name}")
        except KeyError as error:
            raise damaged(f"{where}: {name}: it has no {error.args[0]}") from error
    root = components.pop("root")
    if root.artifacts:
        raise InputError(f"{where}: the pipeline takes artifacts ({root.artifacts[0]}), which this program cannot give")
    package = Package(spec["pipelineInfo"].get("name", "pipeline"), root, components)
    for component in (root, *components.values()):
        _check_component(package, component, f"{where}: {component.name}")
    if (steps := _steps(package, root, (), {}, where)) > MOST_STEPS:
        raise InputError(f"{where}: it holds {steps} steps; at most {MOST_STEPS} can run")
    return package


def _component(name: str, value: Any, executors: Mapping[str, Any], where: str) -> Component:
    inputs, outputs, dag = (value.get(key, {}) for key in ("inputDefinitions", "outputDefinitions", "dag"))
    label = value.get("executorLabel")
    spec = executors.get(label, {}).get("container", {}) if label else {}
    if label and not spec.get("command"):
        raise InputError(f"{where}: {label}: it names no command, and what its image would run is not known here")
    if label and dag:
        raise damaged(f"{where}: both a container and tasks")
    for key in (*outputs.get("parameters", {}), *outputs.get("artifacts", {})):
        # a step's outputs are files of these names
        if key in ("", ".", "..", "executor_output.json") or "/" in key:
            raise damaged(f"{where}: {key!r} is no name of an output")
    for key, given in (*_of(inputs, "parameters"), *_of(outputs, "parameters")):
        if given["parameterType"] not in KINDS:
            raise InputError(f"{where}: {key}: it uses {given['parameterType']}, which the local runner does not know")
        default = given.get("defaultValue")
        if default is not None and not is_of(default, given["parameterType"]):
            raise damaged(f"{where}: {key}: its default {default!r:.80} is no {given['parameterType']}")
    for item in spec.get("env", []):
        if not item["name"] or "=" in item["name"]:
            raise damaged(f"{where}: {item['name']!r} is no name of a variable")
        if _LOADS.fullmatch(item["name"]):
            said = "it decides which program or module a command is, and an image's places are none here"
            raise InputError(f"{where}: it sets {item['name']}: {said}; leave it out, or run it on a cluster")
    results = {}
    for key, given in (one for kind in ("parameters", "artifacts") for one in _of(dag.get("outputs", {}), kind)):
        items = given.get("artifactSelectors") or [given.get("valueFromParameter")]
        if len(items) != 1 or items[0] is None:
            raise InputError(f"{where}: outputs: {key}: it is one of several outputs (dsl.OneOf), {_DECIDED}")
        output = items[0].get("outputParameterKey") or items[0]["outputArtifactKey"]
        results[key] = FromTask(items[0]["producerSubtask"], output)
    return Component(
        name=name,
        parameters={
            key: Parameter(given["parameterType"], given.get("defaultValue"), bool(given.get("isOptional")))
            for key, given in _of(inputs, "parameters")
        },
        artifacts=tuple(inputs.get("artifacts", {})),
        output_parameters={key: given["parameterType"] for key, given in _of(outputs, "parameters")},
        output_artifacts=tuple(outputs.get("artifacts", {})),
        words=tuple(map(str, (*spec.get("command", []), *spec.get("args", [])))),
        tasks={key: _task(key, given, f"{where}: {key}") for key, given in _of(dag, "tasks")},
        results=results,
        environment={item["name"]: str(item.get("value", "")) for item in spec.get("env", [])},
    )


def _task(name: str, value: Any, where: str) -> Task:
    trigger, inputs = value.get("triggerPolicy", {}), value.get("inputs", {})
    if "condition" in trigger:
        raise InputError(f"{where}: it has a condition (dsl.If, dsl.Elif, dsl.Else), {_DECIDED}")
    strategy = str(trigger.get("strategy", ""))
    if strategy not in _ALWAYS:
        raise InputError(f"{where}: it uses the strategy {strategy}, which the local runner does not know")
    return Task(
        name=name,
        title=str(value.get("taskInfo", {}).get("name", name)),
        component=str(value.get("componentRef", {}).get("name", "")),
        parameters={key: _source(given, "Parameter") for key, given in _of(inputs, "parameters")},
        artifacts={key: _source(given, "Artifact") for key, given in _of(inputs, "artifacts")},
        after=tuple(value.get("dependentTasks", [])),
        always=_ALWAYS[strategy],
    )


def _of(value: Mapping[str, Any], key: str) -> Any:
    return value.get(key, {}).items()


def _source(value: Any, kind: str) -> Source:
    if "runtimeValue" in value:
        return Constant(value["runtimeValue"]["constant"])
    if given := value.get(f"taskOutput{kind}"):
        return FromTask(given["producerTask"], given[f"output{kind}Key"])
    return FromParent(value[f"componentInput{kind}"])


# --- does it fit together? --------------------------------------------------------------------------------------------


def _steps(package: Package, component: Component, around: tuple[str, ...], known: dict[str, int], where: str) -> int:
    """How many steps a component unfolds into. InputError where it contains itself, or is too deep to unfold."""
    if component.name in around:
        raise InputError(f"{where}: {component.name} contains itself; the pipeline would never end")
    if len(around) > DEEPEST:
        raise InputError(f"{where}: {component.name} stands inside more than {DEEPEST} sub-pipelines")
    if component.words:
        return 1
    if component.name not in known:
        within = (*around, component.name)
        below = (package.components[task.component] for task in component.tasks.values())
        known[component.name] = sum(_steps(package, one, within, known, where) for one in below)
    return known[component.name]


def _check_component(package: Package, component: Component, where: str) -> None:
    """Every name that is used is there: components, tasks, inputs, outputs, placeholders; and no group is empty."""
    if not component.words and not component.tasks:
        raise damaged(f"{where}: neither a container nor tasks")
    if len(component.tasks) > MOST_STEPS:
        raise InputError(f"{where}: it holds {len(component.tasks)} tasks; at most {MOST_STEPS} can run")
    for key, selector in component.results.items():
        _check_output(package, component, selector, key in component.output_parameters, f"{where}: output {key}")
    for word in component.words:
        given, outputs = {*component.parameters, *component.artifacts}, set(component.output_parameters)
        check_word(word, given, outputs, set(component.output_artifacts), where)
    for task in component.tasks.values():
        _check_task(package, component, task, f"{where}: {task.name}")


def _check_task(package: Package, parent: Component, task: Task, where: str) -> None:
    if task.component not in package.components:
        raise damaged(f"{where}: there is no component {task.component}")
    for name in task.waits_for:
        if name not in parent.tasks or name == task.name:
            raise damaged(f"{where}: it waits for {name}, which is not beside it")
        if parent.tasks[name].always:
            raise InputError(f"{where}: it waits for {name}, which KFP runs as an exit handler: nothing comes after it")
    if task.always and len(task.waits_for) != 1:
        raise InputError(f"{where}: an exit handler of {len(task.waits_for)} tasks; KFP would run it once for each")
    if task.always and any(
        other.always and other is not task and other.waits_for == task.waits_for for other in parent.tasks.values()
    ):
        raise InputError(f"{where}: not the only exit handler of {task.waits_for[0]}; KFP would run one of them")
    passed = {*task.parameters, *task.artifacts}
    given = [(key, source, True) for key, source in task.parameters.items()]
    for key, source, of_parameter in (*given, *((key, source, False) for key, source in task.artifacts.items())):
        here = f"{where}: {key}"
        if isinstance(source, FromParent) and source.name not in (
            parent.parameters if of_parameter else parent.artifacts
        ):
            raise damaged(f"{here} comes from an input {source.name} that {parent.name} does not have")
        if isinstance(source, FromTask):
            _check_output(package, parent, source, of_parameter, here)
        text = source.value if isinstance(source, Constant) else None
        if isinstance(text, str) and text.removeprefix("{{$.").removesuffix("}}") not in JOB:
            if "{{$}}" in text or "$.outputs" in text:
                raise InputError(f"{here}: an input names {text!r}, which only a command can")
            check_placeholders(text, passed, set(), set(), here)
    # a step passes each input that its component declares, but for those whose absence it asks for; a group's defaults
    # are filled in, as KFP does it for groups alone
    component = package.components[task.component]
    asked = {str(choice_of(word, where).get("InputName")) for word in component.words}
    optional = {key for key, parameter in component.parameters.items() if parameter.optional}
    missing = [key for key in component.parameters if key not in task.parameters]
    for key in (*missing, *(key for key in component.artifacts if key not in task.artifacts)):
        if key not in optional:
            raise damaged(f"{where}: its input {key} is not given")
        if component.words and key not in asked:
            raise InputError(
                f"{where}: it passes nothing for the input {key}, and KFP 2.17 looks at no default of a component: "
                f'parameter "{key}" not found in executor input; pass {key} in the pipeline'
            )


def _check_output(package: Package, graph: Component, source: FromTask, of_parameter: bool, where: str) -> None:
    task = graph.tasks.get(source.task)
    component = package.components.get(task.component) if task else None
    made = () if component is None else component.output_parameters if of_parameter else component.output_artifacts
    if component is None or source.output not in made or not (component.words or source.output in component.results):
        raise damaged(f"{where}: it comes from {source.task}'s output {source.output}, which there is not")
