"""How a deployment stands, judged from what the API server says of it and of its new pods. Pure: no clock, no I/O."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from components.shared.errors import EXIT_INPUT


class State(Enum):
    WAITING = "waiting"
    READY = "ready"
    FAILED = "failed"
    WRONG_INPUT = "wrong input"
    """A pod's check says that the model is not fit to be served: no other try will mend it."""


@dataclass(frozen=True)
class Progress:
    state: State
    reason: str = ""
    address: str = ""
    """Where it answers within the cluster, if the object says."""


def judge_deployment(deployment: dict[str, Any], pods: Sequence[dict[str, Any]]) -> Progress:
    """Ready when every replica is of the newest kind, available, and no older one is left. `pods`: the new ones."""
    spec, status = deployment["spec"], deployment.get("status", {})
    wrong = _wrong_input(pods)
    if wrong:
        return Progress(State.WRONG_INPUT, wrong)
    if status.get("observedGeneration", 0) < deployment["metadata"].get("generation", 1):
        return Progress(State.WAITING, "the controller has not seen it yet")
    wanted = spec.get("replicas", 1)
    counted = [status.get(name, 0) for name in ("updatedReplicas", "availableReplicas", "replicas")]
    if counted == [wanted] * 3:
        return Progress(State.READY)
    why = _why(pods)
    for condition in status.get("conditions", ()):
        if condition["type"] == "Progressing" and condition.get("reason") == "ProgressDeadlineExceeded":
            return Progress(State.FAILED, why or condition.get("message", "the deadline has passed"))
    return Progress(State.WAITING, why or f"{counted[1]} of {wanted} ready")


def judge_inference_service(service: dict[str, Any], pods: Sequence[dict[str, Any]]) -> Progress:
    """Ready when KServe says so of what was applied last; its address is the cluster's own where there is one."""
    status = service.get("status", {})
    wrong = _wrong_input(pods)
    if wrong:
        return Progress(State.WRONG_INPUT, wrong)
    if status.get("observedGeneration", 0) < service["metadata"].get("generation", 1):
        return Progress(State.WAITING, "KServe has not seen it yet")
    conditions = {condition["type"]: condition for condition in status.get("conditions", ())}
    ready = conditions.get("Ready", {})
    running = [pod for pod in pods if is_ready(pod)]
    if ready.get("status") == "True" and running:
        address = (status.get("address") or {}).get("url") or status.get("url") or ""
        return Progress(State.READY, address=address.rstrip("/"))
    why = _why(pods) or " ".join(filter(None, (ready.get("reason"), ready.get("message"))))
    return Progress(State.WAITING, why or "KServe says nothing of it yet")


def is_ready(pod: dict[str, Any]) -> bool:
    conditions = pod.get("status", {}).get("conditions", ())
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)


def _containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    status = pod.get("status", {})
    return [*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())]


def _ended(container: dict[str, Any]) -> dict[str, Any] | None:
    """How the container last ended, if it has."""
    for name in ("state", "lastState"):
        found: dict[str, Any] | None = container.get(name, {}).get("terminated")
        if found is not None and found.get("exitCode"):
            return found
    return None


def _wrong_input(pods: Sequence[dict[str, Any]]) -> str:
    for pod in pods:
        for container in pod.get("status", {}).get("initContainerStatuses", ()):
            end = _ended(container)
            if end is not None and end["exitCode"] == EXIT_INPUT:
                message = (end.get("message") or "").strip().splitlines()
                return message[-1].removeprefix("error: ") if message else "the model is not fit to be served"
    return ""


def _why(pods: Sequence[dict[str, Any]]) -> str:
    """What keeps a pod: no node, no image, no secret, or how its server ended."""
    for pod in pods:
        name = pod["metadata"]["name"]
        for condition in pod.get("status", {}).get("conditions", ()):
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                return f"{name}: {condition.get('reason', '')}: {condition.get('message', '')}"
        for container in _containers(pod):
            end = _ended(container)
            waiting = container.get("state", {}).get("waiting") or {}
            if end is not None:
                last = (end.get("message") or end.get("reason") or "").strip().splitlines()[-1:]
                return f"{name}: {container['name']} ended with {end['exitCode']}: {''.join(last)}"
            if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
                return f"{name}: {container['name']}: {waiting['reason']}: {waiting.get('message', '')}"
    return ""
