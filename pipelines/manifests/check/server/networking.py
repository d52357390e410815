"""Service, Ingress, NetworkPolicy."""

import ipaddress
from collections.abc import Iterator, Mapping

from pipelines.manifests.check.documents import Finding
from pipelines.manifests.check.field import Field
from pipelines.manifests.check.server.containers import PROTOCOLS, one_source
from zhllama.kubernetes import formats
from zhllama.kubernetes.formats import Check, between, each, given, needed, one_of

_OUTSIDE = ("NodePort", "LoadBalancer")
"""Types that are reached from outside of the cluster."""
_NO_SERVICES = [ipaddress.ip_network(text) for text in ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24")]
"""Ranges of documentation (RFC 5737): no cluster's services are there."""


# --- Service ----------------------------------------------------------------------------------------------------------


def service(field: Field) -> Iterator[Finding]:
    kind = field.text("type") or "ClusterIP"
    headless = field.text("clusterIP") == "None" or "None" in field.list("clusterIPs")
    if kind == "ExternalName":
        if not field.text("externalName"):
            yield field["externalName"].wrong("is needed")
        elif wrong := formats.subdomain(field.text("externalName").removesuffix(".")):
            yield field["externalName"].wrong(wrong)
        for name in ("clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"):
            if field[name].value:
                yield field[name].wrong("may not be given with type ExternalName")
    elif not headless and not field["ports"].value:
        yield field["ports"].wrong("is needed")
    if headless and kind in _OUTSIDE:
        yield field["clusterIP"].wrong(f"may not be None with type {kind}")
    yield from _addresses(field)
    yield from _service_ports(field, kind)
    if kind != "LoadBalancer":
        for name in ("loadBalancerSourceRanges", "loadBalancerClass", "allocateLoadBalancerNodePorts"):
            if field[name]:
                yield field[name].wrong("is for type LoadBalancer")
    if field.text("externalTrafficPolicy") and kind not in _OUTSIDE and not field["externalIPs"].value:
        yield field["externalTrafficPolicy"].wrong("is for a service that is reached from outside")
    if field.number("healthCheckNodePort") and field.text("externalTrafficPolicy") != "Local":
        yield field["healthCheckNodePort"].wrong("needs type LoadBalancer and externalTrafficPolicy Local")
    affinity = field["sessionAffinityConfig"]["clientIP"].number("timeoutSeconds")
    if affinity is not None and not 0 < affinity <= 86400:
        yield field["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"].wrong("must be between 1 and 86400")
    if field["sessionAffinityConfig"] and field.text("sessionAffinity") != "ClientIP":
        yield field["sessionAffinityConfig"].wrong("needs sessionAffinity ClientIP")


def _addresses(field: Field) -> Iterator[Finding]:
    own, all_of_them = field["clusterIP"], field["clusterIPs"]
    named = [one for one in (own, *all_of_them.items()) if isinstance(one.value, str) and one.value not in ("", "None")]
    for one in named:
        if wrong := formats.ip(one.value):
            yield one.wrong(f"{one.value!r}: {wrong}")
        elif any(_inside(one.value, network) for network in _NO_SERVICES):
            yield one.wrong(f"{one.value} is of a range for documentation: no cluster has services there")
    if own and all_of_them.value and own.value != all_of_them.value[0]:
        yield all_of_them.wrong("the first must be the clusterIP")
    families = [str(one) for one in field.list("ipFamilies")]
    if len(families) > len(set(families)):
        yield field["ipFamilies"].wrong("names one twice")
    for one in field["externalIPs"].items():
        if isinstance(one.value, str) and not formats.ip(one.value):
            address = ipaddress.ip_address(one.value)
            if address.is_loopback or address.is_link_local or address.is_multicast or address.is_unspecified:
                yield one.wrong("may not be a loopback, link-local, multicast or unspecified address")


def _inside(text: str, network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> bool:
    try:
        return ipaddress.ip_address(text) in network
    except ValueError:
        return False


def _service_ports(field: Field, kind: str) -> Iterator[Finding]:
    ports = list(field.each("ports"))
    names, numbers, nodes = set(), set(), set()
    for port in ports:
        name, protocol = port.text("name"), port.text("protocol") or "TCP"
        if not name and len(ports) > 1:
            yield port["name"].wrong("is needed where there are several ports")
        if name and name in names:
            yield port["name"].wrong(f"{name!r} stands there already")
        names.add(name)
        if (port.number("port"), protocol) in numbers:
            yield port.wrong(f"port {port.number('port')} of {protocol} stands there already")
        numbers.add((port.number("port"), protocol))
        node = port.number("nodePort")
        if node and kind == "ClusterIP":
            yield port["nodePort"].wrong(f"may not be given with type {kind}")
        elif node and (node, protocol) in nodes:
            yield port["nodePort"].wrong(f"{node} stands there already")
        elif node and not 30000 <= node <= 32767:
            yield port["nodePort"].wrong(f"{node}: must be between 30000 and 32767, unless the cluster says otherwise")
        nodes.add((node, protocol))


def _target(value: object) -> str:
    return "" if value in (0, "") else formats.port(value)


# --- Ingress ----------------------------------------------------------------------------------------------------------


def ingress(field: Field) -> Iterator[Finding]:
    if not field["rules"].value and not field["defaultBackend"]:
        yield field.wrong("rules or a defaultBackend are needed")
    for rule in field.each("rules"):
        host = rule.text("host")
        if host and not formats.ip(host):
            yield rule["host"].wrong("must be a name, not an address")
        elif host and (wrong := formats.wildcard_or_subdomain(host)):
            yield rule["host"].wrong(f"{host!r}: {wrong}")
    for tls in field.each("tls"):
        if wrong := each(formats.wildcard_or_subdomain)(tls.list("hosts")):
            yield tls["hosts"].wrong(wrong)


def ingress_class(field: Field) -> Iterator[Finding]:
    """Of the whole Ingress: its class is named once."""
    old = "kubernetes.io/ingress.class"
    if field["spec"].text("ingressClassName") and old in field["metadata"].mapping("annotations"):
        yield field["metadata"]["annotations"][old].wrong("ingressClassName says it too; keep that")


def ingress_path(field: Field) -> Iterator[Finding]:
    path, kind = field.text("path"), field.text("pathType")
    if kind in ("Exact", "Prefix") and not path.startswith("/"):
        yield field["path"].wrong("must begin with /")
    elif kind in ("Exact", "Prefix"):
        for part in ("//", "/./", "/../", "%2f", "%2F"):
            if part in path:
                yield field["path"].wrong(f"must not contain {part}")
        if path.endswith(("/.", "/..")):
            yield field["path"].wrong("must not end with /. or /..")
    elif path and not path.startswith("/"):
        yield field["path"].wrong("must begin with /")


def backend(field: Field) -> Iterator[Finding]:
    """Of an Ingress."""
    yield from one_source(field, {"service", "resource"}, "backend")
    service = field["service"]
    if service:
        port = service["port"]
        if wrong := formats.dns_1035_label(service.text("name")):
            yield service["name"].wrong(f"{service.text('name')!r}: {wrong}")
        if bool(port.text("name")) == bool(port.number("number")):
            yield port.wrong("needs one of name and number")
        elif number := port.number("number"):
            if wrong := formats.port_number(number):
                yield port["number"].wrong(wrong)
        elif wrong := formats.port_name(port.text("name")):
            yield port["name"].wrong(wrong)


# --- NetworkPolicy ----------------------------------------------------------------------------------------------------


def policy_port(field: Field) -> Iterator[Finding]:
    port, end = field["port"].value, field.number("endPort")
    if end is None:
        return
    if not isinstance(port, int):
        yield field["endPort"].wrong("needs a port that is a number")
    elif end < port:
        yield field["endPort"].wrong(f"must be {port} or more, the port")


def policy_peer(field: Field) -> Iterator[Finding]:
    peers = field.names() & {"ipBlock", "podSelector", "namespaceSelector"}
    if not peers:
        yield field.wrong("is empty: name ipBlock, podSelector or namespaceSelector")
    elif "ipBlock" in peers and len(peers) > 1:
        yield field.wrong("ipBlock stands alone")


def block(field: Field) -> Iterator[Finding]:
    cidr = field.text("cidr")
    if not cidr or formats.cidr(cidr):
        return
    around = ipaddress.ip_network(cidr, strict=False)
    for one in field["except"].items():
        if not isinstance(one.value, str) or formats.cidr(one.value):
            continue
        inner = ipaddress.ip_network(one.value, strict=False)
        inside = inner.version == around.version and inner.network_address in around
        if not inside or inner.prefixlen <= around.prefixlen:
            yield one.wrong(f"{one.value} is not within {cidr}")


def _two(kinds: list[str]) -> str:
    return "may be two" if len(kinds) > 2 else ""


FIELDS: Mapping[str, Mapping[str, Check]] = {
    "ServiceSpec": {
        "type": one_of("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"),
        "selector": formats.labels,
        "sessionAffinity": one_of("None", "ClientIP"),
        "externalIPs": each(formats.ip),
        "loadBalancerSourceRanges": each(lambda text: formats.cidr(text.strip())),
        "externalTrafficPolicy": one_of("Cluster", "Local"),
        "internalTrafficPolicy": given(one_of("Cluster", "Local")),
        "ipFamilyPolicy": given(one_of("SingleStack", "PreferDualStack", "RequireDualStack")),
        "ipFamilies": each(one_of("IPv4", "IPv6")),
        "loadBalancerClass": formats.qualified_name,
        "trafficDistribution": given(one_of("PreferClose", "PreferSameZone", "PreferSameNode")),
    },
    "ServicePort": {
        "name": formats.dns_label,
        "port": needed(formats.port_number),
        "targetPort": _target,
        "protocol": PROTOCOLS,
        "nodePort": between(0, 65535),
        "appProtocol": given(formats.qualified_name),
    },
    "IngressSpec": {"ingressClassName": given(formats.subdomain)},
    "HTTPIngressPath": {"pathType": needed(one_of("Exact", "Prefix", "ImplementationSpecific"))},
    "HTTPIngressRuleValue": {"paths": needed()},
    "IngressTLS": {"secretName": formats.subdomain},
    "IngressServiceBackend": {"name": needed()},
    "NetworkPolicySpec": {"policyTypes": lambda kinds: each(one_of("Ingress", "Egress"))(kinds) or _two(kinds)},
    "NetworkPolicyPort": {"protocol": given(PROTOCOLS), "port": formats.port, "endPort": formats.port_number},
    "IPBlock": {"cidr": needed(formats.cidr), "except": each(formats.cidr)},
}
RULES = {
    "ServiceSpec": [service], "Ingress": [ingress_class], "IngressSpec": [ingress], "HTTPIngressPath": [ingress_path],
    "IngressBackend": [backend], "NetworkPolicyPort": [policy_port], "NetworkPolicyPeer": [policy_peer],
    "IPBlock": [block],
}  # fmt: skip
