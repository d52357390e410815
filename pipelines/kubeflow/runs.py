"""A run and its steps, as people speak of them, out of what the API's task list shows.

The list holds Argo's nodes: for a step or a group X its driver, itself and an `executor`, each again as an attempt,
`X(0)`. Where a Workflow has grown past 1 MiB the list stops for ever: the run's own state wins over its tasks'. A
cancelled run ends FAILED; that it was CANCELING stands in its history.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

DONE, FAILED, CANCELLED, CANCELING = "SUCCEEDED", "FAILED", "CANCELED", "CANCELING"
RUNNING, PENDING, NOT_RUN, UNKNOWN = "RUNNING", "PENDING", "NOT_RUN", "UNKNOWN"
KNOWN = (PENDING, RUNNING, CANCELING, DONE, FAILED, CANCELLED, "SKIPPED", "PAUSED")
"""The API's states of a run."""
OVER = (DONE, FAILED, CANCELLED, "SKIPPED")
"""States of a run (or a step) that do not change any more."""
WORDS = {CANCELLED: "cancelled", CANCELING: "being cancelled", NOT_RUN: "not run", UNKNOWN: "not known"}
_GROUP = re.compile(r"(condition(-branches)?|exit-handler|for-loop)-\d+(\.onExit)?")
_ATTEMPT = re.compile(r"\(\d+(:\d+)?\)$")
_DRIVER = "-driver"
_LAST = datetime.max.replace(tzinfo=UTC)
QUIET = timedelta(minutes=5)
"""How long a run may go on without a step that runs or waits; a driver's pod takes a minute at most to start."""


def word(state: str) -> str:
    """A state as it is shown."""
    return WORDS.get(state) or (state.lower() if state in KNOWN else f"not known ({state or 'none'})")


@dataclass(frozen=True)
class Step:
    task: str
    """As the pipeline's graph calls it: launch-training-2."""
    name: str
    """As people call it: train_lora."""
    state: str
    started: datetime | None = None
    ended: datetime | None = None
    said: str = ""
    """Why it failed, or what it waits for; "" where that is not known."""


@dataclass(frozen=True)
class Run:
    id: str
    name: str
    state: str
    started: datetime | None
    ended: datetime | None
    steps: tuple[Step, ...]
    cancelled_at: datetime | None = None
    stopped: bool = False
    """Whether the list of steps has stopped before the run did, or is empty."""
    said: str = ""
    """What the Workflow itself says of a failure that is no step's."""
    note: str = ""
    """What could not be read, and what would be needed for it."""

    @property
    def known(self) -> bool:
        """Whether its state is one of those that we know: of another, nothing is believed."""
        return self.state in KNOWN

    @property
    def over(self) -> bool:
        return self.state in OVER

    def quiet(self, now: datetime) -> bool:
        """Whether it goes on, and its list has shown no step that runs or waits for a while."""
        if self.over or any(step.state in (RUNNING, PENDING) for step in self.steps):
            return False
        times = [self.started, *(time for step in self.steps for time in (step.started, step.ended))]
        last = max((time for time in times if time is not None), default=None)
        return last is not None and now - last > QUIET

    @property
    def failed_first(self) -> Step | None:
        failed = [step for step in self.steps if step.state == FAILED]
        return min(failed, key=lambda step: (step.ended or _LAST, step.name), default=None)


def titles_of(spec: Any) -> dict[str, str]:
    """Task → the name that the pipeline gives it, from a pipeline's specification (alone, or with a platform's)."""
    whole = (spec.get("pipeline_spec") or spec) if isinstance(spec, Mapping) else {}
    found: dict[str, str] = {}
    for component in (whole.get("root"), *(whole.get("components") or {}).values()):
        found |= titles_of_component(component)
    return found


def titles_of_component(component: Any) -> dict[str, str]:
    tasks = ((component or {}).get("dag") or {}).get("tasks") or {}
    return {name: str((task.get("taskInfo") or {}).get("name") or name) for name, task in tasks.items()}


def title(task: str, titles: Mapping[str, str]) -> str:
    return titles.get(task) or task.replace("-", "_")


def at(time: datetime | None) -> datetime | None:
    """A time of the server's, which is UTC where it does not say; its zero (the year 1) is none."""
    return time.replace(tzinfo=time.tzinfo or UTC).astimezone(UTC) if time is not None and time.year > 1 else None


def run_of(answer: Any, titles: Mapping[str, str]) -> Run:
    """What `runs/{id}` answered."""
    history = [status for status in answer.state_history or () if str(status.state) == CANCELING]
    state = str(answer.state or "")
    cancelled_at = at(history[0].update_time) if history else None
    if history and state == FAILED:
        state = CANCELLED
    tasks = (answer.run_details.task_details if answer.run_details else None) or ()
    ended = at(answer.finished_at) if state in OVER else None
    steps = tuple(ordered(_steps(tasks, titles)))
    stopped = not steps or any(str(task.state) in (RUNNING, PENDING) for task in tasks)
    run = Run(str(answer.run_id), str(answer.display_name or answer.run_id), state, at(answer.created_at), ended, steps,
              cancelled_at, stopped and state in OVER)  # fmt: skip
    return settled(run)


def settled(run: Run) -> Run:
    """What is unfinished in a run that is over is not known; what failed after it was told to end was cancelled."""

    def seen(step: Step) -> Step:
        if run.over and step.state in (RUNNING, PENDING):
            return replace(step, state=UNKNOWN, ended=None)
        if step.state == FAILED and run.cancelled_at and step.ended and step.ended >= run.cancelled_at:
            return replace(step, state=CANCELLED)
        return step

    return replace(run, steps=tuple(seen(step) for step in run.steps))


def ordered(steps: Iterable[Step]) -> list[Step]:
    """As they began; those that did not run at the end."""
    return sorted(steps, key=lambda step: (step.started or _LAST, step.name))


def _steps(tasks: Iterable[Any], titles: Mapping[str, str]) -> list[Step]:
    named = {str(task.display_name): task for task in tasks if task.display_name}
    nodes = [str(child.pod_name) for task in named.values() for child in task.child_tasks or () if child.pod_name]
    others = {"root", "executor", *(node.rpartition("-")[0] for node in nodes)}

    def other(name: str) -> bool:
        return name in others or _GROUP.fullmatch(name) is not None

    known = [name for name in named if name in titles or not (other(name) or _ATTEMPT.search(name))]
    steps = {name if name in titles else name.removesuffix(_DRIVER) for name in known if not _GROUP.fullmatch(name)}
    return [_step(name, named.get(name), named.get(name + _DRIVER), titles) for name in steps if not other(name)]


def _step(name: str, task: Any, driver: Any, titles: Mapping[str, str]) -> Step:
    def state(one: Any) -> str:
        return str(one.state or NOT_RUN) if one is not None else ""

    step = Step(name, title(name, titles), NOT_RUN)
    if state(driver) == FAILED:
        return replace(step, state=FAILED, started=at(driver.start_time), ended=at(driver.end_time))
    if task is None and state(driver) != NOT_RUN:
        return replace(step, state=PENDING, started=at(driver.start_time))
    if task is None or state(task) == NOT_RUN:
        return step
    ended = at(task.end_time) if state(task) in OVER else None
    return replace(step, state=state(task), started=at(task.start_time), ended=ended)
