"""What a pod says of itself, as the API server shows it. Pure."""

import re
from collections.abc import Mapping
from typing import Any

_STARTS = (None, "ContainerCreating", "PodInitializing")
"""Reasons of a container that is only starting."""
_IMAGE = (
    "ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "RegistryUnavailable", "SignatureValidationFailed"
)  # fmt: skip
"""A pull: what failed, and the wait until it is tried again, take turns."""
_STUCK = (*_IMAGE, "InvalidImageName", "ImageInspectError", "CreateContainerConfigError", "CreateContainerError")
"""Reasons of a container that waits for what somebody has to mend."""


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
    message = waiting.get("message") or ""
    if waiting["reason"] in _IMAGE:
        # `failed to pull and unpack image "a": failed to resolve reference "a": failed to do request: Head "…": why`
        message = re.sub(r'^([^"]*"[^"]*": ).*": ', r"\1", message, flags=re.DOTALL)
    return f"{waiting['reason']}: {message}".rstrip(": ")


def matter_of(reason: str) -> str:
    """What a reason is about: a pull that fails and one that waits for its next try are one matter, in many words."""
    return re.sub("|".join(_IMAGE), "image", reason).split("image:")[0]


def stuck(reason: str) -> bool:
    """Whether a pod's reason not to start (pending_reason) is one that no waiting mends."""
    return reason.startswith(_STUCK) or (reason.startswith("Unschedulable") and "persistentvolumeclaim" in reason)


def terminations(container: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """How a container ended, the present end first: OnFailure restarts it inside its pod."""
    ends = ((container.get(name) or {}).get("terminated") for name in ("state", "lastState"))
    return [end for end in ends if end]


def crash(container: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """How it ended with another code than 0, if it has."""
    return next((end for end in terminations(container) if end.get("exitCode")), None)
