"""What makes pods: Deployment, ReplicaSet, StatefulSet, DaemonSet, Job, CronJob."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.manifests.check.documents import Finding
from pipelines.manifests.check.field import Field
from pipelines.manifests.check.server import cron
from pipelines.manifests.check.server.metadata import labels_of
from pipelines.manifests.check.server.pods import CONTAINERS, always_restarts
from zhllama.kubernetes import formats
from zhllama.kubernetes.formats import Check, count_or_share, given, needed, no_negative, one_of

_STRATEGY = one_of("RollingUpdate", "OnDelete")


def selects(field: Field) -> Iterator[Finding]:
    """The selector of a spec is there, and finds the pods of its template."""
    selector, labels = field["selector"], field["template"]["metadata"].mapping("labels")
    if not selector:
        yield selector.wrong("is needed")
    elif not selector.mapping("matchLabels") and not selector["matchExpressions"].value:
        yield selector.wrong("is empty: it needs a label of the pods")
    elif not matches(selector, labels):
        yield field["template"]["metadata"]["labels"].wrong("the selector does not match them")


def matches(selector: Field, labels: Mapping[str, Any]) -> bool:
    if any(labels.get(key) != value for key, value in selector.mapping("matchLabels").items()):
        return False
    for one in selector.each("matchExpressions"):
        there, values = labels.get(one.text("key")), one.list("values")
        has = {
            "In": there in values, "NotIn": there not in values, "Exists": there is not None,
            "DoesNotExist": there is None,
        }  # fmt: skip
        if not has.get(one.text("operator"), True):
            return False
    return True


def kept_running(field: Field) -> Iterator[Finding]:
    yield from selects(field)
    yield from always_restarts(field["template"])


def deployment(field: Field) -> Iterator[Finding]:
    yield from kept_running(field)
    strategy = field["strategy"]
    rolling = strategy["rollingUpdate"]
    if strategy.text("type") == "Recreate" and rolling:
        yield rolling.wrong("is for type RollingUpdate, not Recreate")
    yield from _room_to_roll(rolling, defaults=True)
    progress = field.number("progressDeadlineSeconds")
    least = field.number("minReadySeconds") or 0
    if (600 if progress is None else progress) <= least:
        yield field["progressDeadlineSeconds"].wrong(f"must be more than minReadySeconds, {least}")


def _room_to_roll(rolling: Field, defaults: bool) -> Iterator[Finding]:
    surge, away = rolling["maxSurge"], rolling["maxUnavailable"]
    for one in (surge, away):
        if one and (wrong := count_or_share(one.value)):
            yield one.wrong(f"{one.value!r}: {wrong}")
    if _share(away.value) > 100:
        yield away.wrong("must be at most 100%")
    if surge and away and _is_none(surge.value) and _is_none(away.value):
        yield away.wrong("may not be 0 where maxSurge is 0")
    if not defaults and away and _is_none(away.value) and not surge:
        yield away.wrong("may not be 0 where maxSurge is 0")


def _share(value: Any) -> int:
    return int(value[:-1]) if isinstance(value, str) and value.endswith("%") and value[:-1].isdecimal() else 0


def _is_none(value: Any) -> bool:
    return value == 0 or (isinstance(value, str) and _share(value) == 0)


def daemon_set(field: Field) -> Iterator[Finding]:
    yield from kept_running(field)
    rolling = field["updateStrategy"]["rollingUpdate"]
    yield from _room_to_roll(rolling, defaults=False)
    surge, away = rolling["maxSurge"], rolling["maxUnavailable"]
    if surge and away and not _is_none(surge.value) and not _is_none(away.value):
        yield away.wrong("may not be given beside maxSurge")


def stateful_set(field: Field) -> Iterator[Finding]:
    yield from kept_running(field)
    yield from labels_of(field["template"]["metadata"])
    strategy = field["updateStrategy"]
    if strategy.text("type") == "OnDelete" and strategy["rollingUpdate"]:
        yield strategy["rollingUpdate"].wrong("is for type RollingUpdate, not OnDelete")
    for claim in field["volumeClaimTemplates"].items():
        if not claim["spec"]:
            yield claim["spec"].wrong("is needed")


# --- what ends --------------------------------------------------------------------------------------------------------

_OF_INDEXED = ("backoffLimitPerIndex", "maxFailedIndexes", "successPolicy")


def job(field: Field) -> Iterator[Finding]:
    spec = field["template"]["spec"]
    restart = spec.text("restartPolicy")
    if spec and restart not in ("OnFailure", "Never"):
        yield spec["restartPolicy"].wrong("OnFailure or Never is needed: pods of a Job end")
    if field["podFailurePolicy"]:
        if restart == "OnFailure":
            yield spec["restartPolicy"].wrong("must be Never with a podFailurePolicy")
        if field.text("podReplacementPolicy") not in ("", "Failed"):
            yield field["podReplacementPolicy"].wrong("must be Failed with a podFailurePolicy")
    indexed = field.text("completionMode") == "Indexed"
    for name in _OF_INDEXED:
        if field[name] and not indexed:
            yield field[name].wrong("needs completionMode Indexed")
    if field["backoffLimitPerIndex"] and restart == "OnFailure":
        yield spec["restartPolicy"].wrong("must be Never with backoffLimitPerIndex")
    if field["maxFailedIndexes"] and not field["backoffLimitPerIndex"]:
        yield field["backoffLimitPerIndex"].wrong("is needed with maxFailedIndexes")
    if indexed and (field.number("parallelism") or 0) > 100_000:
        yield field["parallelism"].wrong("must be at most 100000 with completionMode Indexed")
    in_cron_job = "jobTemplate" in field.place
    if field["manualSelector"].value is True and not in_cron_job:
        if not field["selector"]:
            yield field["selector"].wrong("is needed with manualSelector")
        elif not matches(field["selector"], field["template"]["metadata"].mapping("labels")):
            yield field["template"]["metadata"]["labels"].wrong("the selector does not match them")
    elif field["selector"]:
        yield field["selector"].wrong("is made by the server; leave it out")
    elif in_cron_job and field["manualSelector"].value is True:
        yield field["manualSelector"].wrong("cannot be set in a CronJob")
    yield from _managed_by(field["managedBy"])


def _managed_by(field: Field) -> Iterator[Finding]:
    if field and isinstance(field.value, str):
        domain, slash, name = field.value.partition("/")
        if not slash or not name or formats.subdomain(domain) or len(field.value) > 63:
            yield field.wrong("must be a domain, / and a name, at most 63 characters")


def failure_rule(field: Field) -> Iterator[Finding]:
    given_ones = field.names() & {"onExitCodes", "onPodConditions"}
    if len(given_ones) != 1:
        yield field.wrong("needs one of onExitCodes and onPodConditions")
    values = field["onExitCodes"].list("values")
    if field["onExitCodes"]:
        if field["onExitCodes"].text("operator") == "In" and 0 in values:
            yield field["onExitCodes"]["values"].wrong("may not hold 0 with In: that is success")
        if values and values != sorted(set(values)):
            yield field["onExitCodes"]["values"].wrong("must be in order, none twice")
    name = field["onExitCodes"].text("containerName")
    spec = _of_job(field)["template"]["spec"]
    if name and name not in {one.text("name") for kind in CONTAINERS for one in spec.each(kind)}:
        yield field["onExitCodes"]["containerName"].wrong(f"the pod has no container {name!r}")
    if field.text("action") == "FailIndex" and not _of_job(field)["backoffLimitPerIndex"]:
        yield field["action"].wrong("FailIndex needs backoffLimitPerIndex")


def _of_job(rule: Field) -> Field:
    """The spec that a rule of its podFailurePolicy stands in."""
    found = Field(rule.document, (), rule.document.value)
    for step in rule.place[: rule.place.index("podFailurePolicy")] if "podFailurePolicy" in rule.place else ():
        found = found[step]
    return found


def indexed_name(field: Field) -> Iterator[Finding]:
    """Of a Job: pods of an indexed one have their index in their host's name."""
    name, spec = field["metadata"].text("name"), field["spec"]
    last = f"-{max(0, (spec.number('completions') or 1) - 1)}"
    if spec.text("completionMode") == "Indexed" and name and (wrong := formats.dns_label(name + last)):
        yield field["metadata"]["name"].wrong(f"becomes a host's name with {last}: {wrong}")


def _zone(text: str) -> str:
    if text.lower() == "local":
        return "must name a time zone"
    return "" if not _zones() or text in _zones() else "is no time zone that is known"


@functools.cache
def _zones() -> frozenset[str]:
    """Empty where this machine has no list of them."""
    import zoneinfo

    return frozenset(zoneinfo.available_timezones())


def cron_job(field: Field) -> Iterator[Finding]:
    if field["jobTemplate"] and not field["jobTemplate"]["spec"]:
        yield field["jobTemplate"]["spec"]["template"].wrong("is needed")


_COUNTS = dict.fromkeys(("replicas", "minReadySeconds", "revisionHistoryLimit"), no_negative)
FIELDS: Mapping[str, Mapping[str, Check]] = {
    "ReplicaSetSpec": _COUNTS,
    "DaemonSetSpec": _COUNTS,
    "DeploymentSpec": {**_COUNTS, "progressDeadlineSeconds": no_negative},
    "StatefulSetSpec": {
        "replicas": no_negative,
        "minReadySeconds": no_negative,
        "podManagementPolicy": one_of("OrderedReady", "Parallel"),
        "serviceName": formats.dns_label,
    },
    "DeploymentStrategy": {"type": one_of("RollingUpdate", "Recreate")},
    "DaemonSetUpdateStrategy": {"type": _STRATEGY},
    "StatefulSetUpdateStrategy": {"type": _STRATEGY},
    "RollingUpdateStatefulSetStrategy": {"partition": no_negative},
    "StatefulSetPersistentVolumeClaimRetentionPolicy": dict.fromkeys(
        ("whenDeleted", "whenScaled"), one_of("Retain", "Delete")
    ),
    "StatefulSetOrdinals": {"start": no_negative},
    "JobSpec": {
        **dict.fromkeys(
            ("parallelism", "completions", "backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished",
             "backoffLimitPerIndex", "maxFailedIndexes"), no_negative),
        "completionMode": given(one_of("NonIndexed", "Indexed")),
        "podReplacementPolicy": given(one_of("TerminatingOrFailed", "Failed")),
    },
    "PodFailurePolicy": {"rules": lambda rules: "may be 20" if len(rules) > 20 else ""},
    "SuccessPolicy": {"rules": needed(lambda rules: "may be 20" if len(rules) > 20 else "")},
    "SuccessPolicyRule": {"succeededCount": no_negative},
    "PodFailurePolicyRule": {"action": needed(one_of("FailJob", "Ignore", "Count", "FailIndex"))},
    "PodFailurePolicyOnExitCodesRequirement": {"operator": needed(one_of("In", "NotIn")), "values": needed()},
    "PodFailurePolicyOnPodConditionsPattern": {
        "type": needed(formats.qualified_name), "status": one_of("True", "False", "Unknown"),
    },
    "CronJobSpec": {
        "schedule": needed(cron.schedule), "timeZone": given(lambda text: _zone(text) if text else "is empty"),
        "concurrencyPolicy": one_of("Allow", "Forbid", "Replace"),
        **dict.fromkeys(
            ("startingDeadlineSeconds", "successfulJobsHistoryLimit", "failedJobsHistoryLimit"), no_negative),
    },
}  # fmt: skip
RULES = {
    "DeploymentSpec": [deployment], "ReplicaSetSpec": [kept_running], "DaemonSetSpec": [daemon_set],
    "StatefulSetSpec": [stateful_set], "JobSpec": [job], "Job": [indexed_name], "CronJobSpec": [cron_job],
    "PodFailurePolicyRule": [failure_rule],
}  # fmt: skip
