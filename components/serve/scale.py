"""How many pods a served model has, and whose that is to say: ours, until another manager or an autoscaler says it.

The API server keeps, in `managedFields`, which manager set which field. A forced apply takes a field from its manager
without a word: an autoscaler's ten pods were one after the next deployment. So these fields are left out of what is
applied where they are another's. Where an autoscaler has not set them yet they are applied as they stand: a field that
its only manager leaves out falls back to the API's default, one pod.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from zhllama.errors import InputError

MANAGER = "zhllama"
SCALE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "Deployment": (("spec",), ("replicas",)),
    "InferenceService": (("spec", "predictor"), ("minReplicas", "maxReplicas")),
}
"""Of each kind that has pods: where it says how many, and in which fields."""


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


def check_not_at_zero(name: str, found: dict[str, Any] | None) -> None:
    """InputError for a Deployment that another has scaled to nothing: no pod could be tried."""
    if found is not None and found["kind"] == "Deployment" and found["spec"].get("replicas", 1) < 1:
        by = "".join(f" by {one}" for one in managers(found, ["spec", "replicas"])[:1])
        raise InputError(
            f"{name} is scaled to 0{by}: no pod of it could be tried; scale it up first "
            f"(kubectl scale deployment {found['metadata']['name']} --replicas 1)"
        )
