"""How a deployment stands, and whose it is to say how many pods it has. Pure: no clock, no I/O.

The new pods are those of the newest ReplicaSet: labels do not tell them (two versions may differ in a label alone), nor
do counts (`status.replicas` leaves out a pod that is terminating, which may be Ready for a minute more).

How many there are is ours, until another manager or an autoscaler says it: a forced apply takes a field from its
manager without a word, so what is another's is left out of what is applied. Where an autoscaler has not set it yet it
is applied as it stands: a field that its only manager leaves out falls back to the API's default, one pod. Likewise
with what else another has set, a policy or memory, say; what decides which model is served is taken back.
"""

import re
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, NamedTuple

from zhllama.artifacts.json_file import value_of
from zhllama.errors import EXIT_INPUT, InputError
from zhllama.kubernetes.pod_state import containers, crash, unschedulable, waiting_reason

MANAGER = "zhllama"
SCALE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "Deployment": (("spec",), ("replicas",)),
    "InferenceService": (("spec", "predictor"), ("minReplicas", "maxReplicas")),
}
"""Of each kind that has pods: where it says how many, and in which fields."""
REVISION = "deployment.kubernetes.io/revision"


class Progress(NamedTuple):
    """How far an object is: ready where there are new pods that answer."""

    reason: str = "ready"
    late: bool = False
    """Whether the object's own deadline is over."""
    address: str = ""
    """Where it answers within the cluster, if the object says."""
    pods: tuple[dict[str, Any], ...] = ()


def controlled_by(things: Sequence[dict[str, Any]], uid: str) -> list[dict[str, Any]]:
    """Those whose controller has that uid."""
    own = {"controller": True, "uid": uid}.items()
    return [
        thing for thing in things if any(own <= one.items() for one in thing["metadata"].get("ownerReferences", ()))
    ]


def newest_replica_set(deployment: dict[str, Any], sets: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The one of the Deployment's current template, once its controller has seen it: a rollback raises the revision of
    the ReplicaSet that it goes back to."""
    own = controlled_by(sets, deployment["metadata"]["uid"])
    return max(own, key=lambda one: int(one["metadata"].get("annotations", {}).get(REVISION, 0)), default=None)


def judge_deployment(deployment: dict[str, Any], pods: Sequence[dict[str, Any]]) -> Progress:
    """Ready when every replica is of the newest kind, available, and no older one is left. `pods`: the new ones.
    InputError when the check of one says that the model is not fit to be served: no other try will mend it."""
    spec, status = deployment["spec"], deployment.get("status", {})
    if status.get("observedGeneration", 0) < deployment["metadata"].get("generation", 1):
        return Progress("the controller has not seen it yet")
    _require_fit(pods)
    wanted = spec.get("replicas", 1)
    counted = [status.get(name, 0) for name in ("updatedReplicas", "availableReplicas", "replicas")]
    ready = tuple(pod for pod in pods if answers(pod))
    if counted == [wanted] * 3 and ready:
        return Progress(pods=ready)
    conditions = status.get("conditions", ())
    why = f"{len(ready)} of {wanted} new pods ready"
    if len(ready) >= wanted:
        # what is left of the others, or of the controller's counting, is waited for
        more = status.get("replicas", 0) - wanted
        rest = f"{more} more pods have to go" if more > 0 else "the Deployment does not say so yet"
        why = f"its new pods are ready, {rest}"
    why = _why(pods) or why
    late = any(one["type"] == "Progressing" and one.get("reason") == "ProgressDeadlineExceeded" for one in conditions)
    return Progress(_joined(why, *_complaints(conditions)), late)


def judge_inference_service(
    service: dict[str, Any], rollouts: Sequence[tuple[dict[str, Any], Sequence[dict[str, Any]]]]
) -> Progress:
    """Ready when KServe says so, and its Deployments have brought what was applied last. `rollouts`: each of them, and
    its new pods. Its address is the cluster's own where there is one.

    In the Standard mode KServe's `observedGeneration` is its Deployment's and its Ready that of the old pods.
    """
    status = service.get("status", {})
    complaints = _complaints(status.get("conditions", ()))
    if failure := (status.get("modelStatus") or {}).get("lastFailureInfo"):
        complaints.append(": ".join(filter(None, (failure.get("reason"), failure.get("message")))))
    wanted = service["spec"]["predictor"].get("labels", {})
    labels = [one["spec"]["template"]["metadata"].get("labels", {}) for one, _ in rollouts]
    if not rollouts or not all(wanted.items() <= each.items() for each in labels):
        return Progress(_joined("KServe has made no Deployment of it yet", *complaints))
    ready: list[dict[str, Any]] = []
    for deployment, pods in rollouts:
        progress = judge_deployment(deployment, pods)
        if not progress.pods:
            # the deadline of KServe's Deployments is KServe's, ten minutes: shorter than large models take to load
            return Progress(_joined(progress.reason, *complaints))
        ready += progress.pods
    if not any(one["type"] == "Ready" and one["status"] == "True" for one in status.get("conditions", ())):
        return Progress(_joined("its pods are ready, KServe does not say so yet", *complaints))
    address = (status.get("address") or {}).get("url") or status.get("url") or ""
    return Progress(address=address.rstrip("/"), pods=tuple(ready))


def answers(pod: dict[str, Any]) -> bool:
    """Whether a pod is ready, and not about to go."""
    conditions = pod.get("status", {}).get("conditions", ())
    ready = any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)
    return ready and "deletionTimestamp" not in pod["metadata"]


def _complaints(conditions: Sequence[dict[str, Any]]) -> list[str]:
    """What an object's conditions say is wrong; refused pods first, since they are why the rest is."""
    said = []
    for one in sorted(conditions, key=lambda one: one["type"] != "ReplicaFailure"):
        wrong = "True" if one["type"] == "ReplicaFailure" else "False"
        reason, message = one.get("reason"), one.get("message")
        if one["status"] == wrong and (reason or message):
            in_brackets = f" ({reason})" if reason else ""
            said.append(f"{one['type']}={wrong}{in_brackets}" + (f": {message}" if message else ""))
    return said


def _joined(*parts: str) -> str:
    """In one line; what is said twice, once."""
    return "; ".join(dict.fromkeys(" ".join(part.split()) for part in parts if part))


def _require_fit(pods: Sequence[dict[str, Any]]) -> None:
    for pod in pods:
        for container in containers(pod, "initContainerStatuses"):
            if (end := crash(container)) and end["exitCode"] == EXIT_INPUT:
                said = _last_line(end.get("message"))
                raise InputError(said.removeprefix("error: ") or "the model is not fit to be served")


def _last_line(text: str | None) -> str:
    return "".join((text or "").strip().splitlines()[-1:])


def _why(pods: Sequence[dict[str, Any]]) -> str:
    """What keeps a pod: no node, no image, no secret, how its server ended, or what it says of itself."""
    staying = {pod["metadata"]["name"]: pod for pod in pods if "deletionTimestamp" not in pod["metadata"]}
    for name, pod in staying.items():
        if reason := unschedulable(pod):
            return f"{name}: {reason}"
        for container in containers(pod):
            if end := crash(container):
                last = _last_line(end.get("message") or end.get("reason"))
                return f"{name}: {container['name']} ended with {end['exitCode']}: {last}"
            if reason := waiting_reason(container):
                return f"{name}: {container['name']}: {reason}"
    for name, pod in staying.items():
        for condition in pod.get("status", {}).get("conditions", ()):
            if condition["type"] == "Ready" and condition["status"] == "False" and condition.get("message"):
                return f"{name} is not ready: {condition['message']}"
    return ""


# --- how many pods ----------------------------------------------------------------------------------------------------
def targets(autoscaler: dict[str, Any], thing: dict[str, Any]) -> bool:
    """Whether a HorizontalPodAutoscaler of the object's namespace scales it."""
    target = autoscaler["spec"]["scaleTargetRef"]
    groups = [value.get("apiVersion", "").rpartition("/")[0] for value in (target, thing)]
    return (target["kind"], target["name"], groups[0]) == (thing["kind"], thing["metadata"]["name"], groups[1])


def managers(found: dict[str, Any] | None, path: Sequence[str]) -> list[str]:
    """Who else has set the field at that path."""
    others = []
    for entry in (found or {}).get("metadata", {}).get("managedFields", ()):
        fields: Any = entry.get("fieldsV1", {})
        for step in path:
            fields = fields.get(f"f:{step}") if isinstance(fields, dict) else None
        if fields is not None and entry["manager"] != MANAGER:
            others.append(str(entry["manager"]))
    return others


def with_anothers_scale(
    wanted: dict[str, Any], found: dict[str, Any] | None, autoscaler: str = ""
) -> tuple[dict[str, Any], str]:
    """The object as it is to be applied over what was found, and what of its scale stays as it is, in words ("" where
    it is ours). `autoscaler`: the name of one that targets it."""
    place, fields = SCALE.get(wanted["kind"], ((), ()))
    theirs = {field: names for field in fields if (names := managers(found, [*place, field]))}
    if not theirs and not autoscaler:
        return wanted, ""
    made = deepcopy(wanted)
    there, scale = found or {}, made
    for step in place:
        there, scale = there.get(step, {}), scale[step]
    for field in fields:
        scale.pop(field, None)
        if field not in theirs and field in there:
            scale[field] = there[field]
    said = [
        f"{field} stays {there.get(field)}: it is set by {' and '.join(names)}" for field, names in theirs.items()
    ] or [f"the HorizontalPodAutoscaler {autoscaler} says how many pods there are"]
    return made, "; ".join(said)


# --- what else is another's -------------------------------------------------------------------------------------------

_SERVED = re.compile(
    r"ontainers(\[[^\]]*\](\.(command|args|env)\b.*)?)?$|\.image$"
    r"|(labels|annotations)\.zhllama\.io/|^\.spec\.(selector|ports)\b"
)
"""Fields that decide which model is served, and whether it is reached: ours, whoever has changed them."""


def conflicts(answer: str | None) -> list[tuple[str, str]]:
    """What a server says why it did not apply: fields, each with the manager that has set it."""
    try:
        causes = value_of(answer or "")["details"]["causes"]
    except (ValueError, KeyError, TypeError):
        return []
    return [
        (one["field"], [*one["message"].split('"')[1:2], "another"][0])
        for one in causes
        if one.get("reason") == "FieldManagerConflict"
    ]


def without_others(asked: dict[str, Any], theirs: Sequence[tuple[str, str]]) -> tuple[dict[str, Any], list[str]]:
    """The object without what others have set in it, and that in words, field by field."""
    made, said = deepcopy(asked), []
    for field, manager in theirs:
        if not _SERVED.search(field) and _leave_out(made, field):
            said.append(f"{field} stays as {manager} has set it")
        else:
            said.append(f"{field} is taken back from {manager}")
    return made, said


def _leave_out(thing: Any, field: str) -> bool:
    """Whether it was there to be left out, at a path as servers write it: `.spec.ports[port=80,protocol="TCP"].name`;
    dots in a key are not told from the path's own."""
    if isinstance(thing, dict):
        for key in sorted(thing, key=len, reverse=True):
            rest = field.removeprefix(f".{key}")
            if rest == "" and field:
                del thing[key]
                return True
            if rest != field and rest[0] in ".[" and _leave_out(thing[key], rest):
                return True
    if isinstance(thing, list) and (selector := re.match(r"\[((?:[^\]\"]|\"[^\"]*\")+)\]", field)):
        wanted = dict(re.findall(r'([\w.-]+)=("[^"]*"|[^,]+)', selector[1]))
        for one in thing:
            is_it = isinstance(one, dict) and all(str(one.get(k)) == v.strip('"') for k, v in wanted.items())
            if wanted and is_it:
                rest = field[selector.end() :]
                if not rest:
                    thing.remove(one)
                    return True
                return _leave_out(one, rest)
    return False
