"""A training job on a cluster: created once, followed to its end, deleted on a cancel.

Level-triggered: watches on the job and its pods only wake the loop, which then reads both and judges them
(job_state.py), so a watch that breaks or misses an event costs at most LOOK_EVERY seconds. The job's name is a function
of run, stage and attempt: a launcher that starts again finds its job by it and goes on following.
"""

import logging
import math
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Any

from kubernetes import client, watch
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from components.launch_training.job_state import State, Verdict, judge
from components.shared.errors import InputError, StorageFault
from components.shared.kubernetes_api import ACCOUNT, TIMEOUT, call, connect, plain, short, unanswered
from components.shared.log import mask
from components.shared.training_job import LABEL, TrainingJob, label_value

log = logging.getLogger("launch")

LOOK_EVERY = 60.0
"""Seconds after which the job is looked at even if no watch said anything."""
KEPT_LINES = 30
_KIND: dict[str, Any] = {"group": "kubeflow.org", "version": "v1", "plural": "pytorchjobs"}


def run_on_cluster(job_of: Callable[[int], TrainingJob], attempts: int) -> None:
    """Runs a job, `job_of(attempt)`, to its success, in at most `attempts` of them.

    InputError when the training says that its input is wrong, StorageFault when the job fails or is deleted. On
    SIGTERM and Ctrl-C the job is deleted before anything else.
    """
    cluster = Cluster()
    for attempt in range(1, attempts + 1):
        job = job_of(attempt)
        verdict = cluster.run(replace(job, namespace=job.namespace or cluster.namespace))
        if verdict.state is State.SUCCEEDED:
            return
        if verdict.state is State.WRONG_INPUT:
            raise InputError(verdict.reason)
        if verdict.state is State.GONE:
            raise StorageFault(f"training job {job.name}: {verdict.reason}")
        log.warning("training job %s failed (attempt %d of %d): %s", job.name, attempt, attempts, verdict.reason)
    raise StorageFault(f"training job {job.name} failed: {verdict.reason}; its last lines are above")


def delete_unfinished(run: str, namespace: str) -> list[str]:
    """Deletes the jobs of a run that are not over; their names."""
    cluster = Cluster()
    return cluster.delete_run(run, namespace or cluster.namespace)


class Cluster:
    """The API server, as the launcher needs it."""

    def __init__(self) -> None:
        self.namespace = connect()
        self._jobs = client.CustomObjectsApi()
        self._pods = client.CoreV1Api()

    # --- one job ------------------------------------------------------------------------------------------------------

    def run(self, job: TrainingJob) -> Verdict:
        """Creates the job, or finds it, and follows it to its end. Deleted when this process is told to stop."""
        owner = job.owner or self._workflow(job.namespace)
        try:
            self._create(replace(job, owner=owner))
            return self._follow(job)
        except (SystemExit, KeyboardInterrupt):
            self._delete(job.name, job.namespace)
            raise

    def _create(self, job: TrainingJob) -> None:
        there = self._read(job.name, job.namespace)
        if there is None:
            try:
                call(
                    self._jobs.create_namespaced_custom_object, **_KIND, namespace=job.namespace, body=job.pytorchjob()
                )
            except ApiException as error:
                if error.status != 409:
                    raise _refused(job, error) from error
                # made by this process before a lost answer, or by another launcher of this run
                there = self._read(job.name, job.namespace)
            else:
                log.info(
                    "training job %s/%s created: %d × %d", job.namespace, job.name, job.nodes, job.processes_per_node
                )
        if there is not None:
            mark = f"{LABEL}key"
            if there["metadata"].get("labels", {}).get(mark) != job.labels.get(mark):
                raise InputError(
                    f"there is another training job {job.namespace}/{job.name}; delete it, or give another --run-id"
                )
            log.info("training job %s/%s is there: following it", job.namespace, job.name)

    def _follow(self, job: TrainingJob) -> Verdict:
        woken: queue.SimpleQueue[None] = queue.SimpleQueue()
        stop = threading.Event()
        lines = _Lines(self._pods, job, stop)
        selector = f"training.kubeflow.org/job-name={job.name}"
        watches = (
            (self._jobs.list_namespaced_custom_object, {**_KIND, "field_selector": f"metadata.name={job.name}"}),
            (self._pods.list_namespaced_pod, {"label_selector": selector}),
        )
        for listing, options in watches:
            threading.Thread(
                target=_wake, args=(listing, {**options, "namespace": job.namespace}, woken, stop), daemon=True
            ).start()
        last = Verdict(State.WAITING)
        try:
            while True:
                verdict = judge(self._read(job.name, job.namespace), self._pods_of(selector, job.namespace, lines))
                if verdict != last:
                    log.info(
                        "training job %s: %s", job.name, " ".join(filter(None, (verdict.state.value, verdict.reason)))
                    )
                last = verdict
                if verdict.state is State.WRONG_INPUT:
                    self._delete(job.name, job.namespace)
                if verdict.over:
                    lines.finish()
                    return verdict
                try:
                    woken.get(timeout=LOOK_EVERY)
                except queue.Empty:
                    continue
                while not woken.empty():
                    woken.get()
        finally:
            stop.set()

    def _read(self, name: str, namespace: str) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = call(
                self._jobs.get_namespaced_custom_object, **_KIND, namespace=namespace, name=name
            )
        except ApiException as error:
            if error.status == 404:
                return None
            raise unanswered(error) from error
        return found

    def _pods_of(self, selector: str, namespace: str, lines: "_Lines") -> list[dict[str, Any]]:
        try:
            listed = call(plain, call=self._pods.list_namespaced_pod, namespace=namespace, label_selector=selector)
        except ApiException as error:
            raise unanswered(error) from error
        pods: list[dict[str, Any]] = listed["items"]
        for pod in pods:
            labels = pod["metadata"].get("labels", {})
            if labels.get("training.kubeflow.org/replica-type") == "master":
                lines.follow(pod)
        return pods

    def _delete(self, name: str, namespace: str) -> None:
        try:
            self._jobs.delete_namespaced_custom_object(
                **_KIND, namespace=namespace, name=name, propagation_policy="Background", _request_timeout=TIMEOUT
            )
            log.info("training job %s/%s deleted", namespace, name)
        except (ApiException, HTTPError) as error:
            if not isinstance(error, ApiException) or error.status != 404:
                log.warning("training job %s/%s could not be deleted: %s", namespace, name, short(error))

    def delete_run(self, run: str, namespace: str) -> list[str]:
        selector = f"{LABEL}run={label_value(run)}"
        try:
            listed = call(
                self._jobs.list_namespaced_custom_object, **_KIND, namespace=namespace, label_selector=selector
            )
        except ApiException as error:
            raise unanswered(error) from error
        names = [job["metadata"]["name"] for job in listed["items"] if not judge(job, ()).over]
        for name in names:
            self._delete(name, namespace)
        return names

    def _workflow(self, namespace: str) -> dict[str, Any] | None:
        """The Workflow that owns this step's pod, as an owner of the job: deleting the run then deletes the job."""
        name = os.environ.get("HOSTNAME", "")
        if not name or not ACCOUNT.exists() or namespace != self.namespace:
            return None
        try:
            pod = call(plain, call=self._pods.read_namespaced_pod, name=name, namespace=namespace)
        except ApiException as error:
            log.warning("the job gets no owner: this pod cannot be read (%s)", short(error))
            return None
        for owner in pod["metadata"].get("ownerReferences", ()):
            if owner["kind"] == "Workflow":
                named = {field: owner[field] for field in ("apiVersion", "kind", "name", "uid")}
                return {**named, "controller": False, "blockOwnerDeletion": False}
        return None


# --- what the server refuses ------------------------------------------------------------------------------------------


def _refused(job: TrainingJob, error: ApiException) -> Exception:
    if error.status in (400, 403, 404, 422):
        mend = {
            403: "give this account the Role zhllama-runner",
            404: "install the training operator, or check --namespace",
        }.get(error.status, "mend the job's options")
        return InputError(f"training job {job.namespace}/{job.name} was refused: {short(error)}; {mend}")
    return unanswered(error)


# --- what happens meanwhile -------------------------------------------------------------------------------------------


def _wake(
    listing: Callable[..., Any], options: dict[str, Any], woken: "queue.SimpleQueue[None]", stop: threading.Event
) -> None:
    """Puts a token into `woken` for every change that a watch shows, until `stop`; a broken watch begins anew."""
    pause = 0.5
    while not stop.is_set():
        try:
            for _ in watch.Watch(return_type="object").stream(
                listing, **options, timeout_seconds=300, _request_timeout=(10, 330)
            ):
                pause = 0.5
                woken.put(None)
                if stop.is_set():
                    return
        except (ApiException, HTTPError, OSError, ValueError) as error:
            log.debug("watch: %s", error)
        woken.put(None)
        stop.wait(pause)
        pause = min(pause * 2, 15)


class _Lines:
    """Passes the master pod's log on: each line once, also when the stream breaks."""

    def __init__(self, pods: Any, job: TrainingJob, stop: threading.Event) -> None:
        self._pods = pods
        self._job = job
        self._stop = stop
        self._last = ""
        self._thread: threading.Thread | None = None
        self._over = threading.Event()
        self.kept: deque[str] = deque(maxlen=KEPT_LINES)

    def follow(self, pod: dict[str, Any]) -> None:
        """Begins with the pod once it runs, or has run."""
        if self._thread is None and pod.get("status", {}).get("phase") in ("Running", "Succeeded", "Failed"):
            self._thread = threading.Thread(target=self._work, args=(pod["metadata"]["name"],), daemon=True)
            self._thread.start()

    def finish(self) -> None:
        """The job is over: waits for what the log still has, a few seconds at most."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def _work(self, name: str) -> None:
        while not self._stop.is_set():
            over = self._over.is_set()
            try:
                self._stream(name)
            except (ApiException, HTTPError, OSError) as error:
                log.debug("log of %s: %s", name, error)
            if over:
                return
            self._over.wait(1.0)

    def _stream(self, name: str) -> None:
        since: dict[str, Any] = {}
        if self._last:
            seen = datetime.fromisoformat(self._last[:26].rstrip("Z") + "+00:00")
            since["since_seconds"] = max(1, math.ceil(time.time() - seen.timestamp()) + 1)
        answer = self._pods.read_namespaced_pod_log(
            name=name,
            namespace=self._job.namespace,
            container="pytorch",
            follow=not self._over.is_set(),
            timestamps=True,
            _preload_content=False,
            _request_timeout=(10, 600),
            **since,
        )
        try:
            for raw in answer:
                stamp, _, text = raw.decode(errors="replace").rstrip("\n").partition(" ")
                # nanoseconds in UTC: as texts they sort as times
                if stamp > self._last:
                    self._last = stamp
                    self.kept.append(text)
                    print(f"{name} | {mask(text)}", file=sys.stderr, flush=True)
        finally:
            answer.close()
