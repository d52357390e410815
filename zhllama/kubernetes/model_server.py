"""A served model on a cluster, once: rendered as a Deployment with what belongs to it, or as KServe's InferenceService.

vLLM's own image reads the weights straight from S3 into the GPUs (Run:ai's streamer). Before that an init container
with our image holds manifest, sizes, shard headers and tokenizer against each other: vLLM checks none of them, and a
wrong tokenizer only shows in the answers. Pods are as a training job's: confined, without a token, writing below /tmp.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zhllama.artifacts.manifest import MANIFEST, digest_of
from zhllama.errors import InputError
from zhllama.inference.sampling import Sampling
from zhllama.kubernetes.names import LABEL, check_options, server_name
from zhllama.kubernetes.network_policy import NAMESPACE, S3Network, isolated, ports
from zhllama.kubernetes.pods import POD_PLACES, USER, confined, environment, pod_spec
from zhllama.mounted_secrets import KEY, KEY_FOLDER
from zhllama.stage.images import image
from zhllama.stage.tls import BUNDLE_VARIABLE, CA_FOLDER, CA_VARIABLE, TRUSTED
from zhllama.storage import is_s3, normalise

VLLM_IMAGE = "vllm/vllm-openai:v0.33.0"
PORT = 8000
_ENVIRONMENT = {
    "HOME": "/tmp",
    "TMPDIR": "/tmp",
    # under a uid without a name some libraries ask for one
    "USER": "zhllama",
    "LOGNAME": "zhllama",
    "XDG_CACHE_HOME": "/tmp/cache",
    "HF_HOME": "/tmp/huggingface",
    "HF_HUB_OFFLINE": "1",
    "TORCHINDUCTOR_CACHE_DIR": "/tmp/inductor",
    "TRITON_CACHE_DIR": "/tmp/triton",
}
_VLLM_ENVIRONMENT = {
    "VLLM_CACHE_ROOT": "/tmp/vllm",
    "VLLM_CONFIG_ROOT": "/tmp/vllm-config",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # S3 servers other than AWS's have no name for each bucket, and AWS's takes this too
    "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
    "AWS_EC2_METADATA_DISABLED": "true",
}
_START = """\
if [ -n "${AWS_ENDPOINT_URL:=$AWS_ENDPOINT_URL_S3}" ]; then
  export AWS_ENDPOINT_URL
  unset AWS_ENDPOINT_URL_S3
fi
case "$ZHLLAMA_S3_ADDRESSING_STYLE" in virtual*)
  export RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING=1 AWS_CONFIG_FILE=/tmp/aws-config
  printf '[default]\\ns3 =\\n  addressing_style = virtual\\n' > "$AWS_CONFIG_FILE"
esac
case "$AWS_CA_BUNDLE" in *-BEGIN*)
  printf '%s\\n' "$AWS_CA_BUNDLE" > /tmp/s3-ca.pem
  export AWS_CA_BUNDLE=/tmp/s3-ca.pem
esac
exec vllm serve "$@"
"""
"""How vLLM is started. It and its streamer have words of their own for what the secret's optional keys say: a switch
and a file that boto3 reads for buckets as host names, a file for certificates. A literal variable would win over the
key, and Kubernetes knows no default for one that is absent. Of two endpoints ours wins, as everywhere."""
_LAST_LINES = {"terminationMessagePolicy": "FallbackToLogsOnError"}
_AUTHORITIES = "/tmp/authorities.pem"
"""Where the check, which comes first, leaves the site's certificates and the public ones: vLLM takes one file."""
OURS = {"app.kubernetes.io/name": "zhllama-serving", "app.kubernetes.io/managed-by": "zhllama"}
CLIENTS_LABEL = f"{LABEL}serving-clients"
"""Namespaces, and pods of the server's own, with this label (`true`) may reach it: a gateway's, Prometheus's, an
application's."""
GUARD, GUARD_FOLDER = "zhllama_vllm_guard", "/tmp/guard"
"""The module that asks for the key before any path of vLLM's (components/serve/vllm_guard.py), and where the check
leaves it."""
WORKFLOW = "workflows.argoproj.io/workflow"
"""The label of the pods that Argo starts for a run."""


@dataclass(frozen=True, kw_only=True)
class ModelServer:
    """What a served model is, however it is deployed."""

    name: str
    """DNS label: of the objects, and what requests call the model."""
    model: str
    """s3:// prefix of a published model, or its manifest."""
    gpus: int = 1
    """Of a pod; the model is split between them."""
    gpu_resource: str = "nvidia.com/gpu"
    cpu: str = "8"
    memory: str = "64Gi"
    shared_memory: str = "8Gi"
    """/dev/shm, part of `memory`: what the processes of several GPUs talk through."""
    ephemeral_storage: str = "20Gi"
    """Node-local disk for compiled kernels and the tokenizer; the weights do not touch it."""
    context_length: int = 2048
    s3_secret: str = "zhllama-s3"
    """Secret with the S3 settings; empty: the service account's own identity."""
    api_key_secret: str = "zhllama-api-key"
    pull_secret: str = ""
    """Secret to pull the images with."""
    proxy_secret: str = ""
    """Secret with HTTPS_PROXY, HTTP_PROXY and NO_PROXY, as far as they are there."""
    ca_config_map: str = ""
    """ConfigMap with certificates to trust (zhllama/stage/tls.py), which may be absent."""
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, Any], ...] = ()
    service_account: str = "zhllama-serving"
    vllm_image: str = VLLM_IMAGE
    start_seconds: int = 1800
    """From the start of a pod's server to its first answer, at most."""
    openshift: bool = False
    """Pods name no user: OpenShift gives each namespace a range of uids and refuses any other. Elsewhere they have to,
    since vLLM's image knows none but root."""
    istio: bool = False
    """Pods have Istio's sidecar, and reach its control plane; S3 they reach past it."""
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
        if wrong := server_name(self.name):
            raise InputError(f"--name: {self.name!r} {wrong}")
        if not is_s3(self.model):
            raise InputError(
                f"--model {self.model}: pods of a cluster read the model from S3; give the s3:// reference of a "
                "published model"
            )
        check_options(self)

    @property
    def root(self) -> str:
        """The model's prefix, without the manifest's name."""
        return normalise(self.model).removesuffix(f"/{MANIFEST}")

    @property
    def selector(self) -> dict[str, str]:
        """The labels that this server's pods have, and no others'."""
        return {**OURS, "app.kubernetes.io/instance": self.name}

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
        # a sidecar needs Istio's control plane, which the network policy lets through where it is asked for
        inject = {"sidecar.istio.io/inject": str(self.istio).lower()}
        labels = {**self._labels(), f"{LABEL}version": self.version, **inject}
        past = (
            {"traffic.sidecar.istio.io/excludeOutboundPorts": ",".join(map(str, self.s3.ports))} if self.istio else {}
        )
        annotations = {f"{LABEL}model": self.root, f"{LABEL}digest": self.model_digest, **past}
        return {"labels": labels, "annotations": annotations}

    # --- its pods -----------------------------------------------------------------------------------------------------

    def pod(self, container: str) -> dict[str, Any]:
        first = {"serviceAccountName": self.service_account, "terminationGracePeriodSeconds": 60}
        user = {} if self.openshift else {"runAsUser": USER, "runAsGroup": USER, "fsGroup": USER}
        pod = pod_spec(self, first, user, initContainers=[self._check()], containers=[self._vllm(container)])
        # one that is absent leaves a pod waiting without a word: the check has one
        secret = {"secretName": self.api_key_secret, "items": [{"key": KEY, "path": KEY}], "optional": True}
        pod["volumes"].append({"name": "api-key", "secret": secret})
        return pod

    def _check(self) -> dict[str, Any]:
        resources = {"cpu": "1", "memory": "2Gi", "ephemeral-storage": "2Gi"}
        trusting = {CA_VARIABLE: CA_FOLDER, BUNDLE_VARIABLE: _AUTHORITIES} if self.ca_config_map else {}
        return {
            "name": "check",
            "image": image("serve"),
            "command": ["python", "-m", "components.serve.check"],
            "args": [
                *("--model", self.model, "--context-length", str(self.context_length)),
                *("--key-file", f"{KEY_FOLDER}/{KEY}", "--guard", GUARD_FOLDER),
            ],
            "env": environment(self, _ENVIRONMENT | {"ZHLLAMA_CACHE": POD_PLACES["ZHLLAMA_CACHE"]} | trusting),
            **confined(resources, {"tmp": "/tmp", "api-key": KEY_FOLDER}, self.ca_config_map, **_LAST_LINES),
        }

    def _vllm(self, name: str) -> dict[str, Any]:
        resources = {"cpu": self.cpu, "memory": self.memory, "ephemeral-storage": self.ephemeral_storage}
        resources[self.gpu_resource] = str(self.gpus)
        health = {"httpGet": {"path": "/health", "port": "http"}}
        told: dict[str, str | dict[str, Any]] = {**_ENVIRONMENT, **_VLLM_ENVIRONMENT}
        told |= dict.fromkeys(TRUSTED, _AUTHORITIES) if self.ca_config_map else {}
        told["PYTHONPATH"] = GUARD_FOLDER
        # what vLLM calls it; on these pods no other S3 client reads it
        names = {"ZHLLAMA_S3_ENDPOINT": "AWS_ENDPOINT_URL", "ZHLLAMA_S3_CONNECTIONS": "RUNAI_STREAMER_CONCURRENCY"}
        return {
            "name": name,
            "image": self.vllm_image,
            "command": ["sh", "-c", _START, "vllm"] if self.s3_secret else ["vllm", "serve"],
            "args": [
                f"{self.root}/",
                *("--load-format", "runai_streamer", "--served-model-name", self.name, "--port", str(PORT)),
                # the recipe's sampling where a request does not say
                *("--dtype", "float16", "--max-model-len", str(self.context_length)),
                *("--tensor-parallel-size", str(self.gpus), *vllm_sampling(), "--middleware", f"{GUARD}.Guard"),
            ],
            "env": environment(self, told, names),
            "ports": [{"name": "http", "containerPort": PORT, "protocol": "TCP"}],
            "startupProbe": {**health, "periodSeconds": 10, "failureThreshold": -(-self.start_seconds // 10)},
            "readinessProbe": {**health, "periodSeconds": 5, "timeoutSeconds": 5},
            "livenessProbe": {**health, "periodSeconds": 30, "timeoutSeconds": 10, "failureThreshold": 4},
            **confined(resources, {"tmp": "/tmp", "shm": "/dev/shm", "api-key": KEY_FOLDER}, **_LAST_LINES),
        }

    # --- as plain objects ---------------------------------------------------------------------------------------------

    def deployment(self) -> dict[str, Any]:
        rolling = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
        spec = {
            **({} if self.autoscaled else {"replicas": self.replicas}),
            "revisionHistoryLimit": 3,
            "progressDeadlineSeconds": self.start_seconds + 600,
            "strategy": {"type": "Recreate"} if self.stop_first else rolling,
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
            "podMetricsEndpoints": [{"port": "http", "path": "/metrics", "interval": "30s"}],
        }
        return self._object("monitoring.coreos.com/v1", "PodMonitor", spec)

    def network_policy(self) -> dict[str, Any]:
        """In: the API, from pods and namespaces with CLIENTS_LABEL, and from who deploys, a run's steps or a launcher,
        which tries it. Out: names and S3."""
        labelled = {"matchLabels": {CLIENTS_LABEL: "true"}}
        clients: list[dict[str, Any]] = [{"podSelector": labelled}, {"namespaceSelector": labelled}]
        clients += [{"podSelector": {"matchExpressions": [{"key": WORKFLOW, "operator": "Exists"}]}}]
        clients += [{"podSelector": {"matchLabels": {f"{LABEL}part": "runner"}}}]
        control = {"to": [{"namespaceSelector": {"matchLabels": {NAMESPACE: "istio-system"}}}], "ports": ports([15012])}
        more = [control] if self.istio else []
        spec = isolated(self.selector, {"from": clients, "ports": ports([PORT])}, self.s3, *more)
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


def vllm_sampling() -> list[str]:
    """vLLM's option for the recipe's sampling, where a request does not say."""
    recipe = Sampling()
    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    return ["--override-generation-config", json.dumps({name: getattr(recipe, name) for name in names})]
