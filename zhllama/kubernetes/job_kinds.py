"""The two kinds of training job on an API server: where they are, and how their pods are told from others.

A PyTorchJob (training operator v1) owns its pods; a TrainJob (Kubeflow Trainer v2) owns a JobSet of its name, which
owns a Job, which owns the pods.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class JobKind:
    """A kind of custom resource."""

    kind: str
    group: str
    version: str
    plural: str
    pods_label: str
    """The label of a pod that holds its job's name."""
    container: str
    """The pod's container that trains."""
    operator: str
    """What has to be installed for it."""

    @property
    def place(self) -> dict[str, str]:
        """As CustomObjectsApi takes it."""
        return {"group": self.group, "version": self.version, "plural": self.plural}

    def is_first(self, pod: dict[str, Any]) -> bool:
        """Whether the pod is the node of rank 0, which says how the training goes."""
        labels = pod["metadata"].get("labels", {})
        if self is TRAINJOB:
            return bool(labels.get("batch.kubernetes.io/job-completion-index") == "0")
        role, index = (labels.get(f"training.kubeflow.org/replica-{name}") for name in ("type", "index"))
        return role == "master" or index == "0"


PYTORCHJOB = JobKind(
    kind="PyTorchJob",
    group="kubeflow.org",
    version="v1",
    plural="pytorchjobs",
    pods_label="training.kubeflow.org/job-name",
    container="pytorch",
    operator="the training operator",
)
TRAINJOB = JobKind(
    kind="TrainJob",
    group="trainer.kubeflow.org",
    version="v1alpha1",
    plural="trainjobs",
    pods_label="jobset.sigs.k8s.io/jobset-name",
    container="node",
    operator="Kubeflow Trainer",
)
BY_BACKEND = {"pytorchjob": PYTORCHJOB, "trainjob": TRAINJOB}
"""By the name that `--backend` takes."""
ENDED = ("Succeeded", "Complete", "Failed")
"""Conditions of a job that will not change."""


def true_conditions(of: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The conditions of a job or pod that hold, by their type."""
    # a job one of whose pods is refused has no status at all
    conditions = (of.get("status") or {}).get("conditions") or ()
    return {one["type"]: one for one in conditions if one.get("status") == "True"}


def has_ended(job: Mapping[str, Any]) -> bool:
    return any(name in true_conditions(job) for name in ENDED)
