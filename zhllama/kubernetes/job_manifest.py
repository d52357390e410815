"""A training job as an API server takes it, a PyTorchJob (kubeflow.org/v1) or a TrainJob (trainer.kubeflow.org), and
the environment that its nodes then have."""

from typing import Any

from zhllama.errors import InputError
from zhllama.kubernetes import pods
from zhllama.kubernetes.names import JOB_LABEL, JOB_LABELS, is_of_pods
from zhllama.kubernetes.training_job import TrainingJob
from zhllama.stage.tls import CA_FOLDER, CA_VARIABLE

RUNTIME = "torch-distributed"
"""The ClusterTrainingRuntime that Kubeflow Trainer ships for torch."""
PATCHED_BY = "zhllama.io/render"
"""Who owns the changes that a TrainJob makes to its runtime."""
PORT, TRAINER_PORT = 23456, 29500
"""The default ports of the master: the training operator's, and Kubeflow Trainer's."""


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
    nodes = {"Worker": job.nodes} if job.elastic else {"Master": 1, "Worker": job.nodes - 1}
    spec["pytorchReplicaSpecs"] = {
        role: {"replicas": count, "restartPolicy": "OnFailure", "template": pod_template(job)}
        for role, count in nodes.items()
        if count
    }
    return {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": job_metadata(job), "spec": spec}


def trainjob(job: TrainingJob) -> dict[str, Any]:
    """The TrainJob, on the runtime that Kubeflow Trainer ships for torch; `lost_in_trainjob` says what it cannot carry.
    InputError for an elastic job."""
    if job.elastic:
        raise InputError("a TrainJob cannot be elastic; leave --min-nodes and --max-nodes out, or use a PyTorchJob")
    pod = pod_template(job)
    (container,) = pod["spec"]["containers"]
    patched = {"name": "node", **{name: container[name] for name in ("volumeMounts", "securityContext")}}
    kept = (
        "serviceAccountName",
        "imagePullSecrets",
        "nodeSelector",
        "affinity",
        "tolerations",
        "volumes",
        "securityContext",
    )
    spec = {name: pod["spec"][name] for name in (*kept, "terminationGracePeriodSeconds") if name in pod["spec"]}
    template = {"metadata": pod["metadata"], "spec": {**spec, "containers": [patched]}}
    replicated = {"name": "node", "template": {"spec": {"template": template}}}
    patch = {"template": {"spec": {"replicatedJobs": [replicated]}}}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": job_metadata(job),
        "spec": {
            "runtimeRef": {"name": RUNTIME},
            "activeDeadlineSeconds": job.deadline_seconds,
            "trainer": {
                **{name: container[name] for name in ("image", "command", "env")},
                "numNodes": job.nodes,
                "numProcPerNode": job.processes_per_node,
                "resourcesPerNode": container["resources"],
            },
            "runtimePatches": [{"manager": PATCHED_BY, "trainingRuntimeSpec": patch}],
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
    asked = {"queue-name": job.queue, "priority-class": job.priority_class}
    kueue = {f"kueue.x-k8s.io/{name}": value for name, value in asked.items() if value}
    own = {key: value for key, value in job.annotations.items() if not is_of_pods(key)}
    return job.metadata({**job.labels, **kueue}, own)


def pod_template(job: TrainingJob) -> dict[str, Any]:
    """The pod of a job's node, the same for both operators: its secrets are files, and it writes below /tmp alone."""
    resources = {"cpu": job.cpu, "memory": job.memory, "ephemeral-storage": job.ephemeral_storage}
    if job.gpu_resource:
        resources[job.gpu_resource] = str(job.processes_per_node)
    resources |= job.pods.resources
    container = {
        # the operator sets its variables in a container of this name alone
        "name": "pytorch",
        "image": job.image,
        "command": list(job.command),
        "env": variables(job),
        **pods.confined(resources, {"tmp": "/tmp", "shm": "/dev/shm"}, job.ca_config_map),
    }
    secrets = pods.secret_files(job)
    container["volumeMounts"] += [
        {"name": volume["name"], "mountPath": folder, "readOnly": True} for folder, volume in secrets.items()
    ]
    # Istio's sidecar would stand between the processes, and keep the pod alive after them
    of_jobs = {key: value for key, value in job.labels.items() if key not in JOB_LABELS}
    labels = {**of_jobs, **job.pods.labels, JOB_LABEL: job.name, "sidecar.istio.io/inject": "false"}
    metadata: dict[str, Any] = {"labels": labels}
    given = {key: value for key, value in job.annotations.items() if is_of_pods(key)}
    if annotations := {**given, **job.pods.annotations}:
        metadata["annotations"] = annotations
    user = {} if job.run_as_user is None else {"runAsUser": job.run_as_user}
    first = {"terminationGracePeriodSeconds": job.grace_seconds, **job.pods.affinity}
    pod = pods.pod_spec(job, first, user, containers=[container])
    pod["volumes"] += secrets.values()
    return {"metadata": metadata, "spec": pod}


def variables(job: TrainingJob) -> list[dict[str, Any]]:
    """Of the container that trains."""
    plain: dict[str, str | dict[str, Any]] = {
        **pods.POD_PLACES,
        "HF_HUB_OFFLINE": "1",
        # the launcher inside must be done before the kubelet kills it
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(1, job.grace_seconds - 15)),
        # the operator does not wake for the deadline of a quiet job: the training keeps it itself
        pods.DEADLINE_VARIABLE: str(job.deadline_seconds),
        **({CA_VARIABLE: CA_FOLDER} if job.ca_config_map else {}),
        **job.environment,
        **job.pods.variables,
    }
    return pods.plain_variables(plain)


# --- what its nodes see -----------------------------------------------------------------------------------------------


def operator_environment(job: TrainingJob, node: int, address: str, port: int) -> dict[str, str]:
    """What the operator (v1) sets in the pod of a node. With a Master, RANK is the pod's, not a process's; an
    elastic job has no Master, no ranks and no world size: they come of the rendezvous."""
    own = {"PYTHONUNBUFFERED": "1", "PET_NPROC_PER_NODE": str(job.processes_per_node)}
    if job.elastic:
        return own | {
            "PET_NNODES": f"{job.min_nodes}:{job.max_nodes}",
            "PET_MAX_RESTARTS": str(job.restarts),
            "PET_RDZV_BACKEND": "c10d",
            "PET_RDZV_ENDPOINT": f"{address}:{port}",
            "PET_RDZV_ID": job.name,
        }
    master = {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    size = {"WORLD_SIZE": str(job.nodes * job.processes_per_node), "RANK": str(node)}
    of_torch = {f"PET_{name}": value for name, value in master.items()}
    return own | master | size | of_torch | {"PET_NNODES": str(job.nodes), "PET_NODE_RANK": str(node)}


def trainer_environment(job: TrainingJob, node: int) -> dict[str, str]:
    """What Kubeflow Trainer (v2) sets in the pod of a node."""
    return {
        "PET_NNODES": str(job.nodes),
        "PET_NPROC_PER_NODE": str(job.processes_per_node),
        "PET_NODE_RANK": str(node),
        "PET_MASTER_ADDR": f"{job.name}-node-0-0.{job.name}",
        "PET_MASTER_PORT": str(TRAINER_PORT),
    }


def pod_environment(job: TrainingJob, node: int, api: str = "pytorchjob") -> dict[str, str]:
    """Everything a node's container is told on a cluster: variables, those of secrets as `(secret NAME, key KEY)`, and
    keys that are files, as `(secret NAME, a file in FOLDER)`. `api`: pytorchjob or trainjob."""
    # an elastic job's worker 0 holds the rendezvous
    first = f"{job.name}-{'worker' if job.elastic else 'master'}-0"
    found = trainer_environment(job, node) if api == "trainjob" else operator_environment(job, node, first, PORT)
    for variable in variables(job):
        reference = variable.get("valueFrom", {}).get("secretKeyRef")
        secret = f"(secret {reference['name']}, key {reference['key']})" if reference else ""
        found[variable["name"]] = secret or variable["value"]
    for folder, volume in pods.secret_files(job).items():
        for source in (one["secret"] for one in volume["projected"]["sources"]):
            told = f"(secret {source['name']}, a file in {folder})"
            found = {item["key"]: told for item in source["items"]} | found
    return found


def local_environments(job: TrainingJob, port: int) -> list[dict[str, str]]:
    """The variables of each node's process on this machine."""
    return [operator_environment(job, node, "127.0.0.1", port) for node in range(job.nodes)]
