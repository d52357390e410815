"""What a pod says of itself, as the API server shows it. Pure."""

from collections.abc import Mapping
from typing import Any

_STARTS = (None, "ContainerCreating", "PodInitializing")
"""Reasons of a container that is only starting."""


def pending_reason(pod: Mapping[str, Any]) -> str:
    """Why a pod does not start, `Reason: message`: no node for it, no image, no secret, or a container that crashed and
    waits. "" where nothing is known to stand in its way."""
    status = pod.get("status") or {}
    for condition in status.get("conditions") or ():
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return f"{condition.get('reason', '')}: {condition.get('message', '')}".rstrip(": ")
    for container in (*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())):
        waiting = (container.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") not in _STARTS:
            return f"{waiting['reason']}: {waiting.get('message', '')}".rstrip(": ")
    return ""
