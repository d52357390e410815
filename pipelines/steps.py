"""What KFP can set on a step, set on every one: resources, a /tmp of its own, identity, secrets, placement, a deadline.

KFP 2.17 decides what a run may choose. Parameters of the pipeline can be: CPU, memory, GPUs (texts: its driver drops
an int without a word), the names of secrets and ConfigMaps (never empty: its driver refuses that, so each has a name by
default and may be absent from the namespace), tolerations and node selectors (JSON). Fixed when the pipeline is
compiled are labels, the size of /tmp, deadlines, the uid and the pull policy (`Fixed`). What KFP cannot set at all: a
read-only root (the images are made for one), and a request for ephemeral storage (the size of /tmp stands in for it).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kfp import kubernetes

from components.shared import images
from components.shared.site import CA_FOLDER, CA_VARIABLE, PROXY_KEYS
from components.shared.training_job import LABEL, POD_PLACES, S3_KEYS, S3_OPTIONAL_KEYS
from pipelines.sizes import Size, Step

USER = 65532
"""The uid of the images (images/base/Dockerfile)."""
KINDS = ("control", "data", "weights", "evaluation")


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """What is written into a compiled pipeline, since KFP takes no parameter for it."""

    run_as_user: int | None = USER
    """The uid of the steps; None leaves it to the cluster (OpenShift gives each namespace its own)."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """More labels of the steps' pods."""
    annotations: Mapping[str, str] = field(default_factory=dict)
    pull_policy: Literal["", "Always", "IfNotPresent", "Never"] = ""
    """Empty: the cluster's default, which is IfNotPresent for all tags but `latest`."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Makes tasks steps of ours. Values are parameters of the pipeline."""

    size: Size
    fixed: Fixed
    resources: Mapping[str, tuple[Any, Any]]
    """Kind of step → CPU, memory."""
    gpu: tuple[Any, Any]
    """What the cluster calls a GPU, and how many an evaluation gets."""
    s3_secret: Any
    pull_secret: Any
    proxy_secret: Any
    ca_config_map: Any
    node_selector: Any
    tolerations: Any
    gpu_node_selector: Any
    gpu_tolerations: Any

    def control(self, task: Any, title: str) -> Any:
        return self._step(task, title, "control", self.size.work.control)

    def data(self, task: Any, title: str) -> Any:
        return self._step(task, title, "data", self.size.work.data)

    def weights(self, task: Any, title: str) -> Any:
        return self._step(task, title, "weights", self.size.work.weights)

    def evaluation(self, task: Any, title: str) -> Any:
        """With the size's GPU, where those pods are."""
        if self.size.work.evaluation.gpu:
            name, count = self.gpu
            task.set_accelerator_type(name).set_accelerator_limit(count)
            task.register_pipeline_channels([name, count])
        return self._step(task, title, "evaluation", self.size.work.evaluation)

    def launch(self, task: Any, title: str) -> Any:
        """A step that follows a job: without a deadline, since the job may wait in a queue for days and has its own."""
        return _names_images(self._step(task, title, "control", self.size.work.control, deadline=False))

    def deploy(self, task: Any, title: str) -> Any:
        """A step that deploys a model, and loads its tokenizer to try it."""
        return _names_images(self.data(task, title))

    def _step(self, task: Any, title: str, kind: str, work: Step, deadline: bool = True) -> Any:
        # never from KFP's cache, whose references may lead nowhere
        task.set_display_name(title).set_caching_options(False)
        cpu, memory = self.resources[kind]
        task.set_cpu_request(cpu).set_cpu_limit(cpu).set_memory_request(memory).set_memory_limit(memory)
        # kfp 2.17 hands on to a branch what the steps in it take as inputs, and forgets the resources
        task.register_pipeline_channels([cpu, memory])
        # set_env_variable looks through the whole stack each time it is called, for a check that set_cpu_request made
        task.container_spec.env = {**POD_PLACES, CA_VARIABLE: CA_FOLDER}
        kubernetes.empty_dir_mount(task, "tmp", "/tmp", size_limit=work.ephemeral_storage)
        # each may be absent: then the account's own identity is used, the public authorities are trusted alone, …
        keys = (*S3_KEYS, *S3_OPTIONAL_KEYS)
        kubernetes.use_secret_as_env(task, self.s3_secret, {key: key for key in keys}, optional=True)
        kubernetes.use_secret_as_env(task, self.proxy_secret, {key: key for key in PROXY_KEYS}, optional=True)
        kubernetes.use_config_map_as_volume(task, self.ca_config_map, CA_FOLDER, optional=True)
        kubernetes.set_image_pull_secrets(task, [self.pull_secret])
        self._place(task, on_gpu=kind == "evaluation" and self.size.work.evaluation.gpu)
        kubernetes.set_security_context(task, run_as_user=self.fixed.run_as_user, run_as_non_root=True)
        if deadline:
            kubernetes.set_timeout(task, work.deadline_seconds)
        if self.fixed.pull_policy:
            kubernetes.set_image_pull_policy(task, self.fixed.pull_policy)
        return task

    def _place(self, task: Any, on_gpu: bool) -> None:
        kubernetes.add_node_selector_json(task, self.gpu_node_selector if on_gpu else self.node_selector)
        kubernetes.add_toleration_json(task, self.gpu_tolerations if on_gpu else self.tolerations)
        labels = {
            **self.fixed.labels,
            "app.kubernetes.io/part-of": "zhllama",
            f"{LABEL}size": self.size.name,
            # Istio's sidecar would outlive the step, and stand between it and S3
            "sidecar.istio.io/inject": "false",
        }
        for name, value in labels.items():
            kubernetes.add_pod_label(task, name, value)
        for name, value in self.fixed.annotations.items():
            kubernetes.add_pod_annotation(task, name, value)


def _names_images(task: Any) -> Any:
    """A step that names images when it runs: it is told what this compilation was."""
    task.container_spec.env |= images.settings()
    return task
