"""Where pods go: tolerations, affinities, spreading."""

from collections.abc import Iterator, Mapping

from pipelines.manifests.check.documents import Finding
from pipelines.manifests.check.field import Field
from zhllama.kubernetes import formats
from zhllama.kubernetes.formats import Check, between, each, given, needed, one_of, positive

_HONOR = given(one_of("Honor", "Ignore"))


def toleration(field: Field) -> Iterator[Finding]:
    for name, wrong in formats.toleration(field.value):
        yield field[name].wrong(wrong)


def node_requirement(field: Field) -> Iterator[Finding]:
    """Of an affinity to nodes."""
    operator, values = field.text("operator"), field.list("values")
    if field.place[-2] == "matchFields":
        if field.text("key") != "metadata.name":
            yield field["key"].wrong("must be metadata.name in matchFields")
        if operator not in ("In", "NotIn") or len(values) != 1:
            yield field.wrong("in matchFields the operator is In or NotIn, with one value")
        return
    if wrong := formats.qualified_name(field.text("key")):
        yield field["key"].wrong(f"{field.text('key')!r}: {wrong}")
    if operator in ("In", "NotIn") and not values:
        yield field["values"].wrong(f"are needed with {operator}")
    elif operator in ("Exists", "DoesNotExist") and values:
        yield field["values"].wrong(f"may not be given with {operator}")
    elif operator in ("Gt", "Lt") and len(values) != 1:
        yield field["values"].wrong(f"{operator} takes one value")


def required_affinity(field: Field) -> Iterator[Finding]:
    """What a node has to have: values there are labels' values."""
    for term in field.each("nodeSelectorTerms"):
        for requirement in term.each("matchExpressions"):
            values = requirement.list("values") if requirement.text("operator") in ("In", "NotIn") else []
            if wrong := each(formats.label_value)(values):
                yield requirement["values"].wrong(wrong)


def pod_affinity(field: Field) -> Iterator[Finding]:
    for name in ("matchLabelKeys", "mismatchLabelKeys"):
        if field[name].value and not field["labelSelector"]:
            yield field[name].wrong("need a labelSelector beside them")
    both = {*field.list("matchLabelKeys")} & {*field.list("mismatchLabelKeys")}
    if both:
        yield field["matchLabelKeys"].wrong(f"{', '.join(sorted(both))}: in mismatchLabelKeys too")


def spread(field: Field) -> Iterator[Finding]:
    if field["minDomains"] and field.text("whenUnsatisfiable") != "DoNotSchedule":
        yield field["minDomains"].wrong("needs whenUnsatisfiable DoNotSchedule")
    if field["matchLabelKeys"].value and not field["labelSelector"]:
        yield field["matchLabelKeys"].wrong("need a labelSelector beside them")


_WEIGHT = given(between(1, 100))
_LABEL_KEYS = each(formats.qualified_name)
FIELDS: Mapping[str, Mapping[str, Check]] = {
    "Toleration": {
        "key": formats.qualified_name, "operator": one_of(*formats.OPERATORS), "effect": one_of(*formats.EFFECTS),
    },
    "NodeSelector": {"nodeSelectorTerms": needed()},
    "NodeSelectorRequirement": {
        "operator": needed(one_of("In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt")), "key": needed(),
    },
    "PreferredSchedulingTerm": {"weight": needed(_WEIGHT)},
    "WeightedPodAffinityTerm": {"weight": needed(_WEIGHT)},
    "PodAffinityTerm": {
        "topologyKey": needed(formats.qualified_name), "namespaces": each(formats.dns_label),
        "matchLabelKeys": _LABEL_KEYS, "mismatchLabelKeys": _LABEL_KEYS,
    },
    "TopologySpreadConstraint": {
        "maxSkew": needed(positive), "topologyKey": needed(formats.qualified_name), "minDomains": positive,
        "whenUnsatisfiable": needed(one_of("DoNotSchedule", "ScheduleAnyway")), "nodeAffinityPolicy": _HONOR,
        "nodeTaintsPolicy": _HONOR, "matchLabelKeys": _LABEL_KEYS,
    },
}  # fmt: skip
RULES = {
    "Toleration": [toleration],
    "NodeSelectorRequirement": [node_requirement],
    "NodeSelector": [required_affinity],
    "PodAffinityTerm": [pod_affinity],
    "TopologySpreadConstraint": [spread],
}
