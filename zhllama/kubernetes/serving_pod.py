"""The pod of a served model: a check in an init container, then vLLM.

vLLM's own image reads the weights straight from S3 into the GPUs (Run:ai's streamer). Before that an init container
with our image holds manifest, sizes, shard headers and tokenizer against each other: vLLM checks none of them, and a
wrong tokenizer only shows in the answers. Pods are as a training job's: confined, without a token, writing below /tmp.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zhllama.artifacts.manifest import MANIFEST
from zhllama.inference.sampling import Sampling
from zhllama.kubernetes.placement import place
from zhllama.kubernetes.pod_environment import plain_variables, proxy_variables, s3_variables
from zhllama.kubernetes.pod_security import USER, confined
from zhllama.stage.images import image
from zhllama.stage.tls import BUNDLE_VARIABLE, CA_FOLDER, CA_VARIABLE, TRUSTED
from zhllama.storage import normalise

VLLM_IMAGE = "vllm/vllm-openai:v0.33.0"
PORT = 8000
KEY = "API_KEY"
"""The key of the API key's secret."""
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
_CHECK_ENVIRONMENT = {"ZHLLAMA_CACHE": "/tmp/zhllama-cache"}
_VLLM_ENVIRONMENT = {
    "VLLM_CACHE_ROOT": "/tmp/vllm",
    "VLLM_CONFIG_ROOT": "/tmp/vllm-config",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # S3 servers other than AWS's have no name for each bucket, and AWS's takes this too
    "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
    "AWS_EC2_METADATA_DISABLED": "true",
}
_AUTHORITIES = "/tmp/authorities.pem"
"""Where the check, which comes first, leaves the site's certificates and the public ones: vLLM takes one file."""
_VLLM_NAMES = {"ZHLLAMA_S3_ENDPOINT": "AWS_ENDPOINT_URL"}
"""What vLLM calls a setting of ours. On these pods no other S3 client reads it."""


@dataclass(frozen=True, kw_only=True)
class ServingPod:
    """What the pods of a served model are."""

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
    """ConfigMap with certificates to trust (site.py), which may be absent."""
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, Any], ...] = ()
    service_account: str = "zhllama-serving"
    vllm_image: str = VLLM_IMAGE
    start_seconds: int = 1800
    """From the start of a pod's server to its first answer, at most."""
    openshift: bool = False
    """Pods name no user: OpenShift gives each namespace a range of uids and refuses any other. Elsewhere they have to,
    since vLLM's image knows none but root."""

    @property
    def root(self) -> str:
        """The model's prefix, without the manifest's name."""
        return normalise(self.model).removesuffix(f"/{MANIFEST}")

    def pod(self, container: str) -> dict[str, Any]:
        pod: dict[str, Any] = {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "serviceAccountName": self.service_account,
            "terminationGracePeriodSeconds": 60,
            "securityContext": {
                "runAsNonRoot": True,
                **({} if self.openshift else {"runAsUser": USER, "runAsGroup": USER, "fsGroup": USER}),
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "initContainers": [self._check()],
            "containers": [self._vllm(container)],
            "volumes": [
                {"name": "tmp", "emptyDir": {}},
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": self.shared_memory}},
            ],
        }
        place(pod, self.ca_config_map, self.pull_secret, self.node_selector, self.tolerations)
        return pod

    def _check(self) -> dict[str, Any]:
        resources = {"cpu": "1", "memory": "2Gi", "ephemeral-storage": "2Gi"}
        mounts: list[dict[str, Any]] = [{"name": "tmp", "mountPath": "/tmp"}]
        trusting = {}
        if self.ca_config_map:
            mounts.append({"name": "ca", "mountPath": CA_FOLDER, "readOnly": True})
            trusting = {CA_VARIABLE: CA_FOLDER, BUNDLE_VARIABLE: _AUTHORITIES}
        return {
            "name": "check",
            "image": image("serve"),
            "command": ["python", "-m", "components.serve.check"],
            "args": ["--model", self.model, "--context-length", str(self.context_length)],
            "env": [
                *plain_variables(_ENVIRONMENT | _CHECK_ENVIRONMENT | trusting),
                *proxy_variables(self.proxy_secret),
                *s3_variables(self.s3_secret),
            ],
            "resources": {"requests": resources, "limits": dict(resources)},
            "terminationMessagePolicy": "FallbackToLogsOnError",
            "volumeMounts": mounts,
            "securityContext": confined(),
        }

    def _vllm(self, name: str) -> dict[str, Any]:
        resources = {"cpu": self.cpu, "memory": self.memory, "ephemeral-storage": self.ephemeral_storage}
        resources[self.gpu_resource] = str(self.gpus)
        health = {"httpGet": {"path": "/health", "port": "http"}}
        key = {"secretKeyRef": {"name": self.api_key_secret, "key": KEY}}
        trusting = dict.fromkeys(TRUSTED, _AUTHORITIES) if self.ca_config_map else {}
        return {
            "name": name,
            "image": self.vllm_image,
            "command": ["vllm", "serve", f"{self.root}/"],
            "args": self.vllm_arguments(),
            "env": [
                *plain_variables(_ENVIRONMENT | _VLLM_ENVIRONMENT | trusting),
                {"name": "VLLM_API_KEY", "valueFrom": key},
                *proxy_variables(self.proxy_secret),
                *s3_variables(self.s3_secret, _VLLM_NAMES),
            ],
            "ports": [{"name": "http", "containerPort": PORT, "protocol": "TCP"}],
            "startupProbe": {**health, "periodSeconds": 10, "failureThreshold": -(-self.start_seconds // 10)},
            "readinessProbe": {**health, "periodSeconds": 5, "timeoutSeconds": 5},
            "livenessProbe": {**health, "periodSeconds": 30, "timeoutSeconds": 10, "failureThreshold": 4},
            "resources": {"requests": resources, "limits": dict(resources)},
            "terminationMessagePolicy": "FallbackToLogsOnError",
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}, {"name": "shm", "mountPath": "/dev/shm"}],
            "securityContext": confined(),
        }

    def vllm_arguments(self) -> list[str]:
        """vLLM's options: the weights from S3, and the recipe's sampling where a request does not say."""
        return [
            *("--load-format", "runai_streamer", "--served-model-name", self.name, "--port", str(PORT)),
            *("--dtype", "float16", "--max-model-len", str(self.context_length)),
            *("--tensor-parallel-size", str(self.gpus), *vllm_sampling()),
        ]


def vllm_sampling() -> list[str]:
    """vLLM's option for the recipe's sampling, where a request does not say."""
    recipe = Sampling()
    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    return ["--override-generation-config", json.dumps({name: getattr(recipe, name) for name in names})]
