"""A compiled pipeline (KFP's IR, schema 2.1) as data.

`read_package` takes the part of the IR that container components, sub-pipelines and exit handlers compile to.
Everything else (conditions, loops, importers, retries …) is refused by name before anything runs: a runner that passes
over what it does not know would say "done" of work that was not done. It also refuses what KFP 2.17.0 cannot run and
its compiler writes: a task that leaves an input to its component's default, parts that do not fit together, a pipeline
that contains itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.local.placeholders import JOB, Value, asked_for, check_placeholders, check_word
from zhllama.errors import InputError

MOST_STEPS = 1000
"""Steps in all that a pipeline may hold: far more than a cluster takes in one Workflow (about 100)."""
DEEPEST = 50
"""Sub-pipelines inside one another."""
_DECIDED = "which is decided when our pipelines are compiled; run it on a cluster"


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
class Container:
    """A container step: its command and arguments as one list of words, and its environment."""

    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A use of a component."""

    name: str
    title: str
    component: str
    parameters: Mapping[str, Source]
    artifacts: Mapping[str, Source]
    after: tuple[str, ...]
    always: bool
    """True: it runs when the tasks it waits for have ended, however they ended (an exit handler)."""

    @property
    def waits_for(self) -> tuple[str, ...]:
        """The tasks beside it that must have ended first, sorted."""
        sources = (*self.parameters.values(), *self.artifacts.values())
        return tuple(sorted({*self.after, *(source.task for source in sources if isinstance(source, FromTask))}))


@dataclass(frozen=True)
class Component:
    """Either a container or a graph of tasks."""

    name: str
    parameters: Mapping[str, Parameter]
    artifacts: tuple[str, ...]
    """Names of input artifacts."""
    output_parameters: Mapping[str, str]
    """Name → KFP type."""
    output_artifacts: Mapping[str, str]
    """Name → schema title (system.Model, …)."""
    container: Container | None
    tasks: Mapping[str, Task]
    results: Mapping[str, FromTask]
    """Output of a graph (parameter or artifact) → where it comes from."""


@dataclass(frozen=True)
class Package:
    """A compiled pipeline."""

    name: str
    root: Component
    components: Mapping[str, Component]


def read_package(path: Path) -> Package:
    """The pipeline in a compiled YAML file (one or two documents). InputError names what this program cannot run."""
    import yaml

    try:
        # libyaml, where PyYAML has it: ten times as fast
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        documents = [document for document in yaml.load_all(path.read_text(), loader) if document is not None]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a compiled pipeline") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML ({error}); give a compiled pipeline") from error
    return parse_package(documents, str(path))


def parse_package(documents: Sequence[Any], where: str) -> Package:
    if not documents or not isinstance(documents[0], dict) or "pipelineInfo" not in documents[0]:
        raise InputError(f"{where}: not a compiled pipeline; make one with: zhllama compile")
    for document in documents[1:]:
        _check_platform(document, where)
    spec = documents[0]
    known = {"pipelineInfo", "schemaVersion", "sdkVersion", "components", "deploymentSpec", "root"}
    _only(spec, known, {"defaultPipelineRoot"}, where)
    version = str(spec.get("schemaVersion", ""))
    if not version.startswith("2.1"):
        raise InputError(f"{where}: IR schema {version}; this program reads 2.1")
    executors = spec.get("deploymentSpec", {}).get("executors", {})
    components = {
        name: _component(name, value, executors, f"{where}: {name}")
        for name, value in spec.get("components", {}).items()
    }
    root = _component("root", spec.get("root", {}), executors, f"{where}: root")
    package = Package(str(spec["pipelineInfo"].get("name", "pipeline")), root, components)
    _check(package, where)
    return package


def _only(value: Any, known: set[str], ignored: set[str], where: str) -> None:
    """Refuses, by name, every key that is neither understood nor without meaning on one machine."""
    if not isinstance(value, dict):
        raise InputError(f"{where}: {value!r} where a mapping is needed; the compiled pipeline is damaged")
    for key in value:
        if key not in known | ignored:
            raise InputError(f"{where}: it uses {key}, which the local runner does not know; run it on a cluster")


def _check_platform(document: Any, where: str) -> None:
    """The Kubernetes settings: where a pod is placed means nothing here, what it mounts would be missed, unless it may
    be absent on a cluster too."""
    executors = document.get("platforms", {}).get("kubernetes", {}).get("deploymentSpec", {}).get("executors", {})
    meaningless = {
        "secretAsEnv", "fieldPathAsEnv", "emptyDirMounts", "podMetadata", "nodeSelector", "nodeAffinity", "tolerations",
        "podAffinity", "imagePullSecret", "imagePullPolicy", "activeDeadlineSeconds", "securityContext",
    }  # fmt: skip
    mounts = {"configMapAsVolume", "secretAsVolume"}
    for name, value in executors.items():
        spared = {key for key in mounts & set(value) if all(mount.get("optional") for mount in value[key])}
        _only(value, set(), meaningless | spared, f"{where}: {name}: Kubernetes settings")


def _component(name: str, value: Any, executors: Mapping[str, Any], where: str) -> Component:
    _only(value, {"executorLabel", "dag", "inputDefinitions", "outputDefinitions"}, set(), where)
    inputs, outputs = value.get("inputDefinitions", {}), value.get("outputDefinitions", {})
    _only(inputs, {"parameters", "artifacts"}, set(), f"{where}: inputs")
    _only(outputs, {"parameters", "artifacts"}, set(), f"{where}: outputs")
    parameters = {}
    for key, given in inputs.get("parameters", {}).items():
        _only(given, {"parameterType", "defaultValue", "isOptional"}, {"description"}, f"{where}: input {key}")
        parameters[key] = Parameter(given["parameterType"], given.get("defaultValue"), bool(given.get("isOptional")))
    artifacts = []
    for key, given in inputs.get("artifacts", {}).items():
        _only(given, {"artifactType"}, {"description"}, f"{where}: input artifact {key}")
        artifacts.append(key)
    container = None
    if "executorLabel" in value:
        container = _container(executors.get(value["executorLabel"], {}), f"{where}: {value['executorLabel']}")
    dag = value.get("dag", {})
    _only(dag, {"tasks", "outputs"}, set(), where)
    results = dict(_results(dag.get("outputs", {}), f"{where}: outputs"))
    return Component(
        name=name,
        parameters=parameters,
        artifacts=tuple(artifacts),
        output_parameters={key: given["parameterType"] for key, given in outputs.get("parameters", {}).items()},
        output_artifacts={
            key: str(given.get("artifactType", {}).get("schemaTitle", ""))
            for key, given in outputs.get("artifacts", {}).items()
        },
        container=container,
        tasks={key: _task(key, given, f"{where}: {key}") for key, given in dag.get("tasks", {}).items()},
        results=results,
    )


def _container(value: Any, where: str) -> Container:
    _only(value, {"container"}, set(), where)
    spec = value.get("container", {})
    # resources say what to reserve in a cluster; this machine has what it has
    _only(spec, {"command", "args", "env"}, {"image", "resources"}, where)
    environment = {}
    for item in spec.get("env", []):
        _only(item, {"name", "value"}, set(), f"{where}: env")
        environment[item["name"]] = str(item.get("value", ""))
    if not spec.get("command"):
        raise InputError(f"{where}: it names no command, and what its image would run is not known here")
    return Container((*map(str, spec["command"]), *map(str, spec.get("args", []))), environment)


def _task(name: str, value: Any, where: str) -> Task:
    known = {"componentRef", "inputs", "dependentTasks", "triggerPolicy", "taskInfo"}
    # our pipelines switch KFP's cache off; here only the runner's own record decides
    _only(value, known, {"cachingOptions"}, where)
    inputs = value.get("inputs", {})
    _only(inputs, {"parameters", "artifacts"}, set(), f"{where}: inputs")
    trigger = value.get("triggerPolicy", {})
    if "condition" in trigger:
        raise InputError(f"{where}: it has a condition (dsl.If, dsl.Elif, dsl.Else), {_DECIDED}")
    _only(trigger, {"strategy"}, set(), f"{where}: triggerPolicy")
    strategies = {"": False, "ALL_UPSTREAM_TASKS_SUCCEEDED": False, "ALL_UPSTREAM_TASKS_COMPLETED": True}
    strategy = str(trigger.get("strategy", ""))
    if strategy not in strategies:
        raise InputError(f"{where}: it uses the strategy {strategy}, which the local runner does not know")
    return Task(
        name=name,
        title=str(value.get("taskInfo", {}).get("name", name)),
        component=str(value.get("componentRef", {}).get("name", "")),
        parameters={key: _parameter_source(given, f"{where}: {key}") for key, given in _of(inputs, "parameters")},
        artifacts={key: _artifact_source(given, f"{where}: {key}") for key, given in _of(inputs, "artifacts")},
        after=tuple(value.get("dependentTasks", [])),
        always=strategies[strategy],
    )


def _of(value: Mapping[str, Any], key: str) -> Iterator[tuple[str, Any]]:
    yield from value.get(key, {}).items()


def _parameter_source(value: Any, where: str) -> Source:
    _only(value, {"runtimeValue", "componentInputParameter", "taskOutputParameter"}, set(), where)
    if "runtimeValue" in value:
        _only(value["runtimeValue"], {"constant"}, set(), where)
        return Constant(value["runtimeValue"]["constant"])
    if "componentInputParameter" in value:
        return FromParent(value["componentInputParameter"])
    given = value["taskOutputParameter"]
    return FromTask(given["producerTask"], given["outputParameterKey"])


def _artifact_source(value: Any, where: str) -> Source:
    _only(value, {"componentInputArtifact", "taskOutputArtifact"}, set(), where)
    if "componentInputArtifact" in value:
        return FromParent(value["componentInputArtifact"])
    given = value["taskOutputArtifact"]
    return FromTask(given["producerTask"], given["outputArtifactKey"])


def _results(outputs: Any, where: str) -> Iterator[tuple[str, FromTask]]:
    """The outputs of a graph, each from one task in it."""
    _only(outputs, {"parameters", "artifacts"}, set(), where)
    for key, value in _of(outputs, "parameters"):
        if "valueFromOneof" in value:
            raise InputError(f"{where}: {key}: it is one of several outputs (dsl.OneOf), {_DECIDED}")
        _only(value, {"valueFromParameter"}, set(), f"{where}: {key}")
        item = value["valueFromParameter"]
        yield key, FromTask(item["producerSubtask"], item["outputParameterKey"])
    for key, value in _of(outputs, "artifacts"):
        _only(value, {"artifactSelectors"}, set(), f"{where}: {key}")
        if len(value["artifactSelectors"]) != 1:
            raise InputError(f"{where}: {key}: it is one of several outputs (dsl.OneOf), {_DECIDED}")
        (item,) = value["artifactSelectors"]
        yield key, FromTask(item["producerSubtask"], item["outputArtifactKey"])


# --- does it fit together? --------------------------------------------------------------------------------------------


def _check(package: Package, where: str) -> None:
    """Every name that is used is there: components, tasks, inputs, outputs, placeholders; and no group is empty."""
    for component in (package.root, *package.components.values()):
        here = f"{where}: {component.name}"
        if component.container is None and not component.tasks:
            raise InputError(f"{here}: neither a container nor tasks; the compiled pipeline is damaged")
        for key, selector in component.results.items():
            _check_selector(package, component, selector, f"{here}: output {key}")
        if component.container is not None:
            _check_words(component, here)
        for task in component.tasks.values():
            _check_task(package, component, task, f"{here}: {task.name}")
    steps = _steps(package, package.root, (), {}, where)
    if steps > MOST_STEPS:
        raise InputError(f"{where}: it holds {steps} steps; at most {MOST_STEPS} can run")


def _steps(package: Package, component: Component, around: tuple[str, ...], known: dict[str, int], where: str) -> int:
    """How many steps a component unfolds into. InputError where it contains itself, or is too deep to unfold."""
    if component.name in around:
        raise InputError(f"{where}: {component.name} contains itself; the pipeline would never end")
    if len(around) > DEEPEST:
        raise InputError(f"{where}: {component.name} stands inside more than {DEEPEST} sub-pipelines")
    if component.container is not None:
        return 1
    if component.name not in known:
        within = (*around, component.name)
        below = (package.components[task.component] for task in component.tasks.values())
        known[component.name] = sum(_steps(package, one, within, known, where) for one in below)
    return known[component.name]


def _check_task(package: Package, parent: Component, task: Task, where: str) -> None:
    if task.component not in package.components:
        raise InputError(f"{where}: there is no component {task.component}; the compiled pipeline is damaged")
    component = package.components[task.component]
    others = [other for other in parent.tasks.values() if other is not task]
    for name in task.waits_for:
        if name not in parent.tasks or name == task.name:
            raise InputError(f"{where}: it waits for {name}, which is not beside it; the compiled pipeline is damaged")
        if parent.tasks[name].always:
            raise InputError(f"{where}: it waits for {name}, which KFP runs as an exit handler: nothing comes after it")
    if task.always and len(task.waits_for) != 1:
        raise InputError(f"{where}: an exit handler of {len(task.waits_for)} tasks; KFP would run it once for each")
    if task.always and any(other.always and other.waits_for == task.waits_for for other in others):
        raise InputError(f"{where}: not the only exit handler of {task.waits_for[0]}; KFP would run one of them")
    for key, source in (*task.parameters.items(), *task.artifacts.items()):
        _check_source(package, parent, task, source, f"{where}: {key}")
    _check_passed(component, task, where)


def _check_source(package: Package, parent: Component, task: Task, source: Source, where: str) -> None:
    if isinstance(source, FromParent) and source.name not in {*parent.parameters, *parent.artifacts}:
        raise InputError(
            f"{where} comes from an input {source.name} that {parent.name} does not have; "
            "the compiled pipeline is damaged"
        )
    if isinstance(source, FromTask):
        _check_selector(package, parent, source, where)
    if isinstance(source, Constant) and isinstance(source.value, str):
        whole = source.value.removeprefix("{{$.").removesuffix("}}") in JOB
        if not whole:
            if "{{$}}" in source.value or "$.outputs" in source.value:
                raise InputError(f"{where}: an input names {source.value!r}, which only a command can")
            check_placeholders(source.value, {*task.parameters, *task.artifacts}, set(), set(), where)


def _check_passed(component: Component, task: Task, where: str) -> None:
    """A step passes each input that its component declares, but for those whose absence it asks for; a group's
    defaults are filled in, as KFP does it for groups alone."""
    words = component.container.words if component.container else ()
    asked = {asked_for(word) for word in words}
    for key, parameter in component.parameters.items():
        if key in task.parameters or (key in asked and parameter.optional):
            continue
        if component.container and parameter.optional:
            raise InputError(
                f"{where}: it passes nothing for the input {key}, and KFP 2.17 looks at no default of a component: "
                f'parameter "{key}" not found in executor input; pass {key} in the pipeline'
            )
        if not parameter.optional:
            raise InputError(f"{where}: its input {key} is not given; the compiled pipeline is damaged")
    for key in component.artifacts:
        if key not in task.artifacts:
            raise InputError(f"{where}: its input {key} is not given; the compiled pipeline is damaged")


def _check_selector(package: Package, graph: Component, selector: FromTask, where: str) -> None:
    task = graph.tasks.get(selector.task)
    component = package.components.get(task.component) if task else None
    if component is None or selector.output not in {*component.output_parameters, *component.output_artifacts}:
        raise InputError(
            f"{where}: it comes from {selector.task}'s output {selector.output}, which there is not; "
            "the compiled pipeline is damaged"
        )


def _check_words(component: Component, where: str) -> None:
    assert component.container is not None
    given = {*component.parameters, *component.artifacts}
    for word in component.container.words:
        check_word(word, given, set(component.output_parameters), set(component.output_artifacts), where)
