"""Kinds of a few rules each: ConfigMap, Secret, autoscaling, disruption budgets, RBAC, quotas, limits, classes."""

import json
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal

from pipelines.manifests.check.documents import Finding
from pipelines.manifests.check.field import Field
from pipelines.manifests.check.server.containers import is_extended, is_never_shared, no_repeats
from zhllama.kubernetes import formats
from zhllama.kubernetes.formats import (
    Check,
    amount,
    count_or_share,
    given,
    keys,
    needed,
    one_of,
    positive,
)

_MOST_BYTES = 1024 * 1024
_RBAC = "rbac.authorization.k8s.io"
_SCOPES = (
    "Terminating", "NotTerminating", "BestEffort", "NotBestEffort", "PriorityClass", "CrossNamespacePodAffinity",
    "VolumeAttributesClass",
)  # fmt: skip
_COUNTED = {
    "pods", "services", "replicationcontrollers", "resourcequotas", "secrets", "configmaps", "persistentvolumeclaims",
    "services.nodeports", "services.loadbalancers",
}  # fmt: skip
_QUOTED = _COUNTED | {
    "cpu", "memory", "ephemeral-storage", "requests.cpu", "requests.memory", "requests.storage",
    "requests.ephemeral-storage", "limits.cpu", "limits.memory", "limits.ephemeral-storage",
}  # fmt: skip
_OF_PODS = {"pods", "cpu", "memory", "requests.cpu", "requests.memory", "limits.cpu", "limits.memory"}
_LIMITED = ("Pod", "Container", "PersistentVolumeClaim")
_NEEDED_KEYS = {
    "kubernetes.io/tls": ("tls.crt", "tls.key"),
    "kubernetes.io/dockerconfigjson": (".dockerconfigjson",),
    "kubernetes.io/dockercfg": (".dockercfg",),
    "kubernetes.io/ssh-auth": ("ssh-privatekey",),
}
_ACCOUNT = "kubernetes.io/service-account.name"


# --- ConfigMap, Secret ------------------------------------------------------------------------------------------------


def config_map(field: Field) -> Iterator[Finding]:
    both = sorted(set(field.mapping("data")) & set(field.mapping("binaryData")))
    if both:
        yield field["data"][both[0]].wrong("is in binaryData too")
    yield from _small(field, "data", "binaryData")


def secret(field: Field) -> Iterator[Finding]:
    kind, data = field.text("type"), {**field.mapping("data"), **field.mapping("stringData")}
    for key in _NEEDED_KEYS.get(kind, ()):
        if key not in data or (key == "ssh-privatekey" and not data[key]):
            yield field["data"][key].wrong(f"is needed in a secret of type {kind}")
    if kind == "kubernetes.io/basic-auth" and not {"username", "password"} & set(data):
        yield field["data"]["username"].wrong("or password is needed in a secret of type kubernetes.io/basic-auth")
    if kind == "kubernetes.io/service-account-token" and not field["metadata"].mapping("annotations").get(_ACCOUNT):
        yield field["metadata"]["annotations"][_ACCOUNT].wrong("is needed in a secret of this type")
    for key in (".dockerconfigjson", ".dockercfg"):
        if key in _NEEDED_KEYS.get(kind, ()) and key in data:
            yield from _json(field, key)
    yield from _small(field, "data", "stringData")


def _json(field: Field, key: str) -> Iterator[Finding]:
    import base64

    where = "stringData" if key in field.mapping("stringData") else "data"
    text = field[where].text(key)
    if where == "data" and formats.base64_text(text):
        return
    try:
        good = isinstance(json.loads(base64.b64decode(text) if where == "data" else text), dict)
    except ValueError:
        good = False
    if not good:
        yield field[where][key].wrong("must be a mapping in JSON")


def _small(field: Field, *names: str) -> Iterator[Finding]:
    size = 0
    for name in names:
        # of base64 every four characters are three bytes
        share = 0.75 if name == "binaryData" or (name == "data" and "stringData" in names) else 1
        size += sum(int(share * len(str(value).encode("utf-8", "replace"))) for value in field.mapping(name).values())
    if size > _MOST_BYTES:
        yield field[names[0]].wrong(f"has {size} bytes, and may have {_MOST_BYTES}")


# --- autoscaling, disruption ------------------------------------------------------------------------------------------

_OF_METRIC = {"Resource": "resource", "Pods": "pods", "Object": "object", "External": "external"}
_OF_METRIC["ContainerResource"] = "containerResource"


def autoscaler(field: Field) -> Iterator[Finding]:
    least, most = field.number("minReplicas"), field.number("maxReplicas") or 0
    if most < 1:
        yield field["maxReplicas"].wrong("must be more than 0")
    if least is not None and least < 1:
        yield field["minReplicas"].wrong("must be 1 or more")
    elif most and most < (1 if least is None else least):
        yield field["maxReplicas"].wrong(f"{most}: must be minReplicas or more, {least}")
    target = field["scaleTargetRef"]
    for name in ("kind", "name"):
        if not target.text(name):
            yield target[name].wrong("is needed")
        elif wrong := formats.path_segment(target.text(name)):
            yield target[name].wrong(wrong)
    if "/" not in target.text("apiVersion") and target.text("kind") != "ReplicationController":
        yield target["apiVersion"].wrong("must name the group and its version, as apps/v1")


def metric(field: Field) -> Iterator[Finding]:
    kind = field.text("type")
    wanted = _OF_METRIC.get(kind)
    if wanted is None:
        yield field["type"].wrong(f"{kind!r} must be one of {', '.join(_OF_METRIC)}")
    elif not field[wanted]:
        yield field[wanted].wrong(f"is needed with type {kind}")
    for name in sorted(field.names() & set(_OF_METRIC.values()) - {wanted}):
        yield field[name].wrong(f"is not of type {kind}")
    target = field[wanted or ""]["target"]
    values = target.names() & {"value", "averageValue", "averageUtilization"}
    pairs = {"object": ("value", "averageValue"), "external": ("value", "averageValue")}
    pair = pairs.get(wanted or "", ("averageValue", "averageUtilization"))
    if wanted not in (None, "pods") and target and not values & set(pair):
        yield target.wrong(f"needs {' or '.join(pair)}")
    if wanted in ("resource", "containerResource", "external") and set(pair) <= values:
        yield target.wrong(f"takes one of {' and '.join(pair)}")
    if wanted == "pods" and target and "averageValue" not in values:
        yield target["averageValue"].wrong("is needed with type Pods")


def scaling(field: Field) -> Iterator[Finding]:
    window = field.number("stabilizationWindowSeconds")
    if window is not None and not 0 <= window <= 3600:
        yield field["stabilizationWindowSeconds"].wrong("must be between 0 and 3600")
    if field["policies"] and not field["policies"].value:
        yield field["policies"].wrong("must not be empty")


def budget(field: Field) -> Iterator[Finding]:
    for name in ("minAvailable", "maxUnavailable"):
        value = field[name].value
        if value is not None and (wrong := count_or_share(value)):
            yield field[name].wrong(f"{value!r}: {wrong}")
        elif isinstance(value, str) and int(value[:-1]) > 100:
            yield field[name].wrong("must be at most 100%")
    if field["minAvailable"] and field["maxUnavailable"]:
        yield field["maxUnavailable"].wrong("minAvailable stands beside it; keep one")


# --- RBAC -------------------------------------------------------------------------------------------------------------


def role(field: Field) -> Iterator[Finding]:
    for rule in field.each("rules"):
        if rule["nonResourceURLs"].value:
            yield rule["nonResourceURLs"].wrong("are for a ClusterRole")
        yield from _rule(rule)


def cluster_role(field: Field) -> Iterator[Finding]:
    for rule in field.each("rules"):
        yield from _rule(rule)


def _rule(rule: Field) -> Iterator[Finding]:
    if rule["nonResourceURLs"].value:
        if rule["apiGroups"].value or rule["resources"].value or rule["resourceNames"].value:
            yield rule["nonResourceURLs"].wrong("stand alone, without apiGroups and resources")
        return
    for name in ("apiGroups", "resources"):
        if not rule[name].value:
            yield rule[name].wrong("is needed" + (': "" for those of v1' if name == "apiGroups" else ""))


def role_reference(field: Field) -> Iterator[Finding]:
    """Of a binding."""
    kinds = ("ClusterRole",) if field["kind"].value == "ClusterRoleBinding" else ("Role", "ClusterRole")
    reference = field["roleRef"]
    if reference.text("kind") not in kinds:
        yield reference["kind"].wrong(f"{reference.text('kind')!r} must be one of {', '.join(kinds)}")
    if reference.text("apiGroup") not in ("", _RBAC):
        yield reference["apiGroup"].wrong(f"must be {_RBAC}")
    if not reference.text("name"):
        yield reference["name"].wrong("is needed")
    elif wrong := formats.path_segment(reference.text("name")):
        yield reference["name"].wrong(wrong)
    for subject in field.each("subjects"):
        kind, group = subject.text("kind"), subject["apiGroup"].value
        if kind == "ServiceAccount":
            if subject.text("name") and (wrong := formats.subdomain(subject.text("name"))):
                yield subject["name"].wrong(wrong)
            if group not in (None, ""):
                yield subject["apiGroup"].wrong('must be "" for a ServiceAccount')
            if not subject.text("namespace") and kinds == ("ClusterRole",):
                yield subject["namespace"].wrong("is needed")
        elif kind in ("User", "Group") and group not in (None, "", _RBAC):
            yield subject["apiGroup"].wrong(f"must be {_RBAC} for a {kind}")


# --- quotas and limits ------------------------------------------------------------------------------------------------


def quota(field: Field) -> Iterator[Finding]:
    for kind, value in field.mapping("hard").items():
        plain = "/" not in kind and kind not in _QUOTED and not kind.startswith(("hugepages-", "requests.hugepages-"))
        if wrong := formats.qualified_name(kind) or ("is no resource of a quota" if plain else ""):
            yield field["hard"][kind].wrong(wrong)
            continue
        found = amount(value)
        if found is not None and found < 0:
            yield field["hard"][kind].wrong("must not be negative")
        counted = kind in _COUNTED or (is_extended(kind) and not kind.startswith("requests."))
        if found is not None and counted and found != found.to_integral_value():
            yield field["hard"][kind].wrong(f"{value}: must be a whole number")
    scopes = set(field.list("scopes"))
    for pair in ({"Terminating", "NotTerminating"}, {"BestEffort", "NotBestEffort"}):
        if pair <= scopes:
            yield field["scopes"].wrong(f"{' and '.join(sorted(pair))} exclude each other")
    allowed = {"pods"} if "BestEffort" in scopes else _OF_PODS
    for kind in field.mapping("hard") if scopes & set(_SCOPES[:6]) else ():
        if kind not in allowed:
            yield field["hard"][kind].wrong(f"cannot be counted within the scopes {', '.join(sorted(scopes))}")


def limit(field: Field) -> Iterator[Finding]:
    kind = field.text("type")
    names = ("min", "defaultRequest", "default", "max")
    values = {name: {key: amount(value) for key, value in field.mapping(name).items()} for name in names}
    for name in names:
        for key in values[name]:
            known = key in _QUOTED or key == "storage" or key.startswith("hugepages-") or "/" in key
            wrong = formats.qualified_name(key) or ("" if known else "is no resource that is known")
            if wrong := wrong or (formats.resource_name(key) if kind == "Container" else ""):
                yield field[name][key].wrong(wrong)
    if kind == "Pod":
        for name in ("default", "defaultRequest"):
            if field[name]:
                yield field[name].wrong("may not be given with type Pod")
    if kind == "PersistentVolumeClaim" and not {"storage"} & {*values["min"], *values["max"]}:
        yield field.wrong("needs min or max of storage with type PersistentVolumeClaim")
    for key in {key for name in names for key in values[name]}:
        there = [(name, found) for name in names if (found := values[name].get(key)) is not None]
        for index, (name, found) in enumerate(there):
            for lower, less in there[:index]:
                if less > found:
                    yield field[lower][key].wrong(f"is more than {name}, {field[name][key].value}")
        asked, limited = values["defaultRequest"].get(key), values["default"].get(key)
        if is_never_shared(key) and asked is not None and limited is not None and asked != limited:
            yield field["defaultRequest"][key].wrong(f"must be the default, {field['default'][key].value}")
        ratio = amount(field.mapping("maxLimitRequestRatio").get(key))
        if ratio is not None and ratio < 1:
            yield field["maxLimitRequestRatio"][key].wrong("must be 1 or more")
    for key, value in field.mapping("maxLimitRequestRatio").items():
        ratio, least, most = amount(value), values["min"].get(key), values["max"].get(key)
        if ratio is not None and least and most and most / Decimal(least) < ratio:
            yield field["maxLimitRequestRatio"][key].wrong("is more than max / min")


def limits(field: Field) -> Iterator[Finding]:
    yield from no_repeats(field, "limits", "type")


def _limited(text: str) -> str:
    good = text in _LIMITED or ("/" in text and not formats.qualified_name(text))
    return "" if good else f"must be one of {', '.join(_LIMITED)}, or have a domain"


def priority_class(field: Field) -> Iterator[Finding]:
    if field["metadata"].text("name").startswith("system-"):
        yield field["metadata"]["name"].wrong("names that begin with system- are the cluster's own")
    elif (field.number("value") or 0) > 1_000_000_000:
        yield field["value"].wrong("must be at most 1000000000")


_SECURITY = "pod-security.kubernetes.io/"


def namespace(field: Field) -> Iterator[Finding]:
    """Labels that name a Pod Security Standard."""
    for key, value in field["metadata"].mapping("labels").items():
        way, version = key.removeprefix(_SECURITY), key.endswith("-version")
        if not key.startswith(_SECURITY) or way.removesuffix("-version") not in ("enforce", "audit", "warn"):
            continue
        if version and value != "latest" and not re.fullmatch(r"v1\.(0|[1-9][0-9]*)", str(value)):
            yield field["metadata"]["labels"][key].wrong(f"{value!r} must be latest or a version, as v1.34")
        elif not version and value not in ("privileged", "baseline", "restricted"):
            yield field["metadata"]["labels"][key].wrong(f"{value!r} must be privileged, baseline or restricted")


def scope(field: Field) -> Iterator[Finding]:
    """Of a quota's selector."""
    operator, values = field.text("operator"), field.list("values")
    if field.text("scopeName") != "PriorityClass" and operator != "Exists":
        yield field["operator"].wrong(f"must be Exists with the scope {field.text('scopeName')}")
    elif operator in ("In", "NotIn") and not values:
        yield field["values"].wrong(f"are needed with {operator}")
    elif operator in ("Exists", "DoesNotExist") and values:
        yield field["values"].wrong(f"may not be given with {operator}")


FIELDS: Mapping[str, Mapping[str, Check]] = {
    "ConfigMap": {"data": keys(formats.config_key), "binaryData": keys(formats.config_key)},
    "Secret": {"data": keys(formats.config_key), "stringData": keys(formats.config_key)},
    "MetricTarget": {
        "type": needed(one_of("Utilization", "Value", "AverageValue")), "averageUtilization": positive,
        "value": formats.positive_quantity, "averageValue": formats.positive_quantity,
    },
    "MetricIdentifier": {"name": needed(formats.path_segment)},
    "ResourceMetricSource": {"name": needed()},
    "ContainerResourceMetricSource": {"name": needed(), "container": needed()},
    "HPAScalingRules": {"selectPolicy": given(one_of("Max", "Min", "Disabled"))},
    "HPAScalingPolicy": {
        "type": needed(one_of("Pods", "Percent")), "value": needed(positive),
        "periodSeconds": needed(formats.between(1, 1800)),
    },
    "PodDisruptionBudgetSpec": {"unhealthyPodEvictionPolicy": given(one_of("IfHealthyBudget", "AlwaysAllow"))},
    "PolicyRule": {"verbs": needed()},
    "Subject": {"kind": needed(one_of("ServiceAccount", "User", "Group")), "name": needed()},
    "ResourceQuotaSpec": {"scopes": formats.each(one_of(*_SCOPES))},
    "LimitRangeItem": {"type": needed(_limited)},
    "ScopedResourceSelectorRequirement": {
        "scopeName": needed(one_of(*_SCOPES)), "operator": needed(one_of("In", "NotIn", "Exists", "DoesNotExist")),
    },
    "PriorityClass": {"preemptionPolicy": given(one_of("PreemptLowerPriority", "Never"))},
    "StorageClass": {
        "provisioner": needed(formats.annotation_key), "reclaimPolicy": given(one_of("Delete", "Retain")),
        "volumeBindingMode": given(one_of("Immediate", "WaitForFirstConsumer")),
    },
    "Taint": {
        "key": needed(formats.qualified_name), "value": formats.label_value,
        "effect": needed(one_of(*formats.EFFECTS)),
    },
}  # fmt: skip
RULES = {
    "ConfigMap": [config_map], "Secret": [secret], "HorizontalPodAutoscalerSpec": [autoscaler], "MetricSpec": [metric],
    "HPAScalingRules": [scaling], "PodDisruptionBudgetSpec": [budget], "Role": [role], "ClusterRole": [cluster_role],
    "RoleBinding": [role_reference], "ClusterRoleBinding": [role_reference], "ResourceQuotaSpec": [quota],
    "LimitRangeItem": [limit], "LimitRangeSpec": [limits], "PriorityClass": [priority_class], "Namespace": [namespace],
    "ScopedResourceSelectorRequirement": [scope],
}  # fmt: skip
