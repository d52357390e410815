"""Finds training jobs whose run has ended or is gone, and deletes them: what a launcher, killed, could not.

A pipeline's jobs carry the run's id as a label and name the run's Workflow as their owner. Deleting a Workflow deletes
its jobs, ending one does not. So for every unfinished job with a run: its Workflow is looked up, by the owner reference
(name and uid) or by the label that Kubeflow Pipelines puts on Workflows; when it has ended, or the owner is not there
any more, the job is an orphan. A job of a run whose Workflow was never seen (a launcher outside a pipeline) is left
alone. Deletion names the job's uid, so that a new job of the same name is not hit.

And it wakes the training operator for jobs that are past their deadline: its own timer is never set, so a quiet job
would run on; a label on it is enough (seen with 1.9: Failed 0.1 s later).
"""

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from kubernetes import client
from kubernetes.client.exceptions import ApiException

from zhllama.errors import InputError
from zhllama.kubernetes.api import call, connect, delete_object, delete_policy, short, unanswered
from zhllama.kubernetes.job_kinds import BY_BACKEND, PYTORCHJOB, has_ended
from zhllama.kubernetes.names import LABEL
from zhllama.stage.durations import read_duration

log = logging.getLogger("reaper")

WORKFLOWS = {"group": "argoproj.io", "version": "v1alpha1", "plural": "workflows"}
RUN_OF_WORKFLOW = "pipeline/runid"
"""The label of a Workflow that holds the run's id (Kubeflow Pipelines 2)."""
ENDED = ("Succeeded", "Failed", "Error")
GRACE = timedelta(seconds=30)
"""What the operator and the training itself get to end a job at its deadline."""


@dataclass(frozen=True)
class Orphan:
    """A job that still runs, or waits, for a run that has ended or is gone."""

    kind: Mapping[str, str]
    namespace: str
    name: str
    uid: str
    run: str
    why: str


@dataclass(frozen=True)
class Overdue:
    """A PyTorchJob that runs for longer than it may, and that its operator has not looked at since."""

    namespace: str
    name: str
    deadline: int
    since: timedelta


class Reaper:
    """The jobs and Workflows of one namespace."""

    def __init__(self, namespace: str = "") -> None:
        current = connect()
        self.namespace = namespace or current
        self._objects = client.CustomObjectsApi()
        self._policies = client.NetworkingV1Api()
        self._jobs = {kind.kind: self._list(kind.place) for kind in BY_BACKEND.values()}

    def orphans(self, older_than: timedelta) -> Iterator[Orphan]:
        """Those that were created longer ago than that: a run's Workflow may appear after a job that was found."""
        workflows = self._list(WORKFLOWS)
        by_uid = {workflow["metadata"]["uid"]: workflow for workflow in workflows}
        by_run = {workflow["metadata"].get("labels", {}).get(RUN_OF_WORKFLOW): workflow for workflow in workflows}
        for kind in BY_BACKEND.values():
            for job in self._jobs[kind.kind]:
                metadata = job["metadata"]
                run = metadata.get("labels", {}).get(f"{LABEL}run", "")
                created = datetime.fromisoformat(metadata["creationTimestamp"])
                if not run or has_ended(job) or datetime.now(UTC) - created < older_than:
                    continue
                why = _why(metadata, by_uid, by_run.get(run))
                if why:
                    yield Orphan(kind.place, self.namespace, metadata["name"], metadata["uid"], run, why)

    def overdue(self) -> Iterator[Overdue]:
        """Jobs of ours past their activeDeadlineSeconds that have not ended."""
        for job in self._jobs[PYTORCHJOB.kind]:
            if f"{LABEL}stage" not in job["metadata"].get("labels", {}):
                continue
            started = (job.get("status") or {}).get("startTime")
            deadline = job.get("spec", {}).get("runPolicy", {}).get("activeDeadlineSeconds")
            if not started or not deadline or has_ended(job):
                continue
            since = datetime.now(UTC) - datetime.fromisoformat(started) - timedelta(seconds=deadline)
            if since > GRACE:
                yield Overdue(self.namespace, job["metadata"]["name"], deadline, since)

    def touch(self, job: Overdue) -> bool:
        """Whether it was there to be touched: a label with the time (seconds since 1970), which wakes the operator."""
        labels = {f"{LABEL}touched": str(int(time.time()))}
        try:
            call(
                self._objects.patch_namespaced_custom_object,
                **PYTORCHJOB.place,
                namespace=job.namespace,
                name=job.name,
                body={"metadata": {"labels": labels}},
            )
        except ApiException as error:
            if error.status == 404:
                return False
            raise unanswered(error) from error
        return True

    def delete(self, orphan: Orphan) -> bool:
        """Whether it was there to be deleted; not when its name is another job's by now."""
        delete = self._objects.delete_namespaced_custom_object
        try:
            if not delete_object(delete, orphan.kind, orphan.namespace, orphan.name, orphan.uid):
                return False
        except ApiException as error:
            raise unanswered(error) from error
        try:
            delete_policy(self._policies.delete_namespaced_network_policy, orphan.namespace, orphan.name)
        except ApiException as error:
            # one that is left selects nothing, and is no reason to fail
            log.warning("the NetworkPolicy %s/%s is left: %s", orphan.namespace, orphan.name, short(error))
        return True

    def _list(self, kind: Mapping[str, str]) -> list[dict[str, Any]]:
        """Every object of a kind in the namespace; none where the cluster does not know the kind."""
        found: list[dict[str, Any]] = []
        more = ""
        while True:
            try:
                page = call(
                    self._objects.list_namespaced_custom_object,
                    **kind,
                    namespace=self.namespace,
                    limit=200,
                    _continue=more,
                )
            except ApiException as error:
                if error.status == 404:
                    return []
                if error.status == 403:
                    raise InputError(
                        f"{kind['plural']} in {self.namespace}: {short(error)}; "
                        "give this account the Role zhllama-reaper"
                    ) from error
                raise unanswered(error) from error
            found += page["items"]
            more = page.get("metadata", {}).get("continue") or ""
            if not more:
                return found


def _why(metadata: Mapping[str, Any], by_uid: Mapping[str, Mapping[str, Any]], of_run: Mapping[str, Any] | None) -> str:
    """Why a job is an orphan, "" where it is none."""
    owners = [owner for owner in metadata.get("ownerReferences") or () if owner.get("kind") == "Workflow"]
    workflow = by_uid.get(owners[0]["uid"]) if owners else of_run
    if workflow is None:
        return f"its Workflow {owners[0]['name']} is gone" if owners else ""
    phase = workflow.get("status", {}).get("phase", "")
    return f"its Workflow {workflow['metadata']['name']} has ended: {phase}" if phase in ENDED else ""


def reap(namespace: str, older_than: str, dry_run: bool) -> list[str]:
    """One line for each orphan, as it is deleted (or would be). Jobs past their deadline are touched, and logged."""
    least = read_duration(older_than, "--older-than")
    reaper = Reaper(namespace)
    lines = []
    for orphan in list(reaper.orphans(least)):
        said = "would be deleted" if dry_run else "deleted" if reaper.delete(orphan) else "gone already"
        lines.append(f"{orphan.namespace}/{orphan.name} (run {orphan.run}): {said}; {orphan.why}")
    gone = {line.split()[0] for line in lines}
    for job in list(reaper.overdue()):
        name = f"{job.namespace}/{job.name}"
        if name not in gone:
            said = "would be touched" if dry_run else "touched" if reaper.touch(job) else "gone already"
            log.info("%s: %s; %d s past its deadline of %d s", name, said, job.since.total_seconds(), job.deadline)
    return lines
