"""launch_training's options: the training, its inputs, and what its job gets of a cluster (JobOptions). Launcher,
compiled pipelines and rendered manifests make their TrainingJob of them in one place, `job`."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from components.launch_training.command import on_hub, parse_training, training_arguments, training_module
from zhllama.artifacts.manifest import Input
from zhllama.errors import InputError
from zhllama.kubernetes.names import check_value
from zhllama.kubernetes.pod_settings import pod_settings
from zhllama.kubernetes.pods import USER, mapping, tolerations, uid
from zhllama.kubernetes.training_job import JobOptions, TrainingJob
from zhllama.stage.images import image
from zhllama.stage.options import NotKeyed, Ref, StageOptions, option_of
from zhllama.training.options import TrainingOptions


@dataclass(frozen=True, kw_only=True)
class LaunchTraining(JobOptions, StageOptions):
    """Run a training as a job. What stands after `--` goes to the training: pretrain's or finetune's options."""

    stage: Literal["embeddings", "lora", "sft"]
    """embeddings and lora run pretrain, sft runs finetune."""
    model: Ref
    """Reference to the model that is trained."""
    dataset: Ref
    """Reference to the packed dataset."""
    adapter: Ref = ""
    """Reference to an adapter to go on from."""
    replay: Ref = ""
    """Reference to a packed dataset of what must not be lost."""
    forgetting_base: Ref = ""
    """Reference to an earlier training, from where the forgetting budget counts."""
    backend: NotKeyed[Literal["pytorchjob", "trainjob", "local"]] = "pytorchjob"
    """pytorchjob: on a cluster with Kubeflow's training operator; trainjob: with Kubeflow Trainer; local: as processes
    of this machine."""
    machine: NotKeyed[str] = ""
    """Options of this command as one JSON object, {"memory": "64Gi", "nodes": 2}; one that is given by itself wins."""
    size: NotKeyed[str] = ""
    """Name of the model size, a label on the job."""
    training_image: str = ""
    """The training's image; empty: pretrain's or finetune's of this version."""
    s3_endpoint: NotKeyed[str] = ""
    """The S3 server's address for the job; empty: this process's ZHLLAMA_S3_ENDPOINT."""
    run_as_user: NotKeyed[str] = str(USER)
    """The uid of the job's pods; none leaves it to the cluster, as OpenShift wants it."""
    run_id: NotKeyed[str] = ""
    """Names the job: `<run id>-<stage>-a<attempt>`; empty: from the input key and, in a pod, its run."""
    team: NotKeyed[str] = ""
    """A label on the job."""
    labels: NotKeyed[str] = ""
    """More labels of the job and its pods, as JSON: {"cost-centre": "42"}."""
    annotations: NotKeyed[str] = ""
    """Annotations of the job, as JSON; those that Kueue's topology and Multus read on pods land there."""
    pods: NotKeyed[str] = ""
    """What else the job's pods have, as JSON: {"labels": …, "annotations": …, "resources": …, "environment": …,
    "node_affinity": …}."""
    node_selector: NotKeyed[str] = ""
    """Labels of the nodes that the job's pods may run on, as JSON."""
    tolerations: NotKeyed[str] = ""
    """Taints that the job's pods tolerate, as JSON: [{"key": "nvidia.com/gpu", "operator": "Exists"}]."""
    waiting_seconds: NotKeyed[int] = 604_800
    """How long the job may wait, for its queue or for its nodes, before it is given up; 0: for ever."""
    starting_seconds: NotKeyed[int] = 3_600
    """How long the job may be kept from its start by what no waiting mends (an image or a secret that is not there, a
    pod that is refused), before it is given up; 0: as long as it may wait."""
    attempts: NotKeyed[int] = 3
    """Jobs that may fail before the step does."""
    arguments: str = ""
    """More options of the training, as one text."""
    training: tuple[str, ...] = ()
    """Options of the training; given after `--`."""

    def __post_init__(self) -> None:
        deepspeed = parse_training(self.stage, self.training_arguments("/unknown-yet")).deepspeed
        if self.min_nodes or self.max_nodes:
            if self.backend != "pytorchjob":
                raise InputError(f"--min-nodes, --max-nodes: a {self.backend} job cannot be elastic; leave them out")
            if deepspeed != "none":
                said = "ZeRO's checkpoints belong to one number of processes"
                mend = "give --deepspeed none, or leave the nodes' range out"
                raise InputError(f"--min-nodes, --max-nodes with --deepspeed {deepspeed}: {said}; {mend}")
        for name in ("labels", "annotations", "node_selector"):
            mapping(option_of(name), getattr(self, name))
        tolerations("--tolerations", self.tolerations)
        check_value("team", self.team, "--team")
        pod_settings("--pods", self.pods)

    def cache_versions(self) -> dict[str, int]:
        # the result is the training's
        return super().cache_versions() | {"training": TrainingOptions.cache_version}

    def more_inputs(self) -> dict[str, Input]:
        """What is no artifact to the training either: a DeepSpeed file that was edited makes another job."""
        return parse_training(self.stage, self.training_arguments("/unknown-yet")).more_inputs()

    def training_arguments(self, output: str) -> list[str]:
        """The training's arguments; InputError when one of them is wrong."""
        try:
            more = (*self.training, *shlex.split(self.arguments))
        except ValueError as error:
            raise InputError(f"--arguments {self.arguments}: {error}; quote it as in a shell") from error
        inputs = {name: getattr(self, name) for name in ("store", "model", "dataset", "adapter")}
        replay = {name: getattr(self, name) for name in ("replay", "forgetting_base")}
        return training_arguments(stage=self.stage, **inputs, **replay, output=output, more=more)

    @property
    def reads_hub(self) -> bool:
        return any(map(on_hub, (self.model, self.dataset, self.adapter, self.replay)))

    def job(self, name: str, command: tuple[str, ...], labels: Mapping[str, str], **environment: str) -> TrainingJob:
        """The job of that name; its pods are told `environment` where no option says so. InputError for none."""
        shared: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(JobOptions)}
        if self.s3_secret == "none":
            shared["s3_secret"] = ""
        if self.s3_endpoint:
            environment["ZHLLAMA_S3_ENDPOINT"] = self.s3_endpoint
        if self.reads_hub:
            # else pods never ask it
            environment["HF_HUB_OFFLINE"] = "0"
        return TrainingJob(
            **shared,
            name=name,
            command=command,
            image=self.training_image or image(training_module(self.stage)),
            environment=environment,
            run_as_user=uid(self.run_as_user),
            node_selector=mapping("--node-selector", self.node_selector),
            tolerations=tolerations("--tolerations", self.tolerations),
            # what jobs are found by cannot be overwritten
            labels={**mapping("--labels", self.labels), **labels},
            annotations=mapping("--annotations", self.annotations),
            pods=pod_settings("--pods", self.pods),
        )
