"""The pod of a training job's node, the same for both operators.

Pods pass the *restricted* Pod Security Standard, hold no Kubernetes token, get S3 by secret reference, and write below
/tmp alone.
"""

from typing import Any

from zhllama.kubernetes.names import JOB_LABEL
from zhllama.kubernetes.placement import place
from zhllama.kubernetes.pod_environment import DEADLINE_VARIABLE, POD_ENVIRONMENT, proxy_variables, s3_variables
from zhllama.kubernetes.pod_security import confined
from zhllama.kubernetes.training_job import TrainingJob
from zhllama.stage.tls import CA_FOLDER, CA_VARIABLE


def pod_template(job: TrainingJob) -> dict[str, Any]:
    pod: dict[str, Any] = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": job.grace_seconds,
        "securityContext": _security_context(job),
        "containers": [_container(job)],
        "volumes": [
            {"name": "tmp", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": job.shared_memory}},
        ],
    }
    if job.service_account:
        pod["serviceAccountName"] = job.service_account
    place(pod, job.ca_config_map, job.pull_secret, job.node_selector, job.tolerations)
    # Istio's sidecar would stand between the processes, and keep the pod alive after them
    labels = {**job.labels, JOB_LABEL: job.name, "sidecar.istio.io/inject": "false"}
    return {"metadata": {"labels": labels}, "spec": pod}


def _security_context(job: TrainingJob) -> dict[str, Any]:
    user = {} if job.run_as_user is None else {"runAsUser": job.run_as_user}
    return {"runAsNonRoot": True, **user, "seccompProfile": {"type": "RuntimeDefault"}}


def _container(job: TrainingJob) -> dict[str, Any]:
    resources = {"cpu": job.cpu, "memory": job.memory, "ephemeral-storage": job.ephemeral_storage}
    if job.gpu_resource:
        resources[job.gpu_resource] = str(job.processes_per_node)
    mounts: list[dict[str, Any]] = [
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    if job.ca_config_map:
        mounts.append({"name": "ca", "mountPath": CA_FOLDER, "readOnly": True})
    return {
        # the operator sets its variables in a container of this name alone
        "name": "pytorch",
        "image": job.image,
        "command": list(job.command),
        "env": variables(job),
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "volumeMounts": mounts,
        "securityContext": confined(),
    }


def variables(job: TrainingJob) -> list[dict[str, Any]]:
    """Of the container that trains."""
    plain = {
        **POD_ENVIRONMENT,
        # the launcher inside must be done before the kubelet kills it
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(1, job.grace_seconds - 15)),
        # the operator does not wake for the deadline of a quiet job: the training keeps it itself
        DEADLINE_VARIABLE: str(job.deadline_seconds),
        **({CA_VARIABLE: CA_FOLDER} if job.ca_config_map else {}),
        **job.environment,
    }
    own: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in plain.items()]
    return own + proxy_variables(job.proxy_secret) + s3_variables(job.s3_secret, given=plain)
