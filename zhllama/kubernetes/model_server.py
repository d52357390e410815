"""A served model on a cluster, once: rendered as a Deployment with what belongs to it, or as KServe's InferenceService.

What its pods do: serving_pod.py.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zhllama.artifacts.manifest import digest_of
from zhllama.errors import InputError
from zhllama.kubernetes.names import LABEL, POD_OBJECTS, check_labels, check_names, check_namespace, check_positive
from zhllama.kubernetes.network_policy import S3Network, dns_egress, ports
from zhllama.kubernetes.serving_pod import PORT, ServingPod
from zhllama.storage import is_s3

METRICS_PORT = "http"
VERSION_LABEL = f"{LABEL}version"
INSTANCE_LABEL = "app.kubernetes.io/instance"
OURS = {"app.kubernetes.io/name": "zhllama-serving", "app.kubernetes.io/managed-by": "zhllama"}
CLIENTS_LABEL = f"{LABEL}serving-clients"
"""Namespaces with this label (`true`) may reach the server, as pods of its own may: a gateway's or Prometheus's."""


@dataclass(frozen=True, kw_only=True)
class ModelServer(ServingPod):
    """What a served model is, however it is deployed."""

    namespace: str = ""
    replicas: int = 1
    autoscaled: bool = False
    """Whether another says how many replicas there are (an autoscaler): they are left out, and applying it again leaves
    them as they are."""
    stop_first: bool = False
    """Old pods go before new ones come, where there are no GPUs to spare."""
    labels: Mapping[str, str] = field(default_factory=dict)
    s3: S3Network = field(default_factory=S3Network)
    """Where its network policy lets it reach S3."""
    model_digest: str = ""
    """Of the model's manifest, so that pods are replaced when the model at this address is another."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,48}[a-z0-9])?", self.name):
            raise InputError(
                f"--name {self.name!r}: on a cluster lower-case letters, digits and dashes, at most 50, are needed"
            )
        if not is_s3(self.model):
            raise InputError(
                f"--model {self.model}: pods of a cluster read the model from S3; give the s3:// reference of a "
                "published model"
            )
        check_positive(self, "replicas", "gpus", "context_length", "start_seconds")
        if self.namespace:
            check_namespace("--namespace", self.namespace)
        check_names(self, "api_key_secret", *POD_OBJECTS)
        check_labels("label", self.labels)
        check_labels("--node-selector", self.node_selector)

    @property
    def selector(self) -> dict[str, str]:
        """The labels that this server's pods have, and no others'."""
        return {**OURS, INSTANCE_LABEL: self.name}

    @property
    def version(self) -> str:
        """A digest of what the pods are: equal for equal pods."""
        return digest_of([self.pod("server"), self.model_digest])[:12]

    def objects(self, kserve: bool = False, monitored: bool = False) -> list[dict[str, Any]]:
        """What is applied, in this order: network policy, Service and Deployment; `kserve`: network policy and
        InferenceService, of which KServe makes the rest. `monitored`: a PodMonitor before the last, which a cluster
        without Prometheus' operator does not know, and refuses all the rest with it."""
        monitor = [self.pod_monitor()] if monitored else []
        if kserve:
            return [self.network_policy(), *monitor, self.inference_service()]
        return [self.network_policy(), self.service(), *monitor, self.deployment()]

    def _object(self, api: str, kind: str, spec: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        metadata: dict[str, Any] = {"name": self.name, "labels": self._labels()}
        if self.namespace:
            metadata["namespace"] = self.namespace
        return {"apiVersion": api, "kind": kind, "metadata": metadata | more, "spec": spec}

    def _labels(self) -> dict[str, str]:
        # what pods are found by cannot be overwritten
        return {**self.selector, **self.labels, **self.selector}

    def _pod_metadata(self) -> dict[str, Any]:
        # a sidecar would need Istio's control plane, which the network policy does not let through
        labels = {**self._labels(), VERSION_LABEL: self.version, "sidecar.istio.io/inject": "false"}
        return {"labels": labels, "annotations": {f"{LABEL}model": self.root, f"{LABEL}digest": self.model_digest}}

    # --- as plain objects ---------------------------------------------------------------------------------------------

    def deployment(self) -> dict[str, Any]:
        strategy: dict[str, Any] = {"type": "Recreate"}
        if not self.stop_first:
            strategy = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
        spec = {
            **({} if self.autoscaled else {"replicas": self.replicas}),
            "revisionHistoryLimit": 3,
            "progressDeadlineSeconds": self.start_seconds + 600,
            "strategy": strategy,
            "selector": {"matchLabels": self.selector},
            "template": {"metadata": self._pod_metadata(), "spec": self.pod("server")},
        }
        return self._object("apps/v1", "Deployment", spec)

    def service(self) -> dict[str, Any]:
        port = {"name": "http", "port": PORT, "targetPort": "http", "protocol": "TCP"}
        return self._object("v1", "Service", {"selector": self.selector, "ports": [port]})

    def pod_monitor(self) -> dict[str, Any]:
        spec = {
            "selector": {"matchLabels": self.selector},
            "podMetricsEndpoints": [{"port": METRICS_PORT, "path": "/metrics", "interval": "30s"}],
        }
        return self._object("monitoring.coreos.com/v1", "PodMonitor", spec)

    def network_policy(self) -> dict[str, Any]:
        """In: the API, from this namespace and from namespaces with CLIENTS_LABEL. Out: names and S3."""
        clients = [{"podSelector": {}}, {"namespaceSelector": {"matchLabels": {CLIENTS_LABEL: "true"}}}]
        spec = {
            "podSelector": {"matchLabels": self.selector},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": clients, "ports": ports([PORT])}],
            "egress": [dns_egress(), self.s3.egress()],
        }
        return self._object("networking.k8s.io/v1", "NetworkPolicy", spec)

    # --- as KServe's --------------------------------------------------------------------------------------------------

    def inference_service(self) -> dict[str, Any]:
        """The same pods under KServe, in its Standard mode: a Deployment, without Knative."""
        predictor = {
            **({} if self.autoscaled else {"minReplicas": self.replicas, "maxReplicas": self.replicas}),
            "deploymentStrategy": self.deployment()["spec"]["strategy"],
            **self._pod_metadata(),
            **self.pod("kserve-container"),
        }
        mode = {"serving.kserve.io/deploymentMode": "Standard"}
        return self._object("serving.kserve.io/v1beta1", "InferenceService", {"predictor": predictor}, annotations=mode)
