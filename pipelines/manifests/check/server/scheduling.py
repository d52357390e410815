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
    kind, required = field.place[-2], "nodeSelectorTerms" in field.place[-4:]
    given = {name: field.text(name) for name in ("key", "operator")} | {"values": field.list("values")}
    for name, wrong in formats.node_requirement(given, kind == "matchFields", required):
        yield field[name].wrong(wrong)


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
        "operator": needed(one_of(*formats.NODE_OPERATORS)), "key": needed(),
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
    "PodAffinityTerm": [pod_affinity],
    "TopologySpreadConstraint": [spread],
}
