"""What a job and its pods, as the API server shows them, mean to the launcher. Pure: no clock, no network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from components.shared.errors import EXIT_INPUT


class State(Enum):
    WAITING = "waiting"
    """Created, or suspended in a queue: no pod runs yet."""
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    """Worth another attempt."""
    WRONG_INPUT = "wrong input"
    """The training said that its input is wrong: another attempt would say so again."""
    GONE = "gone"
    """Deleted from outside."""


@dataclass(frozen=True)
class Verdict:
    state: State
    reason: str = ""

    @property
    def over(self) -> bool:
        return self.state not in (State.WAITING, State.RUNNING)


def judge(job: Mapping[str, Any] | None, pods: Sequence[Mapping[str, Any]]) -> Verdict:
    """The verdict on a job (None: the API server has none of that name) and its pods."""
    if job is None:
        return Verdict(State.GONE, "the job was deleted from outside")
    conditions = {
        condition["type"]: condition
        for condition in job.get("status", {}).get("conditions", ())
        if condition.get("status") == "True"
    }
    if "Succeeded" in conditions:
        return Verdict(State.SUCCEEDED)
    for pod in pods:
        wrong = _wrong_input(pod)
        if wrong is not None:
            return Verdict(State.WRONG_INPUT, wrong)
    if "Failed" in conditions:
        failed = conditions["Failed"]
        said = next(filter(None, map(_last_words, pods)), "")
        text = f"{failed.get('reason', 'Failed')}: {failed.get('message', '')}".strip(": ")
        return Verdict(State.FAILED, f"{text}; {said}" if said else text)
    if "Suspended" in conditions:
        return Verdict(State.WAITING, "suspended: it waits in its queue")
    if "Running" in conditions or "Restarting" in conditions:
        return Verdict(State.RUNNING)
    return Verdict(State.WAITING, "created: its pods are starting")


def _terminations(pod: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """How the pod's containers ended, the present end first: OnFailure restarts a container inside its pod."""
    found = []
    for status in pod.get("status", {}).get("containerStatuses") or ():
        for name in ("state", "lastState"):
            terminated = (status.get(name) or {}).get("terminated")
            if terminated:
                found.append(terminated)
    return found


def _wrong_input(pod: Mapping[str, Any]) -> str | None:
    for end in _terminations(pod):
        if end.get("exitCode") == EXIT_INPUT:
            message = " ".join((end.get("message") or "").split())
            return message.removeprefix("error: ") or f"pod {pod['metadata']['name']} ended with 2; see its log"
    return None


def _last_words(pod: Mapping[str, Any]) -> str:
    for end in _terminations(pod):
        if end.get("exitCode"):
            message = " ".join((end.get("message") or end.get("reason") or "").split())
            return f"pod {pod['metadata']['name']} ended with {end['exitCode']}" + (f": {message}" if message else "")
    return ""
