"""The step that runs a training job and hands its result on as its own.

The training writes a copy of its manifest beside the launcher's place in the store. So a launcher that starts again
finds a result whatever became of the job; and it leaves that manifest as its own, so the step is skipped next time.
"""

import hashlib
import logging
import os
import shlex
import sys
from dataclasses import dataclass
from typing import Literal

from components.launch_training.command import command_line, parse_training, training_arguments, training_module
from zhllama import storage
from zhllama.artifacts.manifest import MANIFEST, Input, Manifest
from zhllama.artifacts.published import find_published
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError, StorageFault
from zhllama.kubernetes.job_kinds import BY_BACKEND
from zhllama.kubernetes.placement import mapping, tolerations
from zhllama.kubernetes.training_job import LABEL, USER, TrainingJob, job_name, label_value, uid
from zhllama.stage.images import image
from zhllama.stage.inputs import Inputs
from zhllama.stage.options import NotKeyed, Ref, StageOptions
from zhllama.training.inputs import checked_inputs
from zhllama.training.options import TrainingOptions

log = logging.getLogger("launch")

JOB_MANIFEST = "job-manifest.json"
JOB_LOGS = "logs"


@dataclass(frozen=True, kw_only=True)
class LaunchTraining(StageOptions):
    """Run a training as a job. What stands after `--` goes to the training: pretrain's or finetune's options."""

    stage: Literal["embeddings", "lora", "sft"]
    """embeddings and lora run pretrain, sft runs finetune."""
    model: Ref
    """Reference to the model that is trained."""
    dataset: Ref
    """Reference to the packed dataset."""
    adapter: Ref = ""
    """Reference to an adapter to go on from."""
    backend: NotKeyed[Literal["pytorchjob", "trainjob", "local"]] = "pytorchjob"
    """pytorchjob: on a cluster with Kubeflow's training operator; trainjob: with Kubeflow Trainer; local: as processes
    of this machine."""
    machine: NotKeyed[str] = ""
    """Options of this command as one JSON object, {"memory": "64Gi", "nodes": 2}; one that is given by itself wins."""
    size: NotKeyed[str] = ""
    """Name of the model size, a label on the job."""
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
    training_image: str = ""
    """The training's image; empty: pretrain's or finetune's of this version."""
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
    s3_endpoint: NotKeyed[str] = ""
    """The S3 server's address for the job; empty: this process's ZHLLAMA_S3_ENDPOINT."""
    pull_secret: NotKeyed[str] = ""
    """Secret to pull the image with."""
    proxy_secret: NotKeyed[str] = ""
    """Secret with HTTPS_PROXY, HTTP_PROXY, NO_PROXY for the job, as far as they are there."""
    ca_config_map: NotKeyed[str] = ""
    """ConfigMap with certificates (*.crt, *.pem) that the job trusts beside the public ones; it may be absent."""
    service_account: NotKeyed[str] = ""
    """The job's service account; it needs no rights."""
    run_as_user: NotKeyed[str] = str(USER)
    """The uid of the job's pods; none leaves it to the cluster, as OpenShift wants it."""
    namespace: NotKeyed[str] = ""
    """Namespace of the job; empty: this pod's."""
    run_id: NotKeyed[str] = ""
    """Names the job: `<run id>-<stage>-a<attempt>`; empty: from the input key and, in a pod, its run."""
    team: NotKeyed[str] = ""
    """A label on the job."""
    labels: NotKeyed[str] = ""
    """More labels of the job and its pods, as JSON: {"cost-centre": "42"}."""
    annotations: NotKeyed[str] = ""
    """Annotations of the job, as JSON."""
    node_selector: NotKeyed[str] = ""
    """Labels of the nodes that the job's pods may run on, as JSON."""
    tolerations: NotKeyed[str] = ""
    """Taints that the job's pods tolerate, as JSON: [{"key": "nvidia.com/gpu", "operator": "Exists"}]."""
    deadline_seconds: NotKeyed[int] = 86_400
    """The job's run time at most; waiting does not count."""
    waiting_seconds: NotKeyed[int] = 604_800
    """How long the job may wait, for its queue or for its nodes, before it is given up; 0: for ever."""
    grace_seconds: NotKeyed[int] = 300
    """What the job gets between SIGTERM and SIGKILL."""
    attempts: NotKeyed[int] = 3
    """Jobs that may fail before the step does."""
    arguments: str = ""
    """More options of the training, as one text."""
    training: tuple[str, ...] = ()
    """Options of the training; given after `--`."""

    def __post_init__(self) -> None:
        training = parse_training(self.stage, self.training_arguments("/unknown-yet"))
        self._check_elastic(training.deepspeed)
        for name in ("labels", "annotations", "node_selector"):
            mapping(f"--{name.replace('_', '-')}", getattr(self, name))
        tolerations("--tolerations", self.tolerations)

    def more_inputs(self) -> dict[str, Input]:
        """What is no artifact to the training either: a DeepSpeed file that was edited makes another job."""
        return parse_training(self.stage, self.training_arguments("/unknown-yet")).more_inputs()

    def _check_elastic(self, deepspeed: str) -> None:
        if not (self.min_nodes or self.max_nodes):
            return
        if self.backend != "pytorchjob":
            raise InputError(f"--min-nodes, --max-nodes: a {self.backend} job cannot be elastic; leave them out")
        if deepspeed != "none":
            raise InputError(
                f"--min-nodes, --max-nodes with --deepspeed {deepspeed}: ZeRO's checkpoints belong to one number of "
                "processes; give --deepspeed none, or leave the nodes' range out"
            )

    def cache_versions(self) -> dict[str, int]:
        # the result is the training's
        return super().cache_versions() | {"training": TrainingOptions.cache_version}

    def training_arguments(self, output: str) -> list[str]:
        """The training's arguments; InputError when one of them is wrong."""
        try:
            more = (*self.training, *shlex.split(self.arguments))
        except ValueError as error:
            raise InputError(f"--arguments {self.arguments}: {error}; quote it as in a shell") from error
        return training_arguments(
            stage=self.stage,
            store=self.store,
            model=self.model,
            dataset=self.dataset,
            adapter=self.adapter,
            output=output,
            more=more,
        )


def launch_training(config: LaunchTraining, inputs: Inputs, out: ArtifactWriter) -> Manifest:
    """Runs the job unless its result is there already, and publishes that result as the launcher's own."""
    place = storage.join(out.root, JOB_MANIFEST)
    manifest = published(place)
    if manifest is None:
        arguments = config.training_arguments(place)
        if inputs["model"].manifest.vocabulary is not None:
            # what a job would find out after its queue
            checked_inputs(parse_training(config.stage, arguments), inputs)
        run_job(config, out.root.rsplit("/", 1)[1], arguments, place, storage.join(out.root, JOB_LOGS))
        manifest = published(place)
        if manifest is None:
            raise StorageFault(f"{place}: the job ended, but the training left no manifest there; see its log")
    else:
        log.info("the job's result is there: %s", manifest.reference)
    storage.write_bytes(storage.join(out.root, MANIFEST), manifest.to_json())
    return manifest


def published(place: str) -> Manifest | None:
    """The manifest that a training left at `place`, if what it names is all there."""
    try:
        copy = Manifest.from_json(storage.read_bytes(place), place)
    except (FileNotFoundError, NotADirectoryError):
        return None
    store, stage, key = copy.root.rsplit("/", 2)
    return find_published(store, stage, key)


def run_job(config: LaunchTraining, key: str, arguments: list[str], place: str, logs: str) -> None:
    """One job, on the backend that was chosen. place: where its training publishes; logs: where the last lines of a
    cluster's jobs are left."""
    if config.backend == "local":
        from components.launch_training.local_job import run_local

        run_local(training_job(config, key, command_line(config.stage, arguments, sys.executable), attempt=1))
        return
    from components.launch_training.cluster_job import Cluster, run_on_cluster

    command = command_line(config.stage, arguments)
    cluster = Cluster(BY_BACKEND[config.backend])
    starter = "" if config.run_id else cluster.starter()
    run_on_cluster(
        cluster,
        lambda attempt: training_job(config, key, command, attempt, starter),
        config.attempts,
        config.waiting_seconds,
        lambda name, lines: keep_lines(storage.join(logs, f"{name}.txt"), lines),
        lambda: published(place) is not None,
    )


def keep_lines(place: str, lines: list[str]) -> None:
    """Leaves a job's last lines in the store: pods and Workflows vanish. Without them the step is none the worse."""
    try:
        storage.write_bytes(place, "".join(f"{line}\n" for line in lines).encode())
    except (StorageFault, InputError, OSError) as error:
        log.warning("the last lines of the job are not kept: %s", error)
    else:
        log.info("its last lines: %s", place)


def training_job(
    config: LaunchTraining, key: str, command: tuple[str, ...], attempt: int, starter: str = ""
) -> TrainingJob:
    """The job of an attempt. Its name and its key tell stores apart: the same work in two stores is two jobs.

    starter: tells runs apart that were given no id: with one name they would delete each other's job on a cancel.
    """
    key = hashlib.sha256(f"{config.store.rstrip('/')}\0{key}".encode()).hexdigest()[:32]
    run = config.run_id or "-".join(filter(None, ("run", key[:8], starter)))
    labels = {"run": run, "stage": config.stage, "size": config.size, "team": config.team, "key": key}
    endpoint = config.s3_endpoint or os.environ.get("ZHLLAMA_S3_ENDPOINT", "")
    return TrainingJob(
        name=job_name(run, config.stage, attempt),
        command=command,
        image=config.training_image or image(training_module(config.stage)),
        namespace=config.namespace,
        nodes=config.nodes,
        min_nodes=config.min_nodes,
        max_nodes=config.max_nodes,
        processes_per_node=config.processes_per_node,
        cpu=config.cpu,
        memory=config.memory,
        ephemeral_storage=config.ephemeral_storage,
        shared_memory=config.shared_memory,
        gpu_resource=config.gpu_resource,
        environment={"ZHLLAMA_S3_ENDPOINT": endpoint} if endpoint else {},
        s3_secret="" if config.s3_secret == "none" else config.s3_secret,
        pull_secret=config.pull_secret,
        proxy_secret=config.proxy_secret,
        ca_config_map=config.ca_config_map,
        service_account=config.service_account,
        run_as_user=uid(config.run_as_user),
        queue=config.queue,
        priority_class=config.priority_class,
        node_selector=mapping("--node-selector", config.node_selector),
        tolerations=tolerations("--tolerations", config.tolerations),
        # what the launcher and the reaper find jobs by cannot be overwritten
        labels=mapping("--labels", config.labels)
        | {f"{LABEL}{name}": label_value(value) for name, value in labels.items() if value},
        annotations=mapping("--annotations", config.annotations),
        deadline_seconds=config.deadline_seconds,
        grace_seconds=config.grace_seconds,
    )
