"""A training job, whatever runs it: the Kubeflow training operator (PyTorchJob), Kubeflow Trainer (TrainJob), or this
machine with the same variables. Its command starts torch's elastic launcher itself (zhllama/training/elastic.py), so a
pod's exit code is the training's own: 2 for wrong input, 143 for a cancel."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zhllama.errors import InputError
from zhllama.kubernetes import names
from zhllama.kubernetes.pod_settings import PodSettings
from zhllama.kubernetes.pods import USER
from zhllama.stage.options import NotKeyed


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """What a training job gets of a cluster: options of launch_training, and of the job that is made of them."""

    nodes: int = 1
    """Nodes of the job."""
    min_nodes: NotKeyed[int] = 0
    """Elastic: the job goes on with as few nodes as this, when others are lost; 0: it needs all of its nodes."""
    max_nodes: NotKeyed[int] = 0
    """Elastic: and with as many as this."""
    processes_per_node: int = 1
    """Training processes on each node: one per GPU."""
    gpu_resource: str = ""
    """The name under which the cluster offers GPUs, as nvidia.com/gpu: one for each process; empty: none."""
    cpu: NotKeyed[str] = "2"
    """CPU of each node."""
    memory: NotKeyed[str] = "8Gi"
    """Memory of each node, /dev/shm included."""
    shared_memory: NotKeyed[str] = "2Gi"
    """Size of /dev/shm."""
    ephemeral_storage: NotKeyed[str] = "20Gi"
    """Node-local disk for model and data."""
    queue: NotKeyed[str] = ""
    """Kueue's local queue."""
    priority_class: NotKeyed[str] = ""
    """Kueue's workload priority class."""
    s3_secret: NotKeyed[str] = ""
    """Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; empty or none: the service account's identity."""
    pull_secret: NotKeyed[str] = ""
    """Secret to pull the image with."""
    proxy_secret: NotKeyed[str] = ""
    """Secret with HTTPS_PROXY, HTTP_PROXY, NO_PROXY for the job, as far as they are there."""
    ca_config_map: NotKeyed[str] = ""
    """ConfigMap with certificates (*.crt, *.pem) that the job trusts beside the public ones; it may be absent."""
    service_account: NotKeyed[str] = ""
    """The job's service account; it needs no rights."""
    namespace: NotKeyed[str] = ""
    """Namespace of the job; empty: this pod's."""
    deadline_seconds: NotKeyed[int] = 86_400
    """The job's run time at most; waiting does not count."""
    grace_seconds: NotKeyed[int] = 300
    """What the job gets between SIGTERM and SIGKILL."""


@dataclass(frozen=True, kw_only=True)
class TrainingJob(JobOptions):
    """What a training job is, whoever runs it."""

    name: str
    """DNS label; the operator makes `<name>-master-0` and `<name>-worker-<i>` of it."""
    command: tuple[str, ...]
    image: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    run_as_user: int | None = USER
    """The uid of the pods, the operator's init container too, whose image is root's; None leaves it to the cluster, as
    OpenShift wants it."""
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, str], ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    """Of the job; those that are read on pods alone land there."""
    pods: PodSettings = field(default_factory=PodSettings)
    """What else its pods have."""
    owner: Mapping[str, Any] | None = None
    """Owner reference, so that deleting a run deletes its job."""
    restarts: int = 3
    """Failures of a node after which the job has failed. One node's failure restarts the others' processes too."""
    ttl_seconds: int = 3_600
    """How long a finished job stays."""

    def __post_init__(self) -> None:
        longest = names.LONGEST_JOB_NAME
        if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", self.name) or len(self.name) > longest:
            needed = f"lower-case letters, digits and dashes, at most {longest}, are needed"
            raise InputError(f"job name {self.name!r}: {needed}")
        names.check_options(self)
        if self.elastic and not 1 <= self.min_nodes <= self.nodes <= self.max_nodes:
            raise InputError(
                f"--min-nodes {self.min_nodes} --nodes {self.nodes} --max-nodes {self.max_nodes}: an elastic job needs "
                "all three, in that order, each as large as the one before or larger"
            )
        if self.gpu_resource in self.pods.resources:
            said = "it is the job's GPU, one a process; leave it out"
            raise InputError(f"--pods: resources: {self.gpu_resource}: {said}")
        if self.priority_class and not self.queue:
            raise InputError(f"--priority-class {self.priority_class}: it is Kueue's, which asks for a --queue too")

    @property
    def elastic(self) -> bool:
        """Whether nodes may come and go: Workers alone, which find each other by rendezvous. Not for ZeRO, whose
        checkpoints belong to one number of processes."""
        return bool(self.min_nodes or self.max_nodes)

    @property
    def backoff_limit(self) -> int:
        """The operator counts the restarts of all pods together, and one lost node restarts every pod."""
        return self.restarts * max(self.nodes, self.max_nodes)

    def metadata(self, labels: Mapping[str, str], annotations: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Of an object of its name, in its namespace, with its owner."""
        found: dict[str, Any] = {"name": self.name, "labels": dict(labels)}
        if self.namespace:
            found["namespace"] = self.namespace
        if annotations:
            found["annotations"] = dict(annotations)
        if self.owner is not None:
            found["ownerReferences"] = [dict(self.owner)]
        return found
