"""Containers: their ports, variables, mounts, probes and resources."""

import re
from collections.abc import Iterator, Mapping
from decimal import Decimal

from pipelines.manifests.check.documents import Finding
from pipelines.manifests.check.field import Field
from zhllama.kubernetes import formats
from zhllama.kubernetes.formats import Check, amount, given, needed, no_negative, one_of

PROTOCOLS = one_of("TCP", "UDP", "SCTP")
PULL_POLICIES = one_of("Always", "IfNotPresent", "Never")
_POD_FIELDS = (
    "metadata.name", "metadata.namespace", "metadata.uid", "spec.nodeName", "spec.serviceAccountName", "status.hostIP",
    "status.hostIPs", "status.podIP", "status.podIPs",
)  # fmt: skip
_KEYED_FIELD = re.compile(r"metadata\.(labels|annotations)\['([^']*)'\]")
_RESOURCE_FIELD = re.compile(r"(limits|requests)\.(cpu|memory|ephemeral-storage|hugepages-.+)")
_DIVISORS = {
    "cpu": {"1m", "1"},
    "memory": {"1", *(f"1{unit}" for unit in ("k", "M", "G", "T", "P", "E", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"))},
}


def one_source(field: Field, names: set[str], what: str = "source", least: int = 1) -> Iterator[Finding]:
    """At most one of these fields, and at least `least`."""
    found = sorted(names & field.names())
    if len(found) > 1:
        yield field.wrong(f"takes one {what}, and has {', '.join(found)}")
    elif len(found) < least:
        yield field.wrong(f"needs one {what}: {', '.join(sorted(names))}")


def no_repeats(field: Field, name: str, key: str) -> Iterator[Finding]:
    """Of the items of a list: no two have the same `key`."""
    seen = set()
    for item in field.each(name):
        text = item.text(key)
        if text and text in seen:
            yield item[key].wrong(f"{text!r} stands there already")
        seen.add(text)


# --- variables --------------------------------------------------------------------------------------------------------


def variable(field: Field) -> Iterator[Finding]:
    if field["valueFrom"]:
        if field.text("value"):
            yield field["valueFrom"].wrong("may not be given beside a value")
        sources = {"fieldRef", "resourceFieldRef", "configMapKeyRef", "secretKeyRef"}
        yield from one_source(field["valueFrom"], sources)
        path = field["valueFrom"]["fieldRef"].text("fieldPath")
        if path in ("metadata.labels", "metadata.annotations"):
            yield field["valueFrom"]["fieldRef"]["fieldPath"].wrong(f"name one of them, as {path}['key']")


def field_reference(field: Field) -> Iterator[Finding]:
    path = field.text("fieldPath")
    keyed = _KEYED_FIELD.fullmatch(path)
    if keyed and (wrong := (formats.annotation_key if keyed[1] == "annotations" else formats.qualified_name)(keyed[2])):
        yield field["fieldPath"].wrong(f"{keyed[2]!r}: {wrong}")
    elif path and not keyed and path not in (*_POD_FIELDS, "metadata.labels", "metadata.annotations"):
        yield field["fieldPath"].wrong(f"{path!r} is no field of a pod that can be read")
    if field.text("apiVersion") not in ("", "v1"):
        yield field["apiVersion"].wrong("must be v1")


def resource_reference(field: Field) -> Iterator[Finding]:
    found = _RESOURCE_FIELD.fullmatch(field.text("resource"))
    if not found:
        yield field["resource"].wrong("must be limits. or requests. with cpu, memory or ephemeral-storage")
    elif amount(field["divisor"].value):
        allowed = _DIVISORS["cpu" if found[2] == "cpu" else "memory"]
        if amount(field["divisor"].value) not in map(amount, allowed):
            yield field["divisor"].wrong(f"must be one of {', '.join(sorted(allowed))}")


def variables_from(field: Field) -> Iterator[Finding]:
    yield from one_source(field, {"configMapRef", "secretRef"})


# --- probes -----------------------------------------------------------------------------------------------------------

HANDLERS = {"exec", "httpGet", "tcpSocket"}


def probe(field: Field) -> Iterator[Finding]:
    yield from one_source(field, HANDLERS | {"grpc"}, "handler")
    for name in ("initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"):
        if (field.number(name) or 0) < 0:
            yield field[name].wrong("must be 0 or more")
    kind, grace = field.place[-1], field.number("terminationGracePeriodSeconds")
    if kind == "readinessProbe" and grace is not None:
        yield field["terminationGracePeriodSeconds"].wrong("may not be set for a readinessProbe")
    elif grace is not None and grace < 1:
        yield field["terminationGracePeriodSeconds"].wrong("must be more than 0")
    if kind in ("livenessProbe", "startupProbe") and (field.number("successThreshold") or 0) > 1:
        yield field["successThreshold"].wrong(f"must be 1 for a {kind}")


def lifecycle_handler(field: Field) -> Iterator[Finding]:
    yield from one_source(field, HANDLERS | {"sleep"}, "handler")


# --- resources --------------------------------------------------------------------------------------------------------


def resources(field: Field) -> Iterator[Finding]:
    limits, requests = field.mapping("limits"), field.mapping("requests")
    for name in ("limits", "requests"):
        for kind, value in field.mapping(name).items():
            if wrong := formats.resource_name(kind) or _resource_amount(kind, value):
                yield field[name][kind].wrong(wrong)
    for kind, value in requests.items():
        asked, most = amount(value), amount(limits.get(kind))
        if asked is None:
            continue
        if most is None:
            if is_never_shared(kind):
                yield field["requests"][kind].wrong("is in no limits: give it there too", "gpu-limits")
        elif is_never_shared(kind) and asked != most:
            yield field["requests"][kind].wrong(f"{value} requested, {limits[kind]} the limit", "gpu-limits")
        elif asked > most:
            yield field["requests"][kind].wrong(f"{value} requested, {limits[kind]} the limit", "resources")
    kinds = {*limits, *requests}
    if any(kind.startswith("hugepages-") for kind in kinds) and not {"cpu", "memory"} & kinds:
        yield field.wrong("hugepages need cpu or memory beside them")
    yield from no_repeats(field, "claims", "name")


def is_never_shared(kind: str) -> bool:
    return is_extended(kind) or kind.startswith("hugepages-")


def is_extended(kind: str) -> bool:
    return "/" in kind and not kind.partition("/")[0].endswith("kubernetes.io")


def _resource_amount(kind: str, value: object) -> str:
    found = amount(value)
    if found is None:
        return ""
    if found < 0:
        return "must not be negative"
    if is_extended(kind) and found != found.to_integral_value():
        return f"{value}: must be a whole number"
    if kind.startswith("hugepages-"):
        page = amount(kind.removeprefix("hugepages-"))
        if page is None or page <= 0:
            return "must be hugepages- and the size of a page"
        if found % Decimal(page):
            return f"{value}: must be a multiple of the page's size"
    return ""


# --- the container itself ---------------------------------------------------------------------------------------------


def container(field: Field) -> Iterator[Finding]:
    yield from no_repeats(field, "ports", "name")
    bound = set()
    for port in field.each("ports"):
        at = (port.number("hostPort"), port.text("protocol") or "TCP", port.text("hostIP"))
        if at[0] and at in bound:
            yield port["hostPort"].wrong(f"{at[0]} stands there already")
        bound.add(at)
    paths = set()
    for name, key in (("volumeMounts", "mountPath"), ("volumeDevices", "devicePath")):
        for mount in field.each(name):
            if mount.text(key) and mount.text(key) in paths:
                yield mount[key].wrong(f"{mount.text(key)} is mounted already")
            paths.add(mount.text(key))
    privileged = field["securityContext"]["privileged"].value is True
    for mount in field.each("volumeMounts"):
        if mount.text("mountPropagation") == "Bidirectional" and not privileged:
            yield mount["mountPropagation"].wrong("Bidirectional is for privileged containers")
    resized = set()
    for policy in field.each("resizePolicy"):
        if policy.text("resourceName") in resized:
            yield policy["resourceName"].wrong("stands there already")
        resized.add(policy.text("resourceName"))


def mount(field: Field) -> Iterator[Finding]:
    if field.text("subPath") and field.text("subPathExpr"):
        yield field["subPathExpr"].wrong("subPath stands beside it; keep one")
    if field.text("recursiveReadOnly") in ("IfPossible", "Enabled"):
        if field["readOnly"].value is not True:
            yield field["recursiveReadOnly"].wrong("needs readOnly: true")
        if field.text("mountPropagation") not in ("", "None"):
            yield field["recursiveReadOnly"].wrong("needs mountPropagation None")


_REFERENCE = {"name": needed(formats.subdomain), "key": needed(formats.config_key)}
FIELDS: Mapping[str, Mapping[str, Check]] = {
    "Container": {
        "name": needed(formats.dns_label),
        "image": needed(),
        "imagePullPolicy": PULL_POLICIES,
        "terminationMessagePolicy": one_of("File", "FallbackToLogsOnError"),
    },
    "ContainerPort": {
        "name": formats.port_name,
        "containerPort": needed(formats.port_number),
        "hostPort": formats.between(0, 65535),
        "protocol": PROTOCOLS,
    },
    "ContainerResizePolicy": {
        "resourceName": needed(one_of("cpu", "memory")),
        "restartPolicy": needed(one_of("NotRequired", "RestartContainer")),
    },
    "EnvVar": {"name": needed(formats.variable)},
    "ObjectFieldSelector": {"fieldPath": needed()},
    "ResourceFieldSelector": {"resource": needed()},
    "SecretKeySelector": _REFERENCE,
    "ConfigMapKeySelector": _REFERENCE,
    "EnvFromSource": {"prefix": formats.variable},
    "ConfigMapEnvSource": {"name": needed(formats.subdomain)},
    "SecretEnvSource": {"name": needed(formats.subdomain)},
    "VolumeMount": {
        "name": needed(),
        "mountPath": needed(),
        "subPath": formats.relative_path,
        "subPathExpr": formats.relative_path,
        "mountPropagation": given(one_of("None", "HostToContainer", "Bidirectional")),
        "recursiveReadOnly": given(one_of("Disabled", "IfPossible", "Enabled")),
    },
    "VolumeDevice": {"name": needed(), "devicePath": needed(formats.without_way_up)},
    "ExecAction": {"command": needed()},
    "HTTPGetAction": {"port": needed(formats.port), "scheme": one_of("HTTP", "HTTPS")},
    "HTTPHeader": {"name": needed(formats.header)},
    "TCPSocketAction": {"port": needed(formats.port)},
    "GRPCAction": {"port": needed(formats.port_number)},
    "SleepAction": {"seconds": no_negative},
    "ResourceClaim": {"name": needed()},
}
RULES = {
    "Container": [container],
    "EnvVar": [variable],
    "ObjectFieldSelector": [field_reference],
    "ResourceFieldSelector": [resource_reference],
    "EnvFromSource": [variables_from],
    "Probe": [probe],
    "LifecycleHandler": [lifecycle_handler],
    "ResourceRequirements": [resources],
    "VolumeMount": [mount],
}
