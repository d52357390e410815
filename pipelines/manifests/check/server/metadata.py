"""Names, labels, annotations, owners and selectors."""

from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.manifests.check.documents import Finding
from pipelines.manifests.check.field import Field
from zhllama.kubernetes import formats
from zhllama.kubernetes.formats import Check, each, needed

_NAMES: Mapping[str, Check] = {
    "Service": formats.dns_1035_label, "Namespace": formats.dns_label, "StatefulSet": formats.dns_label,
    **dict.fromkeys(("Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding", "APIService"), formats.path_segment),
}  # fmt: skip
"""Names of kinds that are no DNS subdomains."""
_LONGEST = {"CronJob": 52, "Job": 63}
_NAMELESS = ("Binding", "Eviction", "TokenRequest")
_FINALIZERS = ("kubernetes", "orphan", "foregroundDeletion")
_GENERATED = "x" * 5
"""What the server puts behind a generateName, which it cuts to 58 characters before."""


def name_of(metadata: Mapping[str, Any]) -> str:
    """The name that the object will have."""
    name, prefix = (str(metadata.get(field) or "") for field in ("name", "generateName"))
    return name or (f"{prefix[: 63 - len(_GENERATED)]}{_GENERATED}" if prefix else "")


def object_metadata(field: Field, kind: str, own: bool = True) -> Iterator[Finding]:
    """Of the object itself: `field` is its metadata."""
    name = name_of(field.value if isinstance(field.value, dict) else {})
    where = "name" if field.text("name") else "generateName"
    if not name and not kind.endswith("Review") and kind not in _NAMELESS:
        yield field["name"].wrong("is needed, or generateName")
    elif name and (wrong := (_NAMES.get(kind, formats.subdomain) if own else formats.subdomain)(name)):
        yield field[where].wrong(f"{field.text(where)!r}: {wrong}")
    elif own and len(name) > _LONGEST.get(kind, len(name)):
        yield field[where].wrong(f"must have at most {_LONGEST[kind]} characters")
    namespace = field.text("namespace")
    if namespace and (wrong := formats.dns_label(namespace)):
        yield field["namespace"].wrong(f"{namespace!r}: {wrong}")
    yield from labels_of(field)
    yield from _finalizers(field["finalizers"], own)
    controllers = [owner for owner in field.each("ownerReferences") if owner["controller"].value is True]
    for owner in controllers[1:]:
        yield owner["controller"].wrong("only one owner can be the controller")


def labels_of(field: Field) -> Iterator[Finding]:
    """Labels and annotations of a `metadata`."""
    for name, check in (("labels", formats.labels), ("annotations", formats.annotations)):
        if wrong := check(field.mapping(name)):
            yield field[name].wrong(wrong)


def _finalizers(field: Field, own: bool) -> Iterator[Finding]:
    for one in field.items():
        if isinstance(one.value, str) and (wrong := formats.qualified_name(one.value)):
            yield one.wrong(wrong)
        elif own and isinstance(one.value, str) and "/" not in one.value and one.value not in _FINALIZERS:
            yield one.wrong(f"{one.value!r} needs a domain before it, as example.com/{one.value}")
    if isinstance(field.value, list) and {"orphan", "foregroundDeletion"} <= {str(one) for one in field.value}:
        yield field.wrong("orphan and foregroundDeletion exclude each other")


def owner(field: Field) -> Iterator[Finding]:
    if field.text("apiVersion") == "v1" and field.text("kind") == "Event":
        yield field.wrong("an Event cannot be an owner")


def requirement(field: Field) -> Iterator[Finding]:
    """Of a label selector."""
    operator, values = field.text("operator"), field.list("values")
    if operator in ("In", "NotIn") and not values:
        yield field["values"].wrong(f"are needed with {operator}")
    elif operator in ("Exists", "DoesNotExist") and values:
        yield field["values"].wrong(f"may not be given with {operator}")


FIELDS: Mapping[str, Mapping[str, Check]] = {
    "OwnerReference": dict.fromkeys(("apiVersion", "kind", "name", "uid"), needed()),
    "LabelSelector": {"matchLabels": formats.labels},
    "LabelSelectorRequirement": {
        "key": needed(formats.qualified_name),
        "operator": needed(formats.one_of("In", "NotIn", "Exists", "DoesNotExist")),
        "values": each(formats.label_value),
    },
}
RULES = {"OwnerReference": [owner], "LabelSelectorRequirement": [requirement]}
