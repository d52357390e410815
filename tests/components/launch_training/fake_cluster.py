"""A cluster with the training operators, as far as a launcher can see it: jobs, their pods, their logs.

What the operator of PyTorchJobs does it does here too (training_operator.py), at each change of a job and its pods.
What the kubelet would, and the operator of TrainJobs, is done by the test: `cluster.on_create = function(job)`, which
runs in a thread of its own and moves the job on with `set_pod` and `set_condition`.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from tests.components.launch_training.training_operator import TrainingOperator, with_condition
from tests.kubernetes_admission import faults
from tests.kubernetes_server import KubernetesServer

ROOTS = {
    "PyTorchJob": "/apis/kubeflow.org/v1/namespaces/team/pytorchjobs",
    "TrainJob": "/apis/trainer.kubeflow.org/v1alpha1/namespaces/team/trainjobs",
    "NetworkPolicy": "/apis/networking.k8s.io/v1/namespaces/team/networkpolicies",
    "Workflow": "/apis/argoproj.io/v1alpha1/namespaces/team/workflows",
    "Pod": "/api/v1/namespaces/team/pods",
    "Event": "/api/v1/namespaces/team/events",
}
JOBS = ("PyTorchJob", "TrainJob")
OVER = ("Succeeded", "Failed", "Complete")


def warm_up() -> None:
    """Reads the definitions, which takes a second, before a time-out counts."""
    for kind in JOBS:
        faults({"apiVersion": ROOTS[kind][len("/apis/") :].partition("/namespaces")[0], "kind": kind, "metadata": {}})


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def finished(job: dict[str, Any]) -> bool:
    conditions = job.get("status", {}).get("conditions", ())
    return any(one["type"] in OVER and one["status"] == "True" for one in conditions)


class FakeCluster(KubernetesServer):
    """PyTorchJobs and TrainJobs and their pods, each by name."""

    @property
    def jobs(self) -> dict[str, dict[str, Any]]:
        return {**self.of_kind("PyTorchJob"), **self.of_kind("TrainJob")}

    def posts(self) -> int:
        """Jobs that were asked for, be they refused or lost."""
        return sum(method == "POST" and "networkpolicies" not in path for method, path in self.requests)

    def _job(self, name: str) -> tuple[str, dict[str, Any]] | None:
        for kind in JOBS:
            path = f"{ROOTS[kind]}/{name}"
            if path in self.objects:
                return path, self.objects[path]
        return None

    def _created(self, thing: dict[str, Any]) -> None:
        if thing["kind"] in JOBS:
            self.operate(thing["metadata"]["name"])
            super()._created(thing)

    # --- what an operator does ----------------------------------------------------------------------------------------

    operates = True
    """Whether there is an operator of PyTorchJobs."""
    deletes: Callable[[str], Any] | None = None
    """How a pod goes that the operator deletes (TrainingOperator)."""
    _operator: TrainingOperator | None = None

    def operate(self, name: str) -> bool:
        """The operator looks at a job; whether there is one that does."""
        found = self._job(name)
        if not self.operates or found is None or not found[1]["spec"].get("pytorchReplicaSpecs"):
            return False
        self._operator = self._operator or TrainingOperator(self, deletes=self.deletes)
        self._operator.reconcile(name)
        return True

    def set_condition(self, name: str, kind: str, message: str = "") -> None:
        """The job comes to be `kind`; nothing when it is gone. Of a PyTorchJob what leads to it happens: Suspended (its
        spec says so), Running (no more, and its first pod runs), Succeeded (that ended with 0), Failed (it has
        restarted too often), Late (its deadline is over). A TrainJob knows Suspended, Complete and Failed alone.
        """
        with self.changed:
            found = self._job(name)
            if found is None:
                return
            path, job = found
            if self.operate(name):
                self._lead(name, job, kind)
                return
            conditions = job.setdefault("status", {}).get("conditions", [])
            if job["kind"] == "PyTorchJob":
                conditions = with_condition(conditions, kind, f"PyTorchJob{kind}", message, now())
            else:
                kept = [one for one in conditions if one["type"] not in (kind, "Suspended")]
                if kind in ("Suspended", "Complete", "Failed", "Late"):
                    reason = {"Late": "DeadlineExceeded", "Failed": "BackoffLimitExceeded"}.get(kind, kind)
                    told = {"type": "Failed" if kind == "Late" else kind, "status": "True", "reason": reason}
                    kept.append({**told, "message": message, "lastTransitionTime": now()})
                conditions = kept
            job["status"]["conditions"] = conditions
            self._emit(path, "MODIFIED", job)

    def _lead(self, name: str, job: dict[str, Any], kind: str) -> None:
        policy = job["spec"]["runPolicy"]
        if kind in ("Suspended", "Running"):
            policy["suspend"] = kind == "Suspended"
            self.operate(name)
        if kind in ("Running", "Succeeded"):
            self.set_pod(name, kind, 0 if kind == "Succeeded" else None)
        elif kind == "Failed":
            self.set_pod(name, "Running", 1, restarts=policy["backoffLimit"])
        elif kind == "Late":
            job["status"]["startTime"] = "2020-01-01T00:00:00Z"
            self.operate(name)

    def set_pod(
        self,
        job: str,
        phase: str,
        exit_code: int | None = None,
        message: str = "",
        last: bool = False,
        index: int = 0,
        waiting: str = "",
        unschedulable: str = "",
        restarts: int = 0,
    ) -> None:
        """A pod of the job, the master by default; nothing when the job is gone. With `exit_code` its container ended
        (with `last`: and was started again); `waiting`: the reason for which it does not start."""
        with self.changed:
            found = self._job(job)
            if found is None:
                return
            name, labels = self.pod(job, index)
            container = "pytorch" if found[1]["kind"] == "PyTorchJob" else "node"
            status: dict[str, Any] = {"name": container, "state": {"running": {}}, "lastState": {}}
            status["restartCount"] = restarts
            if waiting:
                status["state"] = {"waiting": {"reason": waiting, "message": message}}
            if exit_code is not None:
                end = {"terminated": {"exitCode": exit_code, "message": message, "reason": "Error"}}
                status["lastState" if last else "state"] = end
            told: dict[str, Any] = {"phase": phase, "containerStatuses": [status]}
            if unschedulable:
                scheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
                told = {"phase": phase, "conditions": [{**scheduled, "message": unschedulable}]}
            metadata: dict[str, Any] = {"name": name, "namespace": self.namespace, "labels": labels}
            owner = {"kind": found[1]["kind"], "name": job, "uid": found[1]["metadata"]["uid"]}
            metadata["ownerReferences"] = [owner]
            path = f"{ROOTS['Pod']}/{name}"
            made = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata}
            if (there := self.objects.get(path)) and there["metadata"]["ownerReferences"][0]["uid"] == owner["uid"]:
                made = there
            self.put(path, made | {"status": told})
            self.operate(job)

    def pod(self, job: str, index: int = 0) -> tuple[str, dict[str, str]]:
        """The name and the labels of the job's pod of that number, as its operator gives them."""
        found = self._job(job)
        assert found is not None
        if found[1]["kind"] == "TrainJob":
            labels = {"jobset.sigs.k8s.io/jobset-name": job, "batch.kubernetes.io/job-completion-index": str(index)}
            return f"{job}-node-0-{index}-x7z9q", labels
        elastic = "Master" not in found[1]["spec"].get("pytorchReplicaSpecs", {"Master": {}})
        role = "worker" if elastic or index else "master"
        number = index if elastic or not index else index - 1
        labels = {"training.kubeflow.org/job-name": job, "training.kubeflow.org/replica-type": role}
        return f"{job}-{role}-{number}", {**labels, "training.kubeflow.org/replica-index": str(number)}

    def warn(self, name: str, reason: str, message: str, uid: str = "") -> None:
        """An event that the operator leaves with an object; uid: of the one that it is about."""
        about = {"name": name, **({"uid": uid} if uid else {})}
        told = {"type": "Warning", "reason": reason, "message": message, "involvedObject": about}
        event = f"{name}.{len(self.requests)}"
        self.put(
            f"{ROOTS['Event']}/{event}",
            {"apiVersion": "v1", "kind": "Event", "metadata": {"name": event, "namespace": self.namespace}, **told},
        )

    def delete_job(self, name: str) -> None:
        """From outside, with its pods."""
        with self.changed:
            found = self._job(name)
            assert found is not None
            self.delete(found[0])

    def put_job(self, name: str, kind: str = "PyTorchJob", **metadata: Any) -> None:
        """A job that nobody's operator moves."""
        version = "kubeflow.org/v1" if kind == "PyTorchJob" else "trainer.kubeflow.org/v1alpha1"
        thing = {"apiVersion": version, "kind": kind, "metadata": {"name": name, **metadata}, "spec": {}}
        status, _ = self.create(f"{ROOTS[kind]}/{name}", thing)
        assert status == 201
