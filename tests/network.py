"""What a set of NetworkPolicies lets through, by the rules that Kubernetes states for them.

A pod that no policy selects in a direction is open in it; one that some policy selects may do what any of these
policies allows. A connection needs the source's egress and the destination's ingress.
"""

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class End:
    """A pod, or with an address alone something outside the cluster."""

    labels: Mapping[str, str] = field(default_factory=dict)
    namespace: str = "zhllama"
    namespace_labels: Mapping[str, str] = field(default_factory=dict)
    address: str = ""


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """A label selector; the empty one selects everything."""
    assert set(selector) <= {"matchLabels", "matchExpressions"}, selector
    for name, value in (selector.get("matchLabels") or {}).items():
        if labels.get(name) != value:
            return False
    for expression in selector.get("matchExpressions") or ():
        here, operator = labels.get(expression["key"]), expression["operator"]
        right = {
            "Exists": here is not None,
            "DoesNotExist": here is None,
            "In": here in expression.get("values", ()),
            "NotIn": here not in expression.get("values", ()),
        }[operator]
        if not right:
            return False
    return True


def _peer(peer: Mapping[str, Any], end: End, namespace: str) -> bool:
    assert set(peer) <= {"podSelector", "namespaceSelector", "ipBlock"}, peer
    if "ipBlock" in peer:
        return bool(end.address) and ipaddress.ip_address(end.address) in ipaddress.ip_network(peer["ipBlock"]["cidr"])
    if end.address:
        return False
    if "namespaceSelector" in peer:
        labels = {"kubernetes.io/metadata.name": end.namespace, **end.namespace_labels}
        if not selects(peer["namespaceSelector"], labels):
            return False
    elif end.namespace != namespace:
        return False
    return selects(peer.get("podSelector", {}), end.labels)


def _side(policies: Iterable[Mapping[str, Any]], end: End, other: End, way: str, port: int, protocol: str) -> bool:
    if end.address:
        return True
    spec_key, peers_key = {"Egress": ("egress", "to"), "Ingress": ("ingress", "from")}[way]
    chosen = [
        policy
        for policy in policies
        if way in policy["spec"]["policyTypes"]
        and policy["metadata"].get("namespace", "zhllama") == end.namespace
        and selects(policy["spec"]["podSelector"], end.labels)
    ]
    if not chosen:
        return True
    for policy in chosen:
        for rule in policy["spec"].get(spec_key) or ():
            to = not rule.get(peers_key) or any(_peer(peer, other, end.namespace) for peer in rule[peers_key])
            listed = rule.get("ports")
            through = not listed or any((one["protocol"], one["port"]) == (protocol, port) for one in listed)
            if to and through:
                return True
    return False


def allowed(policies: Iterable[Mapping[str, Any]], source: End, target: End, port: int, protocol: str = "TCP") -> bool:
    """Whether a connection from source to target's port is let through."""
    policies = list(policies)
    out = _side(policies, source, target, "Egress", port, protocol)
    return out and _side(policies, target, source, "Ingress", port, protocol)
