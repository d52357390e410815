"""What the pods of a training job may reach in a namespace that denies the rest (k8s/base): each other, names, and S3.

One policy a job, by a label of its pods: NCCL and gloo choose their ports, so processes need every port of each other.
Without the base's denial it still isolates them, both ways. RDMA passes no policy (it never sees the node's IP stack).
"""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from zhllama.errors import InputError
from zhllama.kubernetes import formats
from zhllama.kubernetes.names import JOB_LABEL, check_namespace
from zhllama.kubernetes.training_job import TrainingJob

NAMESPACE = "kubernetes.io/metadata.name"
DNS_PORTS = (53, 5353)
"""A policy sees a connection after its Service's address became a pod's: OpenShift's DNS pods listen on 5353."""
NODE_DNS = "169.254.20.10/32"
"""Where node-local caches of names listen, as Kubernetes' own manifest has it."""
DNS = (
    {
        "namespaceSelector": {"matchLabels": {NAMESPACE: "kube-system"}},
        "podSelector": {
            "matchExpressions": [
                {"key": "k8s-app", "operator": "In", "values": ["kube-dns", "coredns", "node-local-dns"]}
            ]
        },
    },
    {"namespaceSelector": {"matchLabels": {NAMESPACE: "openshift-dns"}}},
    {"ipBlock": {"cidr": NODE_DNS}},
)
"""Who is asked for names: the cluster's DNS, OpenShift's, a cache on the node. Others: k8s/components/open-network."""


ANYWHERE = "0.0.0.0/0"


@dataclass(frozen=True, kw_only=True)
class S3Network:
    """Where S3 is, and who is asked for names, as a policy can say it. Without ranges and namespaces S3 is in this
    cluster."""

    ports: tuple[int, ...] = (443, 8333, 9000)
    """HTTPS, SeaweedFS, MinIO: the server's own port, not its Service's."""
    cidrs: tuple[str, ...] = ()
    """Address ranges outside the cluster: 10.20.0.0/16; ANYWHERE: every address, the cluster's too."""
    namespaces: tuple[str, ...] = ()
    """Namespaces of this cluster that S3 servers are in."""
    dns: tuple[str, ...] = ()
    """Address ranges that names are asked of beside the cluster's DNS; 0.0.0.0/0 is anybody."""
    named: int = 0
    """The port of a server outside whose address is a name: policies know no names, so this one port is open."""

    def __post_init__(self) -> None:
        for port in self.ports:
            if not 1 <= port <= 65535:
                raise InputError(f"--s3-port {port}: a port is a number from 1 to 65535")
        for option, cidr in [("--s3-cidr", one) for one in self.cidrs] + [("--dns-cidr", one) for one in self.dns]:
            check_range(option, cidr)
        for namespace in self.namespaces:
            check_namespace("--s3-namespace", namespace)

    @classmethod
    def at(cls, endpoint: str) -> "S3Network":
        """Of an address, as ZHLLAMA_S3_ENDPOINT has it: of a Service of the cluster (`http://minio.storage.svc:9000`)
        its namespace; else its port, of every address, and the cluster, where a Service's own address leads. ""
        names Amazon's."""
        address = urlsplit(endpoint or "https://s3.amazonaws.com")
        try:
            port = address.port or {"http": 80, "https": 443}.get(address.scheme, 0)
        except ValueError as error:
            raise InputError(f"ZHLLAMA_S3_ENDPOINT={endpoint}: {error}; write http://host:port") from error
        if service := re.fullmatch(r"[^.]+\.([^.]+)\.svc(\..+)?", address.hostname or ""):
            more = () if port in (0, *cls.ports) else (port,)
            return cls(ports=(*cls.ports, *more), namespaces=(service[1],))
        return cls(named=port)

    def egress(self) -> list[dict[str, Any]]:
        """A policy's egress rules. Without `to` one means every address; 0.0.0.0/0 would not, for some plugins, hold
        the cluster's own pods."""
        to: list[dict[str, Any]] = [{"ipBlock": {"cidr": cidr}} for cidr in self.cidrs]
        to += [{"namespaceSelector": {"matchLabels": {NAMESPACE: name}}} for name in self.namespaces]
        whom = {} if ANYWHERE in self.cidrs else {"to": to or [{"namespaceSelector": {}}]}
        return [{**whom, "ports": ports(self.ports)}] + [{"ports": ports((self.named,))}] * bool(self.named)

    def names(self) -> dict[str, Any]:
        """The egress rule of who is asked for names."""
        to = [*DNS, *({"ipBlock": {"cidr": cidr}} for cidr in self.dns)]
        return {"to": to, "ports": ports(DNS_PORTS, ("UDP", "TCP"))}


def check_range(option: str, cidr: str) -> None:
    """InputError for what no API server takes as a range of addresses: one without its mask, too."""
    wrong = formats.cidr(cidr)
    try:
        ipaddress.ip_network(cidr)
    except ValueError as error:
        wrong = str(error)
    if wrong:
        raise InputError(f"{option} {cidr}: {wrong}; write an address range as 10.20.0.0/16")


def ports(numbers: Sequence[int], protocols: Sequence[str] = ("TCP",)) -> list[dict[str, Any]]:
    return [{"protocol": protocol, "port": number} for number in numbers for protocol in protocols]


def isolated(labels: dict[str, str], ingress: dict[str, Any], s3: S3Network, *egress: dict[str, Any]) -> dict[str, Any]:
    """A policy's spec: pods with these labels let in by that rule alone, and reach by those, names, and S3."""
    return {
        "podSelector": {"matchLabels": labels},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [ingress],
        "egress": [*egress, s3.names(), *s3.egress()],
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
