"""The environment of a job's nodes: what an operator sets there, and what the job's own container has."""

from zhllama.kubernetes.job_manifest import variables
from zhllama.kubernetes.training_job import TrainingJob

PORT = 23456
"""The training operator's default port of the master."""
TRAINER_PORT = 29500
"""Kubeflow Trainer's."""


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
    """Everything a node's container has in its environment on a cluster; secrets as `(secret NAME, key KEY)`.
    `api`: pytorchjob or trainjob."""
    # an elastic job's worker 0 holds the rendezvous
    first = f"{job.name}-{'worker' if job.elastic else 'master'}-0"
    found = trainer_environment(job, node) if api == "trainjob" else operator_environment(job, node, first, PORT)
    for variable in variables(job):
        reference = variable.get("valueFrom", {}).get("secretKeyRef")
        secret = f"(secret {reference['name']}, key {reference['key']})" if reference else ""
        found[variable["name"]] = secret or variable["value"]
    return found


def local_environments(job: TrainingJob, port: int) -> list[dict[str, str]]:
    """The variables of each node's process on this machine."""
    return [operator_environment(job, node, "127.0.0.1", port) for node in range(job.nodes)]
