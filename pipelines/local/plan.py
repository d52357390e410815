"""What may run now: the state of every task of a pipeline, from what has ended so far. Pure.

The graph is unfolded into nodes: container steps and groups of tasks. As Argo does it for KFP, a task starts when all
that it waits for is done, a group with all that is in it; after a failure nothing new starts but what waits for an end
(an exit handler). Inputs are resolved as KFP 2.17.0's driver does it, and once before anything runs (`Plan.rehearse`).
"""

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from graphlib import CycleError, TopologicalSorter
from heapq import heappop, heappush
from typing import Any

from pipelines.local.ir import Component, Constant, FromParent, FromTask, Package, Source, Task
from pipelines.local.placeholders import JOB, Surroundings, Value, check_once, command, is_of, text_of, value_of
from zhllama.errors import InputError
from zhllama.stage.command_line import nearest

Path = tuple[str, ...]
"""Where a task stands: the names of the tasks around it, then its own."""

_STAND_INS: Mapping[str, Value] = {
    "STRING": "", "NUMBER_INTEGER": 0, "NUMBER_DOUBLE": 0.0, "BOOLEAN": False, "LIST": [], "STRUCT": {},
}  # fmt: skip
"""What a step that has not run may be taken to have written, by KFP type."""


class State(StrEnum):
    WAITING = "waiting"
    READY = "ready"
    RUNNING = "running"
    DONE = "done"
    UNCHANGED = "unchanged"
    """Done in an earlier run, as a table shows it; to the plan it is done."""
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
        return bool(self.component.words)

    @property
    def module(self) -> str:
        """The stage that the step's command runs: `train_tokenizer` of `python -m components.train_tokenizer`."""
        return next((word.split(".", 1)[1] for word in self.component.words if word.startswith("components.")), "")


@dataclass(frozen=True)
class Ended:
    """How a step ended, and what it gave."""

    done: bool
    parameters: Mapping[str, Value] = field(default_factory=dict)
    artifacts: Mapping[str, str] = field(default_factory=dict)
    """Output artifact → where it lies."""


class Plan:
    """A pipeline with its arguments, unfolded. `steps`: its container steps, in an order in which they could run."""

    def __init__(self, package: Package, arguments: Mapping[str, Value], job: Mapping[str, str]) -> None:
        self.arguments = arguments
        self.job = job
        found = list(_unfold(package, package.root, ()))
        names = _names([path for path, _, component in found if component.words], {p: t for p, t, _ in found})
        self.nodes = {path: Node(path, task, component, names.get(path, task.title)) for path, task, component in found}
        self.steps = [node for node in self.nodes.values() if node.runs]
        self.wanted = {node.path for node in self.steps}

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

    def until(self, steps: list[Node]) -> None:
        """Leaves out every step that none of these needs (what runs at the end whatever happens stays)."""
        always = {node.path for node in self.steps if node.task.always}
        self.wanted = always.union(*({node.path, *self.before(node.path)} for node in steps))

    def before(self, path: Path) -> set[Path]:
        """The steps that must have ended before this one can start."""
        found: set[Path] = set()
        left = [path]
        while left:
            here = left.pop()
            for depth in range(len(here)):
                for name in self.nodes[here[: depth + 1]].task.waits_for:
                    group = (*here[:depth], name)
                    new = {node.path for node in self.steps if node.path[: depth + 1] == group} - found
                    found |= new
                    left += new
        return found

    def after(self, path: Path) -> set[Path]:
        """The steps that need this one."""
        return {node.path for node in self.steps if path in self.before(node.path) and not node.task.always}

    def rehearse(self) -> None:
        """InputError for a step whose inputs or command KFP's driver could not resolve, whatever the others write."""
        ended = {}
        for node in self.steps:
            written = {name: _STAND_INS[kind] for name, kind in node.component.output_parameters.items()}
            ended[node.path] = Ended(True, written, dict.fromkeys(node.component.output_artifacts, ""))
        snapshot = Snapshot(self, ended)
        for node in self.steps:
            files = dict.fromkeys(node.component.output_parameters, "")
            self.words(node, Surroundings(*snapshot.inputs(node.path), files, ended[node.path].artifacts))

    def words(self, node: Node, around: Surroundings) -> list[str]:
        """A step's command. InputError, with the step's name, for what KFP's driver could not resolve."""
        try:
            words = command(node.component.words, around)
        except InputError as error:
            raise InputError(f"{node.name}: failed to resolve input parameters: {error}") from error
        if not words:
            raise InputError(f"{node.name}: no word of its command is left")
        return words


class Snapshot:
    """States and inputs, given what has ended and what runs. `states`: of every container step, in the plan's order.
    `stopped`: nothing new is to start (a failure stops by itself)."""

    def __init__(
        self, plan: Plan, ended: Mapping[Path, Ended], running: Collection[Path] = (), stopped: bool = False
    ) -> None:
        stopped = stopped or not all(end.done for end in ended.values())
        self._plan = plan
        self._ended = ended
        self._inputs: dict[Path, tuple[dict[str, Value], dict[str, str]]] = {(): (dict(plan.arguments), {})}
        self.states: dict[Path, State] = {}
        gates: dict[Path, State] = {(): State.READY}
        # what a node waits for, and what is in that, stands before it
        for path, node in plan.nodes.items():
            gates[path] = gate = self._gate(node, gates[path[:-1]])
            if node.runs:
                if path in ended:
                    gate = State.DONE if ended[path].done else State.FAILED
                elif path in running:
                    gate = State.RUNNING
                elif path not in plan.wanted:
                    gate = State.LEFT_OUT
                elif gate is State.READY and stopped and not node.task.always:
                    gate = State.NOT_RUN
                self.states[path] = gate

    def _gate(self, node: Node, above: State) -> State:
        """READY when nothing keeps the node from starting; else why not."""
        if above is not State.READY:
            return above
        before = {self._how((*node.path[:-1], name)) for name in node.task.waits_for}
        if node.task.always:
            return State.READY if before <= SETTLED else State.WAITING
        if before & {State.FAILED, State.NOT_RUN}:
            return State.NOT_RUN
        if State.LEFT_OUT in before:
            return State.LEFT_OUT
        return State.WAITING if before - {State.DONE} else State.READY

    def _how(self, path: Path) -> State:
        """How a step or a group stands: the worst of what is in it."""
        within = [path] if path in self.states else [step for step in self.states if step[: len(path)] == path]
        inside = {self.states[step] for step in within}
        if not inside <= SETTLED:
            return State.WAITING
        return next(state for state in (State.FAILED, State.NOT_RUN, State.DONE, State.LEFT_OUT) if state in inside)

    def inputs(self, path: Path) -> tuple[dict[str, Value], dict[str, str]]:
        """The inputs of a node that may start: parameters, artifacts. InputError for what KFP's driver would refuse."""
        if path not in self._inputs:
            node = self._plan.nodes[path]
            parameters, artifacts = self._parameters(node), {}
            for name, source in node.task.artifacts.items():
                if isinstance(source, FromParent):
                    artifacts[name] = self.inputs(path[:-1])[1][source.name]
                else:
                    artifacts[name] = self._made(node, name, source, "artifacts")
            self._inputs[path] = parameters, artifacts
        return self._inputs[path]

    def _parameters(self, node: Node) -> dict[str, Value]:
        declared, passed = node.component.parameters, node.task.parameters
        # the driver of a group fills in defaults; that of a step does not
        filled = {} if node.runs else {name: one for name, one in declared.items() if one.optional}
        values = {name: one.default for name, one in filled.items() if name not in passed}
        for name, source in passed.items():
            value = self._parameter(node, name, source)
            if value is None and isinstance(source, FromParent):
                if name not in declared or not declared[name].optional:
                    raise InputError(f"{node.name}: the resolved input parameter is null: {source.name}")
                # as if it were not passed: without its default, too
                continue
            if name in declared:
                # a text takes anything, as text; the others take their own kind alone
                if (kind := declared[name].kind) == "STRING":
                    value = text_of(value)
                elif not is_of(value, kind):
                    raise InputError(
                        f"{node.name}: input parameter {name} type mismatch: expect {kind}, got {value!r:.80}"
                    )
            values[name] = value
        return values

    def _parameter(self, node: Node, name: str, source: Source) -> Value:
        if isinstance(source, Constant):
            if isinstance(source.value, str) and (word := source.value.removeprefix("{{$.").removesuffix("}}")) in JOB:
                of_task = {"pipeline_task_name": node.task.name, "pipeline_task_uuid": "-".join(node.path)}
                return {**self._plan.job, **of_task}[word]
            return source.value
        if isinstance(source, FromParent):
            given = self.inputs(node.path[:-1])[0]
            if source.name not in given:
                raise InputError(f"{node.name}: parent DAG does not have input parameter {source.name}")
            value = given[source.name]
        else:
            value = self._made(node, name, source, "parameters")
        check_once(value, f"{node.name}: {name}")
        return value

    def _made(self, node: Node, name: str, source: Source, kind: str) -> Any:
        """An output of the step that makes it: down through groups."""
        assert isinstance(source, FromTask)
        maker = self._plan.nodes[(*node.path[:-1], source.task)]
        while not maker.runs:
            source = maker.component.results[source.output]
            maker = self._plan.nodes[(*maker.path, source.task)]
        ended = self._ended.get(maker.path)
        if ended is None or not ended.done:
            raise InputError(f"{node.name}: its input {name} comes from {maker.name}, which wrote none")
        return getattr(ended, kind)[source.output]


# --- unfolding --------------------------------------------------------------------------------------------------------


def _unfold(package: Package, graph: Component, path: Path) -> Iterator[tuple[Path, Task, Component]]:
    """The tasks of a graph, each after those it waits for; InputError for a circle."""
    order = TopologicalSorter({name: task.waits_for for name, task in graph.tasks.items()})
    try:
        order.prepare()
    except CycleError as error:
        raise InputError(f"{graph.name}: {', '.join(sorted(set(error.args[1])))} wait for each other") from error
    free: list[tuple[list[Any], str]] = []
    while order.is_active():
        for name in order.get_ready():
            heappush(free, (_numbered(name), name))
        # one at a time, so that a line of tasks is followed to its end where the names allow it; `merge-2` before
        # `merge-11`: kfp numbers tasks of one name in the order in which they were written
        _, name = heappop(free)
        order.done(name)
        task = graph.tasks[name]
        component = package.components[task.component]
        yield (*path, name), task, component
        yield from _unfold(package, component, (*path, name))


def _numbered(name: str) -> list[Any]:
    """Texts and numbers by turns; a number by its length, since it may have any."""
    return [
        (len(part.lstrip("0")), part) if number % 2 else part for number, part in enumerate(re.split(r"(\d+)", name))
    ]


def _names(steps: list[Path], tasks: Mapping[Path, Task]) -> dict[Path, str]:
    """A short name for each step: its title, with the sub-pipelines around it where that is not enough."""

    def slug(path: Path) -> str:
        return re.sub(r"[^\w.]+", "-", tasks[path].title.lower()).strip("-.") or "step"

    names = {path: slug(path) for path in steps}
    for depth in range(1, 4):
        taken = Counter(names.values())
        for path in steps:
            groups = [path[:end] for end in range(1, len(path)) if not re.fullmatch(r"exit-handler-\d+", path[end - 1])]
            if taken[names[path]] > 1 and len(groups) >= depth:
                names[path] = f"{slug(groups[-depth])}/{names[path]}"
    folders: set[str] = set()
    for path in steps:
        name, number = names[path], 1
        while folder_of(names[path]) in folders:
            number += 1
            names[path] = f"{name}-{number}"
        folders.add(folder_of(names[path]))
    return names


def folder_of(name: str) -> str:
    """A step's folder below the work folder's steps/."""
    plain = name.replace("/", ".")
    short = len(plain.encode()) <= 200
    return plain if short else f"{plain[:40]}-{hashlib.sha256(plain.encode()).hexdigest()[:16]}"


def _plain(word: str) -> str:
    return word.lower().replace("-", "_").replace(" ", "_")


def checked_arguments(package: Package, given: Mapping[str, Value]) -> dict[str, Value]:
    """The pipeline's parameters from texts (or values): typed, defaults filled in. InputError for a wrong name."""
    known = package.root.parameters
    for name in given:
        if name not in known:
            missing = f"the pipeline has no such parameter{nearest(name, known)}"
            raise InputError(f"--set {name}: {missing}; see zhllama parameters")
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
