"""The API server, as the launcher needs it: jobs of one kind, their pods and Events, their network policies."""

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from kubernetes import client
from kubernetes.client.exceptions import ApiException

from components.launch_training.options import LaunchTraining
from zhllama.kubernetes.api import ACCOUNT, call, connect, delete_object, plain, short, unanswered
from zhllama.kubernetes.job_kinds import TRAINJOB, JobKind
from zhllama.kubernetes.job_manifest import job_manifest
from zhllama.kubernetes.network_policy import S3Network, network_policy
from zhllama.kubernetes.refusals import Asker, wants_room
from zhllama.kubernetes.training_job import TrainingJob

log = logging.getLogger("launch")


class Cluster:
    """Of one kind of job."""

    def __init__(self, kind: JobKind) -> None:
        self.kind = kind
        self.namespace = connect()
        self.api = client.ApiClient()
        self._jobs = client.CustomObjectsApi(self.api)
        self._pods = client.CoreV1Api(self.api)
        self._policies = client.NetworkingV1Api(self.api)

    def read(self, job: TrainingJob) -> dict[str, Any] | None:
        get = self._jobs.get_namespaced_custom_object
        try:
            return dict(call(plain, call=get, **self.kind.place, namespace=job.namespace, name=job.name))
        except ApiException as error:
            if error.status == 404:
                return None
            raise unanswered(error) from error

    def jobs(self, namespace: str, selector: str, request: Callable[..., Any] = call) -> list[dict[str, Any]]:
        """Jobs that have those labels. ApiException as it is."""
        listing, where = self._jobs.list_namespaced_custom_object, {**self.kind.place, "namespace": namespace}
        return list(request(plain, call=listing, **where, label_selector=selector)["items"])

    def create(self, job: TrainingJob, timeout: tuple[float, float]) -> dict[str, Any]:
        """One attempt: ApiException and HTTPError as they come."""
        create, body = self._jobs.create_namespaced_custom_object, job_manifest(job, self.kind.kind.lower())
        return dict(plain(create, **self.kind.place, namespace=job.namespace, body=body, _request_timeout=timeout))

    def delete(self, namespace: str, name: str, uid: str = "", request: Callable[..., Any] = call) -> bool:
        """As api.delete_object."""
        where = {**self.kind.place, "namespace": namespace}
        return delete_object(self._jobs.delete_namespaced_custom_object, where, name, uid, request)

    # --- what belongs to a job ----------------------------------------------------------------------------------------

    def pods(self, job: TrainingJob, uid: str) -> list[dict[str, Any]]:
        """The job's pods; not those that a job of the same name has left behind."""
        kind = self.kind.kind
        return [
            pod
            for pod in self.pods_of(job.namespace, f"{self.kind.pods_label}={job.name}")
            if {one["uid"] for one in pod["metadata"].get("ownerReferences") or () if one.get("kind") == kind} <= {uid}
        ]

    def pods_of(self, namespace: str, selector: str) -> list[dict[str, Any]]:
        """Pods that have those labels, whatever job they are of."""
        try:
            listed = call(plain, call=self._pods.list_namespaced_pod, namespace=namespace, label_selector=selector)
        except ApiException as error:
            raise unanswered(error) from error
        return list(listed["items"])

    def warnings(self, job: TrainingJob, uid: str, pods: Mapping[str, str]) -> list[str]:
        """What operator, scheduler and kubelet complain of (a quota, a volume that is not there), by the Events of the
        job and of pods (name → uid), the oldest first: `reason: message`. Events outlive what they are about: those of
        an earlier job or pod of the same name say nothing."""
        said: list[tuple[str, str]] = []
        # a TrainJob's JobSet has its name, and the Job under it the name of its node role
        under: dict[str, str | None] = {f"{job.name}-node-0": None} if self.kind is TRAINJOB else {}
        for name, ours in {job.name: uid, **under, **pods}.items():
            about, events = f"involvedObject.name={name},type=Warning", self._pods.list_namespaced_event
            try:
                listed = call(plain, call=events, namespace=job.namespace, field_selector=about)
            except ApiException as error:
                log.debug("events of %s: %s", name, short(error))
                return []
            for one in listed["items"]:
                theirs = (one.get("involvedObject") or {}).get("uid")
                if theirs and ours is not None and theirs != ours:
                    continue
                when = one.get("lastTimestamp") or one.get("eventTime") or one.get("firstTimestamp") or ""
                said.append((str(when), f"{one.get('reason', '')}: {one.get('message', '')}".strip()))
        return [text for _, text in sorted(said, key=lambda one: one[0])]

    def create_policy(self, job: TrainingJob, made: Mapping[str, Any]) -> None:
        """The NetworkPolicy of the job that was made. It goes with that very one, by its owner: nobody here may delete
        a policy. Without the right to make one the job goes on. ApiException as it is where a quota has no room for
        it."""
        metadata = made["metadata"]
        owner = {"apiVersion": made["apiVersion"], "kind": made["kind"], "name": job.name, "uid": metadata["uid"]}
        body = network_policy(
            replace(job, owner={**owner, "controller": False, "blockOwnerDeletion": False}),
            S3Network.at(job.environment.get("ZHLLAMA_S3_ENDPOINT", "")),
        )
        # of another job of this name, deleted and made again, one may still be there
        body["metadata"]["name"] = f"{job.name}-{hashlib.sha256(metadata['uid'].encode()).hexdigest()[:8]}"
        create = self._policies.create_namespaced_network_policy
        try:
            call(plain, call=create, namespace=job.namespace, body=body)
        except ApiException as error:
            if error.status == 409:
                return
            if wants_room(error):
                raise
            mend, ours = asker(self.kind).mend(error)
            if error.status not in (403, 404) or not ours:
                raise refused(self.kind, job, error, "its NetworkPolicy") from error
            mend += ". Where the namespace denies the rest (k8s/base), its pods reach neither each other nor S3"
            log.warning("%s gets no NetworkPolicy of its own (%s); %s", job.name, short(error), mend)

    def watches(self, namespace: str, selector: str) -> tuple[tuple[Callable[..., Any], dict[str, Any]], ...]:
        """What to watch of the jobs with those labels, and of their pods, which carry them too."""
        common = {"namespace": namespace, "label_selector": selector}
        return (
            (self._jobs.list_namespaced_custom_object, {**self.kind.place, **common}),
            (self._pods.list_namespaced_pod, common),
        )

    def workflow(self, namespace: str) -> dict[str, Any] | None:
        """The Workflow that owns this step's pod, as an owner of the job: deleting the run then deletes the job."""
        try:
            owners = self._pod()[1] if namespace == self.namespace else []
        except ApiException as error:
            log.warning("the job gets no owner: this pod cannot be read (%s)", short(error))
            return None
        for owner in owners:
            if owner["kind"] == "Workflow":
                named = {field: owner[field] for field in ("apiVersion", "kind", "name", "uid")}
                return {**named, "controller": False, "blockOwnerDeletion": False}
        return None

    def starter(self) -> str:
        """Eight characters for what started this launcher: the run whose pod this is (a Workflow, a Job: all of its
        pods have them alike), else the pod. "" outside of a cluster."""
        try:
            name, owners = self._pod()
        except ApiException as error:
            if error.status not in (403, 404):
                # what is not known for now would be another name than the one at the next start
                raise unanswered(error) from error
            name, owners = os.environ["HOSTNAME"], []
        started_by = next((owner["uid"] for owner in owners if owner.get("controller")), name)
        return hashlib.sha256(started_by.encode()).hexdigest()[:8] if name else ""

    def _pod(self) -> tuple[str, list[dict[str, Any]]]:
        """The name of the pod that this is, and what owns it; "" outside of a cluster. ApiException as it is."""
        name = os.environ.get("HOSTNAME", "") if ACCOUNT.exists() else ""
        if not name:
            return "", []
        pod = call(plain, call=self._pods.read_namespaced_pod, name=name, namespace=self.namespace)
        return name, list(pod["metadata"].get("ownerReferences", ()))


def age(job: Mapping[str, Any]) -> tuple[str, str]:
    """Sorts jobs by when they were made; of the same second, by their uid."""
    return str(job["metadata"].get("creationTimestamp", "")), str(job["metadata"]["uid"])


def refused(kind: JobKind, job: TrainingJob, error: ApiException, what: str = "") -> Exception:
    """What to raise for an answer that will not change."""
    named = f"training job {job.namespace}/{job.name}" + (f" ({what})" if what else "")
    return asker(kind).refusal(named, error)


def asker(kind: JobKind) -> Asker:
    missing = f"install {kind.operator}, or check --namespace"
    return Asker("zhllama-runner", missing, LaunchTraining, "the job's options")
