"""What the pods of a training job may reach in a namespace that denies the rest (k8s/base): each other, names, and S3.

One policy a job, by a label of its pods: NCCL and gloo choose their ports, so processes need every port of each other.
Without the base's denial it still isolates them, both ways. RDMA passes no policy (it never sees the node's IP stack).
"""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from zhllama.errors import InputError
from zhllama.kubernetes.names import JOB_LABEL, check_namespace
from zhllama.kubernetes.training_job import TrainingJob

DNS_PORTS = (53, 5353)
"""A policy sees a connection after its Service's address became a pod's: OpenShift's DNS pods listen on 5353."""


@dataclass(frozen=True, kw_only=True)
class S3Network:
    """Where S3 is, as a policy can say it. Without ranges and namespaces it is anywhere, on these ports alone."""

    ports: tuple[int, ...] = (443, 8333, 9000)
    """HTTPS, SeaweedFS, MinIO: the server's own port, not its Service's."""
    cidrs: tuple[str, ...] = ()
    """Address ranges outside the cluster: 10.20.0.0/16."""
    namespaces: tuple[str, ...] = ()
    """Namespaces of this cluster that S3 servers are in."""

    def __post_init__(self) -> None:
        for port in self.ports:
            if not 1 <= port <= 65535:
                raise InputError(f"--s3-port {port}: a port is a number from 1 to 65535")
        for cidr in self.cidrs:
            try:
                ipaddress.ip_network(cidr)
            except ValueError as error:
                raise InputError(f"--s3-cidr {cidr}: {error}; write an address range as 10.20.0.0/16") from error
        for namespace in self.namespaces:
            check_namespace("--s3-namespace", namespace)

    @classmethod
    def at(cls, endpoint: str) -> "S3Network":
        """Anywhere, on the usual ports and on the one of this address; "" names none."""
        address = urlsplit(endpoint)
        try:
            port = address.port or {"http": 80, "https": 443}.get(address.scheme)
        except ValueError as error:
            raise InputError(f"ZHLLAMA_S3_ENDPOINT={endpoint}: {error}; write http://host:port") from error
        return cls() if port is None or port in cls.ports else cls(ports=(*cls.ports, port))

    def egress(self) -> dict[str, Any]:
        """A policy's egress rule. Without `to` it means every address; 0.0.0.0/0 would not, for some plugins, hold the
        cluster's own pods."""
        to: list[dict[str, Any]] = [{"ipBlock": {"cidr": cidr}} for cidr in self.cidrs]
        named = ({"matchLabels": {"kubernetes.io/metadata.name": name}} for name in self.namespaces)
        to += [{"namespaceSelector": selector} for selector in named]
        return {**({"to": to} if to else {}), "ports": ports(self.ports)}


def ports(numbers: Sequence[int], protocols: Sequence[str] = ("TCP",)) -> list[dict[str, Any]]:
    return [{"protocol": protocol, "port": number} for number in numbers for protocol in protocols]


def isolated(labels: dict[str, str], ingress: dict[str, Any], s3: S3Network, *egress: dict[str, Any]) -> dict[str, Any]:
    """A policy's spec: pods with these labels let in by that rule alone, and reach by those, names, and S3. Names are
    asked for anywhere: a cache on the node has an address of its own."""
    return {
        "podSelector": {"matchLabels": labels},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [ingress],
        "egress": [*egress, {"ports": ports(DNS_PORTS, ("UDP", "TCP"))}, s3.egress()],
    }


def network_policy(job: TrainingJob, s3: S3Network | None = None) -> dict[str, Any]:
    """The NetworkPolicy of the job, of its name, in its namespace, with its labels and its owner."""
    own = {JOB_LABEL: job.name}
    each_other = [{"podSelector": {"matchLabels": own}}]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": job.metadata({**job.labels, **own}),
        "spec": isolated(own, {"from": each_other}, s3 or S3Network(), {"to": each_other}),
    }
