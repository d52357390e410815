"""Rules that definitions state in CEL. Those of the operators that zhllama works with are known by their text, and said
in Python; of another rule it is said that nobody looked."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pipelines.manifests.check.documents import ADVICE, Finding
from pipelines.manifests.check.field import Field
from pipelines.manifests.check.server.metadata import name_of

EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://.+")


def _name(value: Any) -> str:
    return name_of(value.get("metadata", {}))


def _no_borrowing(group: Any) -> bool:
    return not any("borrowingLimit" in one for flavor in group["flavors"] for one in flavor["resources"])


def _lender(cohort: str) -> Callable[[Any], bool]:
    return lambda spec: cohort in spec or all(_no_borrowing(group) for group in spec.get("resourceGroups", []))


_BORROW = "self.resourceGroups.all(rg, rg.flavors.all(f, f.resources.all(r, !has(r.borrowingLimit)))) : true"
_MATCHES = "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')"
_RULES: Mapping[str, Callable[[Any], bool]] = {
    # Kubeflow Trainer
    _MATCHES: lambda job: re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", _name(job)) is not None,
    "size(self.metadata.name) <= 63": lambda job: len(_name(job)) <= 63,
    "self == '' || self.matches('^[A-Za-z][A-Za-z0-9+.-]*://.+$')": lambda uri: uri == "" or bool(_URI.fullmatch(uri)),
    "self in ['trainer.kubeflow.org/trainjob-controller', 'kueue.x-k8s.io/multikueue']": lambda name: (
        name in ("trainer.kubeflow.org/trainjob-controller", "kueue.x-k8s.io/multikueue")
    ),
    # Kueue: cluster queues
    f"!has(self.cohort) && has(self.resourceGroups) ? {_BORROW}": _lender("cohort"),
    f"!has(self.cohortName) && has(self.resourceGroups) ? {_BORROW}": _lender("cohortName"),
    "!has(self.preference) || (self.whenCanBorrow == 'TryNextFlavor' && self.whenCanPreempt == 'TryNextFlavor')": (
        lambda fungibility: (
            "preference" not in fungibility
            or fungibility.get("whenCanBorrow") == fungibility.get("whenCanPreempt", "TryNextFlavor") == "TryNextFlavor"
        )
    ),
    "!(self.reclaimWithinCohort == 'Never' && has(self.borrowWithinCohort) && "
    "self.borrowWithinCohort.policy != 'Never')": lambda preemption: (
        not (
            preemption.get("reclaimWithinCohort", "Never") == "Never"
            and preemption.get("borrowWithinCohort", {}).get("policy", "Never") != "Never"
        )
    ),
    "self.flavors.all(x, size(x.resources) == size(self.coveredResources))": lambda group: all(
        len(flavor["resources"]) == len(group["coveredResources"]) for flavor in group["flavors"]
    ),
    # Kueue: flavors
    "!has(self.topologyName) || self.nodeLabels.size() >= 1": (
        lambda spec: "topologyName" not in spec or len(spec.get("nodeLabels", {})) >= 1
    ),
    "self.all(x, x.effect in ['NoSchedule', 'PreferNoSchedule', 'NoExecute'])": lambda taints: all(
        taint["effect"] in EFFECTS for taint in taints
    ),
    "self.all(x, !has(x.key) ? x.operator == 'Exists' : true)": lambda tolerations: all(
        "key" in one or one.get("operator", "Equal") == "Exists" for one in tolerations
    ),
    "self.all(x, has(x.tolerationSeconds) ? x.effect == 'NoExecute' : true)": lambda tolerations: all(
        "tolerationSeconds" not in one or one.get("effect") == "NoExecute" for one in tolerations
    ),
    "self.all(x, !has(x.operator) || x.operator in ['Equal', 'Exists'])": lambda tolerations: all(
        one.get("operator", "Equal") in ("Equal", "Exists") for one in tolerations
    ),
    "self.all(x, has(x.operator) && x.operator == 'Exists' ? !has(x.value) : true)": lambda tolerations: all(
        one.get("operator") != "Exists" or "value" not in one for one in tolerations
    ),
    "self.all(x, !has(x.effect) || x.effect in ['NoSchedule', 'PreferNoSchedule', 'NoExecute'])": (
        lambda tolerations: all(one.get("effect", "NoExecute") in EFFECTS for one in tolerations)
    ),
}


def check(field: Field, rule: Mapping[str, Any]) -> Iterator[Finding]:
    text = " ".join(str(rule.get("rule", "")).split())
    if "oldSelf" in text or "status" in field.place:  # of changes, and of what the server sets aside
        return
    holds = _RULES.get(text)
    if holds is None:
        wrong = f"a rule of the definition is not looked at: {rule.get('message') or text}"
        yield Field(field.document, field.place, field.value, ADVICE).wrong(wrong, "no-schema")
        return
    try:
        good = holds(field.value)
    except (AttributeError, KeyError, TypeError):  # of another form, which the schema's finding says
        return
    if not good:
        yield field.wrong(str(rule.get("message") or text), "schema")
