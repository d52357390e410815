"""Deletes training jobs whose run has ended or is gone, which a launcher, killed, could not.

The Workflow of an unfinished job is found by the job's owner reference, or by the label that Kubeflow Pipelines puts on
Workflows; when it has ended (which deletes no job), or the owner is gone, the job is an orphan. A job of a run whose
Workflow was never seen (a launcher outside a pipeline) is left alone.

And it wakes the training operator for jobs past their deadline, whose timer it never sets: a label on a quiet job is
enough (seen with 1.9: Failed 0.1 s later).
"""

import logging
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from kubernetes import client
from kubernetes.client.exceptions import ApiException

from zhllama.errors import InputError
from zhllama.kubernetes.api import call, connect, delete_object, plain, short, unanswered
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


def reap(namespace: str, older_than: str, dry_run: bool) -> list[str]:
    """One line for each orphan, as it is deleted (or would be). Jobs past their deadline are touched, and logged.
    older_than: orphans were created longer ago: a run's Workflow may appear after a job that was found."""
    least = read_duration(older_than, "--older-than")
    current = connect()
    namespace = namespace or current
    kinds = BY_BACKEND.values()
    jobs = [(kind, job) for kind in kinds for job in _list(namespace, kind.place) if not has_ended(job)]
    workflows = _list(namespace, WORKFLOWS)
    by_uid = {workflow["metadata"]["uid"]: workflow for workflow in workflows}
    by_run = {workflow["metadata"].get("labels", {}).get(RUN_OF_WORKFLOW): workflow for workflow in workflows}
    lines, overdue = [], []
    for kind, job in jobs:
        name, run = job["metadata"]["name"], job["metadata"].get("labels", {}).get(f"{LABEL}run", "")
        created = datetime.fromisoformat(job["metadata"]["creationTimestamp"])
        if run and datetime.now(UTC) - created >= least and (why := _why(job, by_uid, by_run.get(run))):
            where = {**kind.place, "namespace": namespace}
            deleted = not dry_run and _delete(where, name, job["metadata"]["uid"])
            said = "would be deleted" if dry_run else "deleted" if deleted else "gone already"
            lines.append(f"{namespace}/{name} (run {run}): {said}; {why}")
        elif kind is PYTORCHJOB:
            overdue.append(job)
    for job in overdue:
        name, deadline = job["metadata"]["name"], job.get("spec", {}).get("runPolicy", {}).get("activeDeadlineSeconds")
        started = (job.get("status") or {}).get("startTime")
        if not started or not deadline or f"{LABEL}stage" not in job["metadata"].get("labels", {}):
            continue
        since = datetime.now(UTC) - datetime.fromisoformat(started) - timedelta(seconds=deadline)
        if since > GRACE:
            said = "would be touched" if dry_run else "touched" if _touch(namespace, name) else "gone already"
            late = f"{int(since.total_seconds())} s past its deadline of {deadline} s"
            log.info("%s/%s: %s; %s", namespace, name, said, late)
    return lines


def _why(job: Mapping[str, Any], by_uid: Mapping[str, Mapping[str, Any]], of_run: Mapping[str, Any] | None) -> str:
    """Why a job is an orphan, "" where it is none."""
    owners = [owner for owner in job["metadata"].get("ownerReferences") or () if owner.get("kind") == "Workflow"]
    workflow = by_uid.get(owners[0]["uid"]) if owners else of_run
    if workflow is None:
        return f"its Workflow {owners[0]['name']} is gone" if owners else ""
    phase = workflow.get("status", {}).get("phase", "")
    return f"its Workflow {workflow['metadata']['name']} has ended: {phase}" if phase in ENDED else ""


def _touch(namespace: str, name: str) -> bool:
    """Whether it was there to be touched: a label with the time (seconds since 1970), which wakes the operator."""
    body = {"metadata": {"labels": {f"{LABEL}touched": str(int(time.time()))}}}
    patch = client.CustomObjectsApi().patch_namespaced_custom_object
    try:
        call(plain, call=patch, **PYTORCHJOB.place, namespace=namespace, name=name, body=body)
    except ApiException as error:
        if error.status == 404:
            return False
        raise unanswered(error) from error
    return True


def _delete(where: Mapping[str, str], name: str, uid: str) -> bool:
    """Whether it was there to be deleted; not when its name is another job's by now."""
    try:
        return delete_object(client.CustomObjectsApi().delete_namespaced_custom_object, where, name, uid)
    except ApiException as error:
        raise unanswered(error) from error


def _list(namespace: str, kind: Mapping[str, str]) -> list[dict[str, Any]]:
    """Every object of a kind in the namespace; none where the cluster does not know the kind."""
    found: list[dict[str, Any]] = []
    more: str | None = ""
    list_page = client.CustomObjectsApi().list_namespaced_custom_object
    while more is not None:
        try:
            page = call(plain, call=list_page, **kind, namespace=namespace, limit=200, _continue=more)
        except ApiException as error:
            if error.status == 404:
                return []
            if error.status == 403:
                mend = "give this account the Role zhllama-reaper"
                raise InputError(f"{kind['plural']} in {namespace}: {short(error)}; {mend}") from error
            raise unanswered(error) from error
        found += page["items"]
        more = page.get("metadata", {}).get("continue") or None
    return found
