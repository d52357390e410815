"""A training job as an API server takes it: a PyTorchJob (kubeflow.org/v1) or a TrainJob (trainer.kubeflow.org)."""

from typing import Any

from zhllama.errors import InputError
from zhllama.kubernetes.training_job import TrainingJob
from zhllama.kubernetes.training_pod import pod_template

RUNTIME = "torch-distributed"
"""The ClusterTrainingRuntime that Kubeflow Trainer ships for torch."""
PATCHED_BY = "zhllama.io/render"
"""Who owns the changes that a TrainJob makes to its runtime."""


def job_manifest(job: TrainingJob, api: str) -> dict[str, Any]:
    """`api`: pytorchjob or trainjob."""
    return trainjob(job) if api == "trainjob" else pytorchjob(job)


def pytorchjob(job: TrainingJob) -> dict[str, Any]:
    """The PyTorchJob: one Master, the other nodes Workers; elastic: Workers alone."""
    spec: dict[str, Any] = {
        "nprocPerNode": str(job.processes_per_node),
        "runPolicy": {
            "cleanPodPolicy": "Running",
            "backoffLimit": job.backoff_limit,
            "activeDeadlineSeconds": job.deadline_seconds,
            "ttlSecondsAfterFinished": job.ttl_seconds,
        },
    }
    if job.elastic:
        spec["elasticPolicy"] = {
            "minReplicas": job.min_nodes,
            "maxReplicas": job.max_nodes,
            "maxRestarts": job.restarts,
            "rdzvBackend": "c10d",
            # without it the operator sets none, and two jobs on one rendezvous would take each other for one
            "rdzvId": job.name,
        }
        spec["pytorchReplicaSpecs"] = {"Worker": _replicas(job, job.nodes)}
    else:
        spec["pytorchReplicaSpecs"] = {"Master": _replicas(job, 1)}
        if job.nodes > 1:
            spec["pytorchReplicaSpecs"]["Worker"] = _replicas(job, job.nodes - 1)
    return {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": job_metadata(job), "spec": spec}


def _replicas(job: TrainingJob, count: int) -> dict[str, Any]:
    return {"replicas": count, "restartPolicy": "OnFailure", "template": pod_template(job)}


def trainjob(job: TrainingJob) -> dict[str, Any]:
    """The TrainJob, on the runtime that Kubeflow Trainer ships for torch. InputError for an elastic job.

    `lost_in_trainjob` says what it cannot carry.
    """
    if job.elastic:
        raise InputError("a TrainJob cannot be elastic; leave --min-nodes and --max-nodes out, or use a PyTorchJob")
    pod = pod_template(job)
    (container,) = pod["spec"]["containers"]
    patched = {
        "name": "node",
        "volumeMounts": container["volumeMounts"],
        "securityContext": container["securityContext"],
    }
    kept = ("serviceAccountName", "imagePullSecrets", "nodeSelector", "tolerations", "volumes", "securityContext")
    spec = {name: pod["spec"][name] for name in (*kept, "terminationGracePeriodSeconds") if name in pod["spec"]}
    template = {"metadata": pod["metadata"], "spec": {**spec, "containers": [patched]}}
    replicated = {"name": "node", "template": {"spec": {"template": template}}}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": job_metadata(job),
        "spec": {
            "runtimeRef": {"name": RUNTIME},
            "activeDeadlineSeconds": job.deadline_seconds,
            "trainer": {
                "image": container["image"],
                "command": container["command"],
                "env": container["env"],
                "numNodes": job.nodes,
                "numProcPerNode": job.processes_per_node,
                "resourcesPerNode": container["resources"],
            },
            "runtimePatches": [
                {
                    "manager": PATCHED_BY,
                    "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [replicated]}}},
                }
            ],
        },
    }


def lost_in_trainjob(job: TrainingJob) -> tuple[str, ...]:
    """What a PyTorchJob says and a TrainJob cannot."""
    return (
        f"ttlSecondsAfterFinished ({job.ttl_seconds} s): a finished TrainJob stays until it is deleted",
        f"backoffLimit ({job.backoff_limit}): the runtime's own failure policy holds",
        "cleanPodPolicy: the runtime's own holds",
        "restartPolicy OnFailure: the runtime's own holds",
        "automountServiceAccountToken: false: set it on the service account",
        "enableServiceLinks: false: variables of every service in the namespace are set",
    )


def job_metadata(job: TrainingJob) -> dict[str, Any]:
    labels = dict(job.labels)
    if job.queue:
        labels["kueue.x-k8s.io/queue-name"] = job.queue
    if job.priority_class:
        labels["kueue.x-k8s.io/priority-class"] = job.priority_class
    metadata: dict[str, Any] = {"name": job.name, "labels": labels}
    if job.namespace:
        metadata["namespace"] = job.namespace
    if job.annotations:
        metadata["annotations"] = dict(job.annotations)
    if job.owner is not None:
        metadata["ownerReferences"] = [dict(job.owner)]
    return metadata
