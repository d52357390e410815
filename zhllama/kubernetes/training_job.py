"""A training job, once: rendered for the Kubeflow training operator (PyTorchJob), for Kubeflow Trainer (TrainJob), or
run as processes on this machine with exactly the variables that the operator would set.

The command starts torch's elastic launcher itself (zhllama/training/elastic.py), so a pod's exit code is the
training's own: 2 for wrong input, 143 for a cancel. Pods pass the *restricted* Pod Security Standard, hold no
Kubernetes token, get S3 by secret reference, and write below /tmp alone.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from zhllama.errors import InputError
from zhllama.kubernetes.job_options import JobOptions
from zhllama.kubernetes.names import check_keys, check_labels, check_name, check_namespace
from zhllama.kubernetes.placement import place
from zhllama.stage.tls import CA_FOLDER, CA_VARIABLE, PROXY_KEYS

USER = 65532
"""The uid of the images (images/base/Dockerfile)."""
PORT = 23456
"""The training operator's default port of the master."""
TRAINER_PORT = 29500
"""Kubeflow Trainer's."""
RUNTIME = "torch-distributed"
"""The ClusterTrainingRuntime that Kubeflow Trainer ships for torch."""
PATCHED_BY = "zhllama.io/render"
"""Who owns the changes that a TrainJob makes to its runtime."""
LABEL = "zhllama.io/"
"""Prefix of our labels: run, size, stage, key."""
JOB_LABEL = f"{LABEL}job"
"""On a job's pods, its name: the operators' own labels for it differ, and what selects pods needs one for both."""
S3_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
"""Keys of the S3 secret that must be there; each becomes the variable of its name."""
S3_OPTIONAL_KEYS = ("AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "ZHLLAMA_S3_ENDPOINT")
POD_PLACES = {
    "HOME": "/tmp",
    "TMPDIR": "/tmp",
    "HF_HOME": "/tmp/huggingface",
    "TORCHINDUCTOR_CACHE_DIR": "/tmp/inductor",
    "TRITON_CACHE_DIR": "/tmp/triton",
    "ZHLLAMA_CACHE": "/tmp/zhllama-cache",
}
"""Where a pod writes: below /tmp, a volume, and nowhere else."""
_POD_ENVIRONMENT = {**POD_PLACES, "HF_HUB_OFFLINE": "1"}
DEADLINE_VARIABLE = "ZHLLAMA_DEADLINE_SECONDS"
"""In a job's pods: how long the job may run (zhllama/training/deadline.py)."""
_LONGEST_NAME = 63 - len("-worker-999")


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
    owner: Mapping[str, Any] | None = None
    """Owner reference, so that deleting a run deletes its job."""
    restarts: int = 3
    """Failures of a node after which the job has failed. One node's failure restarts the others' processes too."""
    ttl_seconds: int = 3_600
    """How long a finished job stays."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", self.name) or len(self.name) > _LONGEST_NAME:
            raise InputError(
                f"job name {self.name!r}: lower-case letters, digits and dashes, at most {_LONGEST_NAME}, are needed"
            )
        for name in ("nodes", "processes_per_node"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1 is needed")
        if self.elastic and not 1 <= self.min_nodes <= self.nodes <= self.max_nodes:
            raise InputError(
                f"--min-nodes {self.min_nodes} --nodes {self.nodes} --max-nodes {self.max_nodes}: an elastic job needs "
                "all three, in that order, each as large as the one before or larger"
            )
        for name in ("deadline_seconds", "grace_seconds"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1 is needed")
        if self.namespace:
            check_namespace("--namespace", self.namespace)
        for name in ("s3_secret", "pull_secret", "proxy_secret", "ca_config_map", "service_account"):
            if getattr(self, name):
                check_name(f"--{name.replace('_', '-')}", getattr(self, name))
        check_labels("label", self.labels)
        check_labels("--node-selector", self.node_selector)
        check_keys("annotation", self.annotations)
        for name in ("queue", "priority_class"):
            # a label of the job, and the name of an object
            if value := getattr(self, name):
                check_name(f"--{name.replace('_', '-')}", value)
                check_labels(f"--{name.replace('_', '-')}", {f"kueue.x-k8s.io/{name.replace('_', '-')}": value})
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

    # --- the operator's variables -------------------------------------------------------------------------------------

    def operator_environment(self, node: int, address: str, port: int) -> dict[str, str]:
        """What the operator (v1) sets in the pod of a node. With a Master, RANK is the pod's, not a process's; an
        elastic job has no Master, no ranks and no world size: they come of the rendezvous."""
        if self.elastic:
            return {
                "PYTHONUNBUFFERED": "1",
                "PET_NPROC_PER_NODE": str(self.processes_per_node),
                "PET_NNODES": f"{self.min_nodes}:{self.max_nodes}",
                "PET_MAX_RESTARTS": str(self.restarts),
                "PET_RDZV_BACKEND": "c10d",
                "PET_RDZV_ENDPOINT": f"{address}:{port}",
                "PET_RDZV_ID": self.name,
            }
        return {
            "PYTHONUNBUFFERED": "1",
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(self.nodes * self.processes_per_node),
            "RANK": str(node),
            "PET_MASTER_ADDR": address,
            "PET_MASTER_PORT": str(port),
            "PET_NNODES": str(self.nodes),
            "PET_NPROC_PER_NODE": str(self.processes_per_node),
            "PET_NODE_RANK": str(node),
        }

    def trainer_environment(self, node: int) -> dict[str, str]:
        """What Kubeflow Trainer (v2) sets in the pod of a node."""
        return {
            "PET_NNODES": str(self.nodes),
            "PET_NPROC_PER_NODE": str(self.processes_per_node),
            "PET_NODE_RANK": str(node),
            "PET_MASTER_ADDR": f"{self.name}-node-0-0.{self.name}",
            "PET_MASTER_PORT": str(TRAINER_PORT),
        }

    def pod_environment(self, node: int, api: str = "pytorchjob") -> dict[str, str]:
        """Everything a node's container has in its environment on a cluster; secrets as `(secret NAME, key KEY)`.
        `api`: pytorchjob or trainjob."""
        if api == "trainjob":
            found = self.trainer_environment(node)
        elif self.elastic:
            # worker 0 holds the rendezvous
            found = self.operator_environment(node, f"{self.name}-worker-0", PORT)
        else:
            found = self.operator_environment(node, f"{self.name}-master-0", PORT)
        for variable in self._variables():
            reference = variable.get("valueFrom", {}).get("secretKeyRef")
            secret = f"(secret {reference['name']}, key {reference['key']})" if reference else ""
            found[variable["name"]] = secret or variable["value"]
        return found

    def local_environments(self, port: int) -> list[dict[str, str]]:
        """The variables of each node's process on this machine."""
        return [self.operator_environment(node, "127.0.0.1", port) for node in range(self.nodes)]

    # --- kubeflow.org/v1 ----------------------------------------------------------------------------------------------

    def pytorchjob(self) -> dict[str, Any]:
        """The PyTorchJob: one Master, the other nodes Workers; elastic: Workers alone."""
        spec: dict[str, Any] = {
            "nprocPerNode": str(self.processes_per_node),
            "runPolicy": {
                "cleanPodPolicy": "Running",
                "backoffLimit": self.backoff_limit,
                "activeDeadlineSeconds": self.deadline_seconds,
                "ttlSecondsAfterFinished": self.ttl_seconds,
            },
        }
        if self.elastic:
            spec["elasticPolicy"] = {
                "minReplicas": self.min_nodes,
                "maxReplicas": self.max_nodes,
                "maxRestarts": self.restarts,
                "rdzvBackend": "c10d",
                # without it the operator sets none, and two jobs on one rendezvous would take each other for one
                "rdzvId": self.name,
            }
            spec["pytorchReplicaSpecs"] = {"Worker": self._replicas(self.nodes)}
        else:
            spec["pytorchReplicaSpecs"] = {"Master": self._replicas(1)}
            if self.nodes > 1:
                spec["pytorchReplicaSpecs"]["Worker"] = self._replicas(self.nodes - 1)
        return {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": self._metadata(), "spec": spec}

    def _metadata(self) -> dict[str, Any]:
        labels = dict(self.labels)
        if self.queue:
            labels["kueue.x-k8s.io/queue-name"] = self.queue
        if self.priority_class:
            labels["kueue.x-k8s.io/priority-class"] = self.priority_class
        metadata: dict[str, Any] = {"name": self.name, "labels": labels}
        if self.namespace:
            metadata["namespace"] = self.namespace
        if self.annotations:
            metadata["annotations"] = dict(self.annotations)
        if self.owner is not None:
            metadata["ownerReferences"] = [dict(self.owner)]
        return metadata

    # --- trainer.kubeflow.org/v1alpha1 --------------------------------------------------------------------------------

    def trainjob(self) -> dict[str, Any]:
        """The TrainJob, on the runtime that Kubeflow Trainer ships for torch. InputError for an elastic job.

        `lost_in_trainjob` says what it cannot carry.
        """
        if self.elastic:
            raise InputError("a TrainJob cannot be elastic; leave --min-nodes and --max-nodes out, or use a PyTorchJob")
        pod = self._pod()
        (container,) = pod["spec"]["containers"]
        patched = {
            "name": "node",
            "volumeMounts": container["volumeMounts"],
            "securityContext": container["securityContext"],
        }
        kept = ("serviceAccountName", "imagePullSecrets", "nodeSelector", "tolerations", "volumes", "securityContext")
        spec = {name: pod["spec"][name] for name in (*kept, "terminationGracePeriodSeconds") if name in pod["spec"]}
        template = {"metadata": pod["metadata"], "spec": {**spec, "containers": [patched]}}
        job = {"name": "node", "template": {"spec": {"template": template}}}
        return {
            "apiVersion": "trainer.kubeflow.org/v1alpha1",
            "kind": "TrainJob",
            "metadata": self._metadata(),
            "spec": {
                "runtimeRef": {"name": RUNTIME},
                "activeDeadlineSeconds": self.deadline_seconds,
                "trainer": {
                    "image": container["image"],
                    "command": container["command"],
                    "env": container["env"],
                    "numNodes": self.nodes,
                    "numProcPerNode": self.processes_per_node,
                    "resourcesPerNode": container["resources"],
                },
                "runtimePatches": [
                    {
                        "manager": PATCHED_BY,
                        "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [job]}}},
                    }
                ],
            },
        }

    def lost_in_trainjob(self) -> tuple[str, ...]:
        """What a PyTorchJob says and a TrainJob cannot."""
        return (
            f"ttlSecondsAfterFinished ({self.ttl_seconds} s): a finished TrainJob stays until it is deleted",
            f"backoffLimit ({self.backoff_limit}): the runtime's own failure policy holds",
            "cleanPodPolicy: the runtime's own holds",
            "restartPolicy OnFailure: the runtime's own holds",
            "automountServiceAccountToken: false: set it on the service account",
            "enableServiceLinks: false: variables of every service in the namespace are set",
        )

    def _replicas(self, count: int) -> dict[str, Any]:
        return {"replicas": count, "restartPolicy": "OnFailure", "template": self._pod()}

    def _pod(self) -> dict[str, Any]:
        pod: dict[str, Any] = {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": self.grace_seconds,
            "securityContext": self._security_context(),
            "containers": [self._container()],
            "volumes": [
                {"name": "tmp", "emptyDir": {}},
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": self.shared_memory}},
            ],
        }
        if self.service_account:
            pod["serviceAccountName"] = self.service_account
        place(pod, self.ca_config_map, self.pull_secret, self.node_selector, self.tolerations)
        # Istio's sidecar would stand between the processes, and keep the pod alive after them
        labels = {**self.labels, JOB_LABEL: self.name, "sidecar.istio.io/inject": "false"}
        return {"metadata": {"labels": labels}, "spec": pod}

    def _security_context(self) -> dict[str, Any]:
        user = {} if self.run_as_user is None else {"runAsUser": self.run_as_user}
        return {"runAsNonRoot": True, **user, "seccompProfile": {"type": "RuntimeDefault"}}

    def _container(self) -> dict[str, Any]:
        resources = {"cpu": self.cpu, "memory": self.memory, "ephemeral-storage": self.ephemeral_storage}
        if self.gpu_resource:
            resources[self.gpu_resource] = str(self.processes_per_node)
        mounts: list[dict[str, Any]] = [
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "shm", "mountPath": "/dev/shm"},
        ]
        if self.ca_config_map:
            mounts.append({"name": "ca", "mountPath": CA_FOLDER, "readOnly": True})
        return {
            # the operator sets its variables in a container of this name alone
            "name": "pytorch",
            "image": self.image,
            "command": list(self.command),
            "env": self._variables(),
            "resources": {"requests": dict(resources), "limits": dict(resources)},
            "volumeMounts": mounts,
            "securityContext": confined(),
        }

    def _variables(self) -> list[dict[str, Any]]:
        plain = {
            **_POD_ENVIRONMENT,
            # the launcher inside must be done before the kubelet kills it
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(1, self.grace_seconds - 15)),
            # the operator does not wake for the deadline of a quiet job: the training keeps it itself
            DEADLINE_VARIABLE: str(self.deadline_seconds),
            **({CA_VARIABLE: CA_FOLDER} if self.ca_config_map else {}),
            **self.environment,
        }
        variables: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in plain.items()]
        return variables + proxy_variables(self.proxy_secret) + s3_variables(self.s3_secret, given=plain)


def proxy_variables(secret: str) -> list[dict[str, Any]]:
    """A container's variables from the proxy's secret, which may be absent; none without a name."""
    keys = [{"name": secret, "key": key, "optional": True} for key in PROXY_KEYS] if secret else []
    return [{"name": key["key"], "valueFrom": {"secretKeyRef": key}} for key in keys]


def s3_variables(
    secret: str, names: Mapping[str, str] | None = None, given: Collection[str] = ()
) -> list[dict[str, Any]]:
    """A container's variables from the S3 secret, key by key; none without one. `names`: what a key's variable is
    called where not by the key; `given`: variables that are set already, and are left out."""
    if not secret:
        return []
    variables = []
    for key in (*S3_KEYS, *S3_OPTIONAL_KEYS):
        if key in given:
            continue
        reference: dict[str, Any] = {"name": secret, "key": key}
        if key in S3_OPTIONAL_KEYS:
            reference["optional"] = True
        variables.append({"name": (names or {}).get(key, key), "valueFrom": {"secretKeyRef": reference}})
    return variables


def uid(text: str, option: str = "--run-as-user") -> int | None:
    """`65532`, or `none` for what the cluster gives. InputError for root and for what is no uid."""
    if text == "none":
        return None
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise InputError(f"{option} {text}: write a number above 0 (root is refused), or none")
    return int(text)


def confined() -> dict[str, Any]:
    """The securityContext of a container, as the *restricted* Pod Security Standard asks and with its files fixed."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def label_value(text: str) -> str:
    """The text as a label's value: what is not allowed there becomes a dash, at most 63 characters."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", text)[:63].strip("-._")


def job_name(run: str, stage: str, attempt: int) -> str:
    """`<run>-<stage>-a<N>`, cut and cleaned to a DNS label."""
    tail = f"-{stage}-a{attempt}"
    clean = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    if not clean[:1].isalpha():
        clean = f"run-{clean}"
    return clean[: _LONGEST_NAME - len(tail)].rstrip("-") + tail
