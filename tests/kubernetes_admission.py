"""What a real API server decodes and refuses of an object, as far as the API server of the tests knows it.

Types come from Kubernetes' own definitions and from those of the recorded custom resources. A fault that only the
product's `check` finds has no words here: 501, so that nobody mistakes a guess for what a server says.
"""

import functools
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.manifests.check.check import check
from pipelines.manifests.check.documents import ADMISSION
from pipelines.manifests.check.schema import definitions as custom
from pipelines.manifests.check.server.types import definitions as own
from tests.kubernetes_request import Address, not_served, refused
from tests.recordings import crds

Object = dict[str, Any]
MOST_OF_A_REQUEST, MOST_OF_AN_OBJECT, MOST_OF_A_MAP = 3 * 2**20, 3 * 2**19, 2**20
"""Bytes that the server reads, that etcd takes, and of a ConfigMap's data."""

DEFINED = ("PyTorchJob", "TrainJob")
"""Custom resources whose definitions are read; KServe's takes seconds."""


@functools.cache
def _schema(kind: str, api_version: str) -> Mapping[str, Any] | None:
    """Of a kind; None for one whose definition is not at hand."""
    group, _, version = api_version.rpartition("/")
    if found := custom(crds(kind)).get((group, kind)) if kind in DEFINED else None:
        return next((one["schema"]["openAPIV3Schema"] for one in found["versions"] if one["name"] == version), None)
    for schema in own().values():
        for one in schema.get("x-kubernetes-group-version-kind", ()):
            if (one["group"], one["version"], one["kind"]) == (group, version, kind):
                return dict(schema)
    return None


_ALWAYS = ("apiVersion", "kind", "metadata")


def unknown_fields(thing: Object, at: Address) -> list[str]:
    """Their places; they are taken out, as a server drops them."""
    schema = _schema(at.kind, at.api_version)
    return [] if schema is None else list(_pruned(thing, schema, "", at.custom))


def _pruned(value: Any, schema: Mapping[str, Any], place: str, open_top: bool) -> Iterator[str]:
    if "$ref" in schema:
        schema = own()[schema["$ref"].rpartition("/")[2]]
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return
    if isinstance(value, list):
        for number, one in enumerate(value):
            yield from _pruned(one, schema.get("items") or {}, f"{place}[{number}]", False)
    properties = schema.get("properties")
    if not isinstance(value, dict):
        return
    for name in list(value):
        if properties and name in properties and not (open_top and name == "metadata"):
            yield from _pruned(value[name], properties[name], f"{place}.{name}".lstrip("."), False)
        elif properties and not schema.get("additionalProperties") and not (open_top and name in _ALWAYS):
            del value[name]
            yield f"{place}.{name}".lstrip(".")


def decoded(thing: Object, at: Address, strict: str) -> list[str]:
    """Without the fields that nobody knows; the warnings of a server about them. 400 where they are refused."""
    told = [f'unknown field "{place}"' for place in unknown_fields(thing, at)]
    if told and strict == "Strict":
        words = f'{at.kind} in version "{at.version}" cannot be handled as a {at.kind}: strict decoding error: '
        raise refused(400, "BadRequest", words + ", ".join(told))
    return [] if strict == "Ignore" else told


def typed(thing: Object, at: Address) -> None:
    """Server-side apply takes no field that nobody knows: 500, without a reason."""
    places = unknown_fields(thing, at)
    if places:
        title = f"({thing['metadata'].get('namespace', '')}/{at.name}; {at.group}/{at.version}, Kind={at.kind})"
        told = f"failed to create typed patch object {title}: .{places[0]}: field not declared in schema"
        raise refused(500, "", told)


def small_map(thing: Object, at: Address) -> None:
    data = sum(len(str(value).encode()) for value in (thing.get("data") or {}).values())
    if at.kind == "ConfigMap" and data > MOST_OF_A_MAP:
        raise at.invalid(("FieldValueTooLong", "[]", f"Too long: may not be more than {MOST_OF_A_MAP} bytes"))


def small(thing: Object) -> None:
    if len(json.dumps(thing).encode()) > MOST_OF_AN_OBJECT:
        raise refused(500, "", "etcdserver: request is too large")


_GO_TYPES: Mapping[type, str] = {str: "string", int: "integer", float: "number", bool: "boolean", dict: "object",
                                 list: "array"}  # fmt: skip


def valid(thing: Object, at: Address, before: Object | None = None) -> None:
    """422 for a value of another type in a custom resource, in the server's words; 501 for other faults, unless the
    object had some before."""
    if at.kind == "Event":
        about = (thing.get("involvedObject") or {}).get("namespace", at.namespace)
        if about != at.namespace:
            told = f'Invalid value: "{about}": does not match event.namespace'
            raise at.invalid(("FieldValueInvalid", "involvedObject.namespace", told))
    if at.custom and (schema := _schema(at.kind, at.api_version)):
        wrong = sorted(_mistyped({"spec": thing.get("spec")}, schema, ""), key=lambda one: one[1])
        if wrong:
            rest = "some validation rules were not checked because the object was invalid; correct the existing errors "
            rest = f"Invalid value: null: {rest}to complete validation"
            raise at.invalid(*wrong, ("FieldValueInvalid", "<nil>", rest))
    found = faults(thing)
    if found and (before is None or not faults(before)):
        raise not_served(f"it has no words for what is wrong with this object, {found}")


def _mistyped(value: Any, schema: Mapping[str, Any], place: str) -> Iterator[tuple[str, str, str]]:
    wanted = schema.get("type")
    if value is None or schema.get("x-kubernetes-int-or-string"):
        return
    given = _GO_TYPES[type(value)]
    if wanted and given != wanted and not (wanted == "number" and given == "integer"):
        told = f'Invalid value: "{given}": {place} in body must be of type {wanted}: "{given}"'
        yield "FieldValueTypeInvalid", place, told
        return
    if isinstance(value, list):
        for number, one in enumerate(value):
            yield from _mistyped(one, schema.get("items") or {}, f"{place}[{number}]")
    if isinstance(value, dict):
        for name, one in value.items():
            inner = (schema.get("properties") or {}).get(name) or schema.get("additionalProperties")
            yield from _mistyped(one, inner if isinstance(inner, dict) else {}, f"{place}.{name}".lstrip("."))


def faults(thing: Object) -> str:
    """What `check` says that a server refuses."""
    bare = {key: value for key, value in thing["metadata"].items() if key in ("name", "labels", "annotations")}
    kind = str(thing["kind"]) if thing["kind"] in DEFINED else ""
    return _faults(
        kind, json.dumps({key: value for key, value in thing.items() if key != "status"} | {"metadata": bare})
    )


@functools.lru_cache(maxsize=1000)
def _faults(kind: str, text: str) -> str:
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        found = check([Path(file.name)], crds=crds(kind) if kind else None, pod_security="privileged")
    return "; ".join(one.message for one in found if one.grade == ADMISSION)


# --- what a server of the tests does not do ---------------------------------------------------------------------------

GUARDS = {
    "ResourceQuota": "to count a quota",
    "LimitRange": "to hold pods to a LimitRange",
    "ValidatingAdmissionPolicyBinding": "to hold objects to a policy",
}


def guarded(others: list[Object], namespace: str) -> None:
    """Says what would have a word in it on a real server."""
    for one in others:
        if one["kind"] in GUARDS and one["metadata"].get("namespace", namespace) == namespace:
            raise not_served(f"{GUARDS[one['kind']]} ({one['metadata']['name']})")
        if one["kind"] == "ValidatingWebhookConfiguration":
            raise not_served(f"to call a webhook ({one['metadata']['name']})")


# --- changes ----------------------------------------------------------------------------------------------------------

_FIXED: Mapping[str, tuple[str, ...]] = {
    "Deployment": ("spec.selector",),
    "TrainJob": ("spec.runtimeRef", "spec.trainer", "spec.activeDeadlineSeconds", "spec.managedBy"),
    "ConfigMap": (), "Service": (), "PyTorchJob": (), "InferenceService": (), "PodMonitor": (),
    "NetworkPolicy": (), "Namespace": (), "Workflow": (), "Event": (), "ServiceAccount": (), "Role": (),
    "HorizontalPodAutoscaler": (),
}  # fmt: skip
"""Kinds whose objects may change, but for these fields. Of others it is not known here."""


def changed(before: Object, after: Object, at: Address) -> None:
    """Refuses a change of what does not change."""
    old, new = before["metadata"], after["metadata"]
    if new.get("uid", old["uid"]) != old["uid"]:
        told = ("FieldValueInvalid", "metadata.uid", f'Invalid value: "{new["uid"]}": field is immutable')
        raise at.invalid(told, told)
    more = [one for one in new.get("finalizers") or () if one not in (old.get("finalizers") or ())]
    if old.get("deletionTimestamp") and more:
        listed = ", ".join(f'"{one}"' for one in more)
        why = "no new finalizers can be added if the object is being deleted, found new finalizers"
        cause = ("FieldValueForbidden", "metadata.finalizers", f"Forbidden: {why} []string{{{listed}}}")
        raise at.invalid(cause, cause)
    rest = [{key: value for key, value in one.items() if key not in ("metadata", "status")} for one in (before, after)]
    if rest[0] == rest[1]:
        return
    address = _at(before, "spec.clusterIP")
    moved = at.kind == "Service" and _at(after, "spec.clusterIP") not in (None, address)
    if at.kind not in _FIXED or before.get("immutable") or moved:
        raise not_served(f"to say which fields of this {at.kind} may change")
    causes = []
    for place in _FIXED[at.kind]:
        was, now = (_at(one, place) for one in rest)
        if was != now:
            value = json.dumps(_GO_TYPES[type(now)] if at.custom else now, separators=(",", ":"))
            causes.append(("FieldValueInvalid", place, f"Invalid value: {value}: field is immutable"))
    if causes:
        raise at.invalid(*causes)
    if at.kind == "Deployment":
        labels = _at(after, "spec.template.metadata.labels") or {}
        wanted = _at(after, "spec.selector.matchLabels") or {}
        if not wanted.items() <= labels.items():
            told = json.dumps(labels, separators=(",", ":"))
            why = f"Invalid value: {told}: `selector` does not match template `labels`"
            raise at.invalid(("FieldValueInvalid", "spec.template.metadata.labels", why))


def _at(thing: Any, place: str) -> Any:
    for step in place.split("."):
        thing = thing.get(step) if isinstance(thing, dict) else None
    return thing
