"""What a training job gets of a cluster: the options that launch_training takes and a TrainingJob is made of, once."""

from dataclasses import dataclass

from zhllama.stage.options import NotKeyed


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """Nodes, machines, queue, secrets and times of a training job."""

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
