"""Pods and their templates: what their parts say of each other."""

from collections.abc import Iterator, Mapping

from pipelines.manifests.check.documents import Finding, Place
from pipelines.manifests.check.field import Field
from pipelines.manifests.check.server import security_context
from pipelines.manifests.check.server.containers import HANDLERS, no_repeats, resources
from pipelines.manifests.check.server.metadata import labels_of
from zhllama.kubernetes import formats
from zhllama.kubernetes.formats import MOST, Check, between, each, given, needed, one_of

_OF_MAIN_CONTAINERS = ("readinessProbe", "livenessProbe", "startupProbe", "lifecycle")
_DNS = one_of("ClusterFirstWithHostNet", "ClusterFirst", "Default", "None")
CONTAINERS = ("containers", "initContainers")


def pod(field: Field) -> Iterator[Finding]:
    """A Pod itself: more than its spec."""
    spec = field["spec"]
    yield from security_context.annotations(field["metadata"], spec)
    if not spec:
        yield spec["containers"].wrong("is needed")
    if spec.text("nodeName") and spec["schedulingGates"].value:
        yield spec["nodeName"].wrong("cannot be set while there are schedulingGates")
    for kind in CONTAINERS:
        for container in spec.each(kind):
            image = container.text("image")
            if image != image.strip():
                yield container["image"].wrong(f"{image!r} begins or ends with a space")
    for volume in spec.each("volumes"):
        if volume["image"] and not volume["image"].text("reference"):
            yield volume["image"]["reference"].wrong("is needed")
        if not volume["ephemeral"]:
            continue
        if wrong := formats.subdomain(f"{field['metadata'].text('name')}-{volume.text('name')}"):
            yield volume["name"].wrong(f"becomes a claim's name with the pod's: {wrong}")


def template(field: Field) -> Iterator[Finding]:
    yield from labels_of(field["metadata"])
    yield from security_context.annotations(field["metadata"], field["spec"])
    if not field["spec"]:
        yield field["spec"]["containers"].wrong("is needed")


def always_restarts(template: Field) -> Iterator[Finding]:
    """A template whose pods are kept running."""
    spec = template["spec"]
    if spec.text("restartPolicy") not in ("", "Always"):
        yield spec["restartPolicy"].wrong(f"{spec.text('restartPolicy')!r}: must be Always here")
    if spec["activeDeadlineSeconds"]:
        yield spec["activeDeadlineSeconds"].wrong("is for pods that end")


def spec(field: Field) -> Iterator[Finding]:
    yield from _containers(field)
    yield from no_repeats(field, "volumes", "name")
    yield from _mounts(field)
    yield from _network(field)
    yield from security_context.of_pod_and_host(field)
    yield from no_repeats(field, "schedulingGates", "name")
    yield from no_repeats(field, "resourceClaims", "name")
    pairs = set()
    for one in field.each("topologySpreadConstraints"):
        pair = (one.text("topologyKey"), one.text("whenUnsatisfiable"))
        if pair in pairs:
            yield one.wrong(f"{', '.join(pair)}: stands there already")
        pairs.add(pair)
    yield from _of_all_containers(field)
    if field["overhead"]:
        limits = Field(field.document, (*field.place, "overhead"), {"limits": field["overhead"].value}, field.grade)
        yield from resources(limits)
    if field["ephemeralContainers"].value:
        yield field["ephemeralContainers"].wrong("are added to a pod that runs")


def _of_all_containers(field: Field) -> Iterator[Finding]:
    """Resources of the pod as a whole."""
    whole = field["resources"]
    if whole["claims"].value:
        yield whole["claims"].wrong("are for containers")
    for name in ("requests", "limits"):
        for kind, value in whole.mapping(name).items():
            if kind not in ("cpu", "memory") and not kind.startswith("hugepages-"):
                yield whole[name][kind].wrong("of a whole pod are cpu, memory and hugepages")
                continue
            parts = [formats.amount(one["resources"].mapping(name).get(kind)) or 0 for one in field.each("containers")]
            most = formats.amount(value)
            if most is not None and (sum(parts) if name == "requests" else max(parts, default=0)) > most:
                yield whole[name][kind].wrong(f"{value} is less than its containers say")


def _containers(field: Field) -> Iterator[Finding]:
    names = set()
    for kind in CONTAINERS:
        for container in field.each(kind):
            name = container.text("name")
            if name and name in names:
                yield container["name"].wrong(f"{name!r} stands there already")
            names.add(name)
            if kind == "initContainers" and container.text("restartPolicy") != "Always":
                for forbidden in _OF_MAIN_CONTAINERS:
                    if container[forbidden]:
                        yield container[forbidden].wrong("is not for init containers, unless restartPolicy is Always")
            grace = field.number("terminationGracePeriodSeconds")
            for hook in ("preStop", "postStart"):
                sleep = container["lifecycle"][hook]["sleep"].number("seconds")
                longest = 30 if grace is None else grace
                if sleep is not None and not HANDLERS & container["lifecycle"][hook].names() and sleep > longest:
                    place = container["lifecycle"][hook]["sleep"]
                    yield place.wrong(f"{sleep} s are more than terminationGracePeriodSeconds, {longest}")
            for policy in container.each("resizePolicy") if field.text("restartPolicy") == "Never" else ():
                if policy.text("restartPolicy") != "NotRequired":
                    yield policy["restartPolicy"].wrong("must be NotRequired where the pod's restartPolicy is Never")
            claims = {claim.text("name") for claim in field.each("resourceClaims")}
            for claim in container["resources"].each("claims"):
                if claim.text("name") not in claims:
                    yield claim.wrong(f"the pod has no resourceClaim {claim.text('name')!r}")


def _mounts(field: Field) -> Iterator[Finding]:
    volumes = {volume.text("name"): volume for volume in field.each("volumes")}
    if field.document.kind == "StatefulSet":
        whole = Field(field.document, (), field.document.value)["spec"]
        claims = whole.each("volumeClaimTemplates")
        volumes |= {claim["metadata"].text("name"): Field(claim.document, (), {"ephemeral": {}}) for claim in claims}
    for kind in CONTAINERS:
        for container in field.each(kind):
            for mount in container.each("volumeMounts"):
                if mount.text("name") and mount.text("name") not in volumes:
                    yield mount["name"].wrong(f"the pod has no volume {mount.text('name')!r}")
            for device in container.each("volumeDevices"):
                volume = volumes.get(device.text("name"))
                if volume is None or not volume.names() & {"persistentVolumeClaim", "ephemeral"}:
                    yield device["name"].wrong("must be a volume of the pod that is a claim")


def _network(field: Field) -> Iterator[Finding]:
    on_host = field["hostNetwork"].value is True
    taken: set[tuple[tuple[int | None, str, str], Place]] = set()
    for container in field.each("containers"):
        for port in container.each("ports"):
            number, on = port.number("containerPort"), port.number("hostPort")
            if on_host and on and on != number:
                yield port["hostPort"].wrong("must be the containerPort with hostNetwork")
            bound = (on or (number if on_host else None), port.text("protocol") or "TCP", port.text("hostIP"))
            if bound[0] and (bound, container.place) not in taken and bound in {one for one, _ in taken}:
                yield port["hostPort" if on else "containerPort"].wrong(f"{bound[0]} of the host is taken already")
            taken.add((bound, container.place))
    servers = field["dnsConfig"].list("nameservers")
    if field.text("dnsPolicy") == "None" and not servers:
        yield field["dnsConfig"].wrong("with nameservers is needed with dnsPolicy None")
    if len(servers) > 3:
        yield field["dnsConfig"]["nameservers"].wrong("may be three")
    searches = field["dnsConfig"].list("searches")
    if len(searches) > 32 or len(" ".join(map(str, searches))) > 2048:
        yield field["dnsConfig"]["searches"].wrong("may be 32, of 2048 characters in all")


def _search(text: str) -> str:
    return "" if text == "." else formats.subdomain(text.rstrip(".").replace("_", "a"))


FIELDS: Mapping[str, Mapping[str, Check]] = {
    "PodSpec": {
        "containers": needed(),
        "restartPolicy": one_of("Always", "OnFailure", "Never"),
        "dnsPolicy": _DNS,
        "activeDeadlineSeconds": between(1, MOST),
        "hostname": formats.dns_label,
        "subdomain": formats.dns_label,
        "nodeName": formats.subdomain,
        "nodeSelector": formats.labels,
        "serviceAccountName": formats.subdomain,
        "priorityClassName": formats.subdomain,
        "runtimeClassName": formats.subdomain,
        "preemptionPolicy": given(one_of("PreemptLowerPriority", "Never")),
    },
    "PodOS": {"name": needed(one_of("linux", "windows"))},
    "PodSchedulingGate": {"name": needed(formats.qualified_name)},
    "PodReadinessGate": {"conditionType": needed(formats.qualified_name)},
    "PodResourceClaim": {"name": needed(formats.dns_label)},
    "PodDNSConfig": {"nameservers": each(formats.ip), "searches": each(_search)},
    "PodDNSConfigOption": {"name": needed()},
    "HostAlias": {"ip": needed(formats.ip), "hostnames": each(formats.subdomain)},
}
RULES = {"Pod": [pod], "PodTemplateSpec": [template], "PodSpec": [spec]}
