"""What a pod says of itself, as the API server shows it. Pure."""

from collections.abc import Mapping
from typing import Any

_STARTS = (None, "ContainerCreating", "PodInitializing")
"""Reasons of a container that is only starting."""


def pending_reason(pod: Mapping[str, Any]) -> str:
    """Why a pod does not start, `Reason: message`: no node for it, no image, no secret, or a container that crashed and
    waits. "" where nothing is known to stand in its way."""
    return unschedulable(pod) or next(filter(None, map(waiting_reason, containers(pod))), "")


def unschedulable(pod: Mapping[str, Any]) -> str:
    """Why there is no node for a pod, "" where there is."""
    for condition in (pod.get("status") or {}).get("conditions") or ():
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return f"{condition.get('reason', '')}: {condition.get('message', '')}".rstrip(": ")
    return ""


def containers(pod: Mapping[str, Any], *kinds: str) -> list[Mapping[str, Any]]:
    """How its containers stand. kinds: initContainerStatuses, containerStatuses; both, in this order, without."""
    status = pod.get("status") or {}
    return [one for kind in kinds or ("initContainerStatuses", "containerStatuses") for one in status.get(kind) or ()]


def waiting_reason(container: Mapping[str, Any]) -> str:
    """Why a container waits, "" where it does not or is only starting."""
    waiting = (container.get("state") or {}).get("waiting") or {}
    if waiting.get("reason") in _STARTS:
        return ""
    return f"{waiting['reason']}: {waiting.get('message', '')}".rstrip(": ")


def terminations(container: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """How a container ended, the present end first: OnFailure restarts it inside its pod."""
    ends = ((container.get(name) or {}).get("terminated") for name in ("state", "lastState"))
    return [end for end in ends if end]


def crash(container: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """How it ended with another code than 0, if it has."""
    return next((end for end in terminations(container) if end.get("exitCode")), None)
