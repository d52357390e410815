"""What may run now: the state of every task of a pipeline, from what has ended so far. Pure.

The graph of a compiled pipeline is unfolded into nodes (a container step, or a group of tasks: a sub-pipeline, an exit
handler's body). `Plan.at` says of each node whether it waits, may start or has ended, as Argo does for KFP: a task
starts when all that it waits for is done, a group with all that is in it; after a failure nothing new starts, but what
waits for an end (an exit handler) still runs. Inputs are resolved as KFP 2.17.0's driver does it (`Snapshot.inputs`),
and once before anything runs (`Plan.rehearse`), so that what it would refuse half-way is refused at the start.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from pipelines.local.ir import Component, Constant, FromParent, FromTask, Package, Source, Task
from pipelines.local.placeholders import JOB, Surroundings, Value, check_once, command, is_of, text_of, value_of
from zhllama.errors import InputError
from zhllama.stage.command_line import nearest

Path = tuple[str, ...]
"""Where a task stands: the names of the tasks around it, then its own."""

_MACHINE_MADE = re.compile(r"exit-handler-\d+")
_STAND_INS: Mapping[str, Value] = {
    "STRING": "", "NUMBER_INTEGER": 0, "NUMBER_DOUBLE": 0.0, "BOOLEAN": False, "LIST": [], "STRUCT": {},
}  # fmt: skip
"""What a step that has not run may be taken to have written, by KFP type."""


class State(StrEnum):
    WAITING = "waiting"
    READY = "ready"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    NOT_RUN = "not run"
    """Something before it failed, or the run was stopped."""
    LEFT_OUT = "left out"
    """Not asked for (--until)."""


SETTLED = frozenset({State.DONE, State.FAILED, State.NOT_RUN, State.LEFT_OUT})


@dataclass(frozen=True)
class Node:
    """A task in its place. `name` is unique among the steps: what people call it by."""

    path: Path
    task: Task
    component: Component
    name: str

    @property
    def runs(self) -> bool:
        """True for a container step, False for a group of tasks."""
        return self.component.container is not None

    @property
    def module(self) -> str:
        """The stage that the step's command runs: `train_tokenizer` of `python -m components.train_tokenizer`."""
        words = self.component.container.words if self.component.container else ()
        return next((word.split(".", 1)[1] for word in words if word.startswith("components.")), "")


@dataclass(frozen=True)
class Ended:
    """How a step ended, and what it gave."""

    done: bool
    parameters: Mapping[str, Value] = field(default_factory=dict)
    artifacts: Mapping[str, str] = field(default_factory=dict)
    """Output artifact → where it lies."""


class Plan:
    """A pipeline with its arguments, unfolded."""

    def __init__(self, package: Package, arguments: Mapping[str, Value], job: Mapping[str, str]) -> None:
        self.package = package
        self.arguments = arguments
        self.job = job
        found = list(_unfold(package, package.root, ()))
        names = _names([path for path, _, component in found if component.container], {p: t for p, t, _ in found})
        self.nodes = {path: Node(path, task, component, names.get(path, task.title)) for path, task, component in found}
        self.wanted = frozenset(path for path, node in self.nodes.items() if node.runs)

    @property
    def steps(self) -> list[Node]:
        """The container steps, in an order in which they could run one by one."""
        return [node for node in self.nodes.values() if node.runs]

    # --- choosing -----------------------------------------------------------------------------------------------------

    def named(self, word: str, option: str) -> list[Node]:
        """The steps called `word`: by their name, or by the stage that they run. InputError when there is none."""
        wanted = _plain(word)
        found = [node for node in self.steps if _plain(node.name) == wanted]
        found = found or [node for node in self.steps if _plain(node.module) == wanted]
        if not found:
            choices = [node.name for node in self.steps]
            near = nearest(wanted, choices)
            raise InputError(f"{option} {word}: there is no such step{near}; the steps are {', '.join(choices)}")
        return found

    def job_of(self, node: Node) -> dict[str, str]:
        """What the placeholders of the run and the task stand for."""
        return {**self.job, "pipeline_task_name": node.task.name, "pipeline_task_uuid": "-".join(node.path)}

    def until(self, steps: list[Node]) -> None:
        """Leaves out every step that none of these needs (what runs at the end whatever happens stays)."""
        keep = {node.path for node in steps} | {node.path for node in self.steps if node.task.always}
        for node in steps:
            keep |= self.before(node.path)
        self.wanted = frozenset(keep)

    def before(self, path: Path) -> set[Path]:
        """The steps that must have ended before this one can start."""
        found: set[Path] = set()
        for depth in range(len(path)):
            parent, task = path[:depth], self.nodes[path[: depth + 1]].task
            for name in task.waits_for:
                inside = {step for step in self._steps_below((*parent, name)) if step not in found}
                found |= inside
                for step in inside:
                    found |= self.before(step)
        return found

    def after(self, path: Path) -> set[Path]:
        """The steps that need this one."""
        return {node.path for node in self.steps if path in self.before(node.path) and not node.task.always}

    def _steps_below(self, path: Path) -> list[Path]:
        return [other for other, node in self.nodes.items() if node.runs and other[: len(path)] == path]

    # --- looking ------------------------------------------------------------------------------------------------------

    def rehearse(self) -> None:
        """InputError for a step whose inputs or command KFP's driver could not resolve, whatever the others write."""
        ended = {
            node.path: Ended(
                True,
                {name: _STAND_INS[kind] for name, kind in node.component.output_parameters.items()},
                dict.fromkeys(node.component.output_artifacts, ""),
            )
            for node in self.steps
        }
        snapshot = self.at(ended)
        for node in self.steps:
            parameters, artifacts = snapshot.inputs(node.path)
            outputs = dict.fromkeys(node.component.output_parameters, "")
            around = Surroundings(parameters, artifacts, outputs, dict.fromkeys(node.component.output_artifacts, ""))
            self.words(node, around)

    def words(self, node: Node, around: Surroundings) -> list[str]:
        """A step's command. InputError, with the step's name, for what KFP's driver could not resolve."""
        assert node.component.container is not None
        try:
            return command(node.component.container.words, around)
        except InputError as error:
            raise InputError(f"{node.name}: failed to resolve input parameters: {error}") from error

    def at(
        self, ended: Mapping[Path, Ended], running: frozenset[Path] = frozenset(), stopped: bool = False
    ) -> "Snapshot":
        """The pipeline at one moment. `stopped`: nothing new is to start (a failure stops by itself)."""
        return Snapshot(self, ended, running, stopped or any(not end.done for end in ended.values()))


class Snapshot:
    """States and inputs of all nodes, given what has ended and what runs. Each is computed once."""

    def __init__(self, plan: Plan, ended: Mapping[Path, Ended], running: frozenset[Path], stopped: bool) -> None:
        self._plan = plan
        self._ended = ended
        self._running = running
        self._stopped = stopped
        self._states: dict[Path, State] = {}
        self._gates: dict[Path, State] = {}
        self._inputs: dict[Path, tuple[dict[str, Value], dict[str, str]]] = {(): (dict(plan.arguments), {})}

    def states(self) -> dict[Path, State]:
        """The state of every container step, in the plan's order."""
        return {node.path: self.state(node.path) for node in self._plan.steps}

    def state(self, path: Path) -> State:
        if path not in self._states:
            node = self._plan.nodes[path]
            self._states[path] = self._step(node) if node.runs else self._group(node)
        return self._states[path]

    def _step(self, node: Node) -> State:
        if node.path in self._ended:
            return State.DONE if self._ended[node.path].done else State.FAILED
        if node.path in self._running:
            return State.RUNNING
        if node.path not in self._plan.wanted:
            return State.LEFT_OUT
        gate = self._gate(node)
        if gate is State.READY and self._stopped and not node.task.always:
            return State.NOT_RUN
        return gate

    def _group(self, node: Node) -> State:
        below = {self.state((*node.path, name)) for name in node.component.tasks}
        if not below <= SETTLED:
            return State.WAITING if below <= {State.WAITING, *SETTLED} else State.RUNNING
        return next(state for state in (State.FAILED, State.NOT_RUN, State.DONE, State.LEFT_OUT) if state in below)

    def _gate(self, node: Node) -> State:
        """READY when nothing keeps the node from starting; else why not."""
        if node.path not in self._gates:
            self._gates[node.path] = self._examined(node)
        return self._gates[node.path]

    def _examined(self, node: Node) -> State:
        parent = node.path[:-1]
        if parent:
            above = self._gate(self._plan.nodes[parent])
            if above is not State.READY:
                return above
        before = {self.state((*parent, name)) for name in node.task.waits_for}
        if node.task.always:
            return State.READY if before <= SETTLED else State.WAITING
        if before & {State.FAILED, State.NOT_RUN}:
            return State.NOT_RUN
        if State.LEFT_OUT in before:
            return State.LEFT_OUT
        return State.WAITING if before - {State.DONE} else State.READY

    # --- values -------------------------------------------------------------------------------------------------------

    def inputs(self, path: Path) -> tuple[dict[str, Value], dict[str, str]]:
        """The inputs of a node that may start: parameters, artifacts. InputError for what KFP's driver would refuse."""
        if path not in self._inputs:
            self._inputs[path] = self._resolved(self._plan.nodes[path])
        return self._inputs[path]

    def _resolved(self, node: Node) -> tuple[dict[str, Value], dict[str, str]]:
        parameters: dict[str, Value] = {}
        if not node.runs:
            # the driver of a group fills in defaults; that of a step does not
            parameters = {name: given.default for name, given in node.component.parameters.items() if given.optional}
            for name in node.task.parameters:
                parameters.pop(name, None)
        for name, source in node.task.parameters.items():
            value = self._parameter(node, name, source)
            declared = node.component.parameters.get(name)
            if value is None and isinstance(source, FromParent):
                if declared is None or not declared.optional:
                    raise InputError(f"{node.name}: the resolved input parameter is null: {source.name}")
                # as if it were not passed: without its default, too
                continue
            if declared is not None:
                value = _of_type(value, declared.kind, f"{node.name}: input parameter {name}")
            parameters[name] = value
        return parameters, {name: self._artifact(node, name, source) for name, source in node.task.artifacts.items()}

    def _parameter(self, node: Node, name: str, source: Source) -> Value:
        if isinstance(source, Constant):
            if isinstance(source.value, str) and (word := source.value.removeprefix("{{$.").removesuffix("}}")) in JOB:
                return self._plan.job_of(node)[word]
            return source.value
        if isinstance(source, FromParent):
            given = self.inputs(node.path[:-1])[0]
            if source.name not in given:
                raise InputError(f"{node.name}: parent DAG does not have input parameter {source.name}")
            value = given[source.name]
        else:
            step, output = self._producer(node, source)
            value = self._ended_well(node, name, step).parameters[output]
        check_once(value, f"{node.name}: {name}")
        return value

    def _artifact(self, node: Node, name: str, source: Source) -> str:
        if isinstance(source, FromParent):
            return self.inputs(node.path[:-1])[1][source.name]
        assert isinstance(source, FromTask)
        step, output = self._producer(node, source)
        return self._ended_well(node, name, step).artifacts[output]

    def _producer(self, node: Node, source: FromTask) -> tuple[Path, str]:
        """The step that makes an output, and its name there: down through groups."""
        at, output = (*node.path[:-1], source.task), source.output
        while not self._plan.nodes[at].runs:
            inner = self._plan.nodes[at].component.results[output]
            at, output = (*at, inner.task), inner.output
        return at, output

    def _ended_well(self, node: Node, name: str, step: Path) -> Ended:
        found = self._ended.get(step)
        if found is None or not found.done:
            raise InputError(
                f"{node.name}: its input {name} comes from {self._plan.nodes[step].name}, which wrote none"
            )
        return found


def _of_type(value: Value, kind: str, where: str) -> Value:
    """A value as an input of this type: a text takes anything, as text; the others take their own kind alone."""
    if kind == "STRING":
        return text_of(value)
    if not is_of(value, kind):
        raise InputError(f"{where} type mismatch: expect {kind}, got {value!r}")
    return value


# --- unfolding --------------------------------------------------------------------------------------------------------


def _unfold(package: Package, graph: Component, path: Path) -> Iterator[tuple[Path, Task, Component]]:
    for name in _ordered(graph):
        task = graph.tasks[name]
        component = package.components[task.component]
        here = (*path, name)
        yield here, task, component
        yield from _unfold(package, component, here)


def _ordered(graph: Component) -> list[str]:
    """The tasks of a graph, each after those it waits for; InputError for a circle."""
    left = {name: set(task.waits_for) for name, task in graph.tasks.items()}
    found: list[str] = []
    while left:
        free = sorted((name for name, before in left.items() if not before - set(found)), key=_natural)
        if not free:
            raise InputError(f"{graph.name}: {', '.join(sorted(left))} wait for each other")
        # one at a time, so that a line of tasks is followed to its end where the names allow it
        found.append(free[0])
        del left[free[0]]
    return found


def _natural(name: str) -> list[str | int]:
    """Sorts `merge-2` before `merge-11`: kfp numbers tasks of one name in the order in which they were written."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _names(steps: list[Path], tasks: Mapping[Path, Task]) -> dict[Path, str]:
    """A short name for each step: its title, with the sub-pipelines around it where that is not enough."""

    def titles(path: Path) -> list[str]:
        around = [tasks[path[:depth]] for depth in range(1, len(path))]
        return [_slug(task.title) for task in around if not _MACHINE_MADE.fullmatch(task.name)]

    names = {path: _slug(tasks[path].title) for path in steps}
    for depth in range(1, 4):
        taken = list(names.values())
        for path in steps:
            around = titles(path)
            if taken.count(names[path]) > 1 and len(around) >= depth:
                names[path] = f"{around[-depth]}/{names[path]}"
    counts: dict[str, int] = {}
    for path in steps:
        counts[names[path]] = counts.get(names[path], 0) + 1
        if counts[names[path]] > 1:
            names[path] = f"{names[path]}-{counts[names[path]]}"
    return names


def _slug(title: str) -> str:
    return re.sub(r"[^\w.]+", "-", title.lower()).strip("-.") or "step"


def _plain(word: str) -> str:
    return word.lower().replace("-", "_").replace(" ", "_")


# --- arguments --------------------------------------------------------------------------------------------------------


def checked_arguments(package: Package, given: Mapping[str, Value]) -> dict[str, Value]:
    """The pipeline's parameters from texts (or values): typed, defaults filled in. InputError for a wrong name."""
    known = package.root.parameters
    for name in given:
        if name not in known:
            near = nearest(name, known)
            raise InputError(f"--set {name}: the pipeline has no such parameter{near}; see zhllama parameters")
    values: dict[str, Value] = {}
    for name, parameter in known.items():
        value = given.get(name)
        if value is None:
            value = parameter.default
        elif isinstance(value, str):
            value = value_of(value, parameter.kind, f"--set {name}")
        if value is None and not parameter.optional:
            raise InputError(f"the pipeline's parameter {name} has no value; give it with --set {name}=…")
        values[name] = value
    return values
