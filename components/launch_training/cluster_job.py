"""A training job on a cluster: created once, followed to its end, deleted on a cancel.

Level-triggered: watches on the job and its pods only wake the loop, which then reads both and judges them
(job_state.py), so a watch that breaks or misses an event costs at most LOOK_EVERY seconds. The job's name is a function
of run, stage and attempt: a launcher that starts again, or a second one, finds the job by it and goes on following.
Nothing is remembered but on the API server.
"""

import hashlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from kubernetes import client, watch
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError
from urllib3.exceptions import TimeoutError as UrllibTimeout

from components.launch_training.cancel import Canceller
from components.launch_training.job_log import JobLogs
from components.launch_training.job_state import Patience, State, Verdict, already, judge, newest, without_counts
from zhllama.errors import EXIT_CANCELLED, InputError, StorageFault
from zhllama.kubernetes import api as kubernetes_api
from zhllama.kubernetes.api import (
    ACCOUNT,
    call,
    connect,
    delete_object,
    delete_policy,
    passes,
    plain,
    short,
    unanswered,
)
from zhllama.kubernetes.job_kinds import BY_BACKEND, TRAINJOB, JobKind, has_ended, true_conditions
from zhllama.kubernetes.network_policy import S3Network, network_policy
from zhllama.kubernetes.training_job import LABEL, TrainingJob, label_value

log = logging.getLogger("launch")

LOOK_EVERY = 60.0
"""Seconds after which the job is looked at even if no watch said anything."""
WATCH_SECONDS = 300
"""How long a watch lasts. The API server ends it then, and it begins anew."""
FIRST_REWATCH, LONGEST_REWATCH = 0.5, 15.0
"""Seconds between a watch's end and the next one."""
CANCEL_TIMEOUT = (2.0, 3.0)
"""Of a request that carries out a cancel: to connect, and for the answer."""
CANCEL_WITHIN = 20.0
"""Seconds for which a cancel is tried; a pod's default grace period is 30."""
LATE_EVERY = 0.5
"""Seconds between two looks for a job whose creation was given up before the cancel."""
MOST_ASKED = 8
"""Pods that do not start whose events are read: they mostly say the same."""
GONE_WITHIN = 600.0
"""Seconds for which a job of our name that is being deleted is waited for."""


def run_on_cluster(
    cluster: "Cluster",
    job_of: Callable[[int], TrainingJob],
    attempts: int,
    waiting_seconds: float,
    keep: Callable[[str, list[str]], None],
    published: Callable[[], bool],
) -> None:
    """Runs a job, `job_of(attempt)`, to its success, in at most `attempts` of them. A job of the same work that another
    run has going is followed in place of one of our own.

    InputError when the training says that its input is wrong, StorageFault when the job fails, is deleted, or waits for
    longer than `waiting_seconds` (0: it may wait for ever). On SIGTERM and Ctrl-C the job is deleted before anything
    else. keep: gets each job's name and its last lines when it is over. published: whether the result is there, which
    alone says that a job has succeeded: its condition says no more than that its Master ended with 0.
    """
    launch = Launch(cluster, lambda attempt: cluster.placed(job_of(attempt)), waiting_seconds, keep, published)
    with Canceller(launch.cancel, launch.sweep) as launch.canceller:
        launch.run(attempts)


class Cluster:
    """The API server, as the launcher needs it: jobs of one kind, their pods, their network policies."""

    def __init__(self, kind: JobKind) -> None:
        self.kind = kind
        self.namespace = connect()
        self.api = client.ApiClient()
        self._jobs = client.CustomObjectsApi(self.api)
        self._pods = client.CoreV1Api(self.api)
        self._policies = client.NetworkingV1Api(self.api)

    def placed(self, job: TrainingJob) -> TrainingJob:
        """The job with its namespace: its own, or this pod's."""
        return replace(job, namespace=job.namespace or self.namespace)

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def read(self, job: TrainingJob) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = call(
                self._jobs.get_namespaced_custom_object, **self.kind.place, namespace=job.namespace, name=job.name
            )
        except ApiException as error:
            if error.status == 404:
                return None
            raise unanswered(error) from error
        return found

    def jobs(self, namespace: str, selector: str, request: Callable[..., Any] = call) -> list[dict[str, Any]]:
        """Jobs that have those labels. ApiException as it is."""
        listed: dict[str, Any] = request(
            self._jobs.list_namespaced_custom_object,
            **self.kind.place,
            namespace=namespace,
            label_selector=selector,
        )
        return list(listed["items"])

    def create(self, job: TrainingJob) -> dict[str, Any]:
        """One attempt: ApiException and HTTPError as they come."""
        manifest = job.trainjob() if self.kind is TRAINJOB else job.pytorchjob()
        created: dict[str, Any] = self._jobs.create_namespaced_custom_object(
            **self.kind.place, namespace=job.namespace, body=manifest, _request_timeout=kubernetes_api.TIMEOUT
        )
        return created

    def delete(self, namespace: str, name: str, uid: str = "", request: Callable[..., Any] = call) -> bool:
        """As kubernetes_api.delete_object."""
        delete = self._jobs.delete_namespaced_custom_object
        return delete_object(delete, self.kind.place, namespace, name, uid, request)

    # --- what belongs to a job ----------------------------------------------------------------------------------------

    def pods(self, job: TrainingJob, uid: str) -> list[dict[str, Any]]:
        """The job's pods; not those that a job of the same name has left behind."""
        selector = f"{self.kind.pods_label}={job.name}"
        try:
            listed = call(plain, call=self._pods.list_namespaced_pod, namespace=job.namespace, label_selector=selector)
        except ApiException as error:
            raise unanswered(error) from error

        def ours(pod: dict[str, Any]) -> bool:
            owners = pod["metadata"].get("ownerReferences") or ()
            return all(owner["uid"] == uid for owner in owners if owner.get("kind") == self.kind.kind)

        return [pod for pod in listed["items"] if ours(pod)]

    def warnings(self, job: TrainingJob, uid: str, pods: Mapping[str, str]) -> list[str]:
        """What operator, scheduler and kubelet complain of, by the events of the job and of pods, the oldest first: a
        quota, a pod that is not admitted, a volume that is not there. `reason: message`. pods: name → uid. Events
        outlive what they are about: those of an earlier job or pod of the same name say nothing."""
        said: list[tuple[str, str]] = []
        # a TrainJob's JobSet has its name, and the Job under it the name of its node role
        names = (job.name, f"{job.name}-node-0") if self.kind is TRAINJOB else (job.name,)
        for name in (*names, *pods):
            try:
                listed = call(
                    plain,
                    call=self._pods.list_namespaced_event,
                    namespace=job.namespace,
                    field_selector=f"involvedObject.name={name},type=Warning",
                )
            except ApiException as error:
                log.debug("events of %s: %s", name, short(error))
                return []
            for one in listed["items"]:
                about = (one.get("involvedObject") or {}).get("uid")
                if about and name in (job.name, *pods) and about != pods.get(name, uid):
                    continue
                when = one.get("lastTimestamp") or one.get("eventTime") or one.get("firstTimestamp") or ""
                said.append((str(when), f"{one.get('reason', '')}: {one.get('message', '')}".strip()))
        return [text for _, text in sorted(said, key=lambda one: one[0])]

    def create_policy(self, job: TrainingJob) -> bool:
        """The job's own NetworkPolicy; whether it was made now. Without the right to make one the job goes on."""
        try:
            call(
                plain,
                call=self._policies.create_namespaced_network_policy,
                namespace=job.namespace,
                body=network_policy(job, S3Network.at(job.environment.get("ZHLLAMA_S3_ENDPOINT", ""))),
            )
        except ApiException as error:
            if error.status in (403, 404):
                log.warning(
                    "%s gets no NetworkPolicy of its own (%s); give this account the Role zhllama-runner. Where the "
                    "namespace denies the rest (k8s/base), its pods reach neither each other nor S3",
                    job.name,
                    short(error),
                )
            elif error.status != 409:
                raise _refused(self.kind, job, error, "its NetworkPolicy") from error
            return False
        return True

    def delete_policy(self, namespace: str, name: str, request: Callable[..., Any] = call) -> None:
        """As kubernetes_api.delete_policy."""
        delete_policy(self._policies.delete_namespaced_network_policy, namespace, name, request)

    def watches(self, namespace: str, selector: str) -> tuple[tuple[Callable[..., Any], dict[str, Any]], ...]:
        """What to watch of the jobs with those labels, and of their pods, which carry them too."""
        common = {"namespace": namespace, "label_selector": selector}
        return (
            (self._jobs.list_namespaced_custom_object, {**self.kind.place, **common}),
            (self._pods.list_namespaced_pod, common),
        )

    def workflow(self, namespace: str) -> dict[str, Any] | None:
        """The Workflow that owns this step's pod, as an owner of the job: deleting the run then deletes the job."""
        if not self._pod_name() or namespace != self.namespace:
            return None
        try:
            owners = self._pod_owners()
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
        name = self._pod_name()
        if not name:
            return ""
        try:
            started_by = next((owner["uid"] for owner in self._pod_owners() if owner.get("controller")), name)
        except ApiException as error:
            if error.status not in (403, 404):
                # what is not known for now would be another name than the one at the next start
                raise unanswered(error) from error
            started_by = name
        return hashlib.sha256(started_by.encode()).hexdigest()[:8]

    @staticmethod
    def _pod_name() -> str:
        """Of the pod that this is; "" outside of a cluster."""
        return os.environ.get("HOSTNAME", "") if ACCOUNT.exists() else ""

    def _pod_owners(self) -> list[dict[str, Any]]:
        """What owns this pod. ApiException as it is."""
        pod = call(plain, call=self._pods.read_namespaced_pod, name=self._pod_name(), namespace=self.namespace)
        return list(pod["metadata"].get("ownerReferences", ()))


# --- one stage of a run -----------------------------------------------------------------------------------------------


class Launch:
    """The attempts at one stage of a run."""

    canceller: Canceller

    def __init__(
        self,
        cluster: Cluster,
        job_of: Callable[[int], TrainingJob],
        waiting_seconds: float,
        keep: Callable[[str, list[str]], None],
        published: Callable[[], bool],
    ) -> None:
        self._cluster, self._job_of, self._waiting, self._keep = cluster, job_of, waiting_seconds, keep
        self._published = published
        self._first = job_of(1)
        labels = self._first.labels
        self._key = labels[f"{LABEL}key"]
        self._selector = ",".join(f"{LABEL}{name}={labels[f'{LABEL}{name}']}" for name in ("run", "stage"))
        self._woken: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._over = threading.Event()
        # what a cancel has to know, and may read at any moment
        self._current: tuple[str, str] | None = None
        self._made_now: tuple[str, str] | None = None
        """The age of the job that was made just now; None of one that was there."""
        self._posting: _Posting | None = None
        self._given_up = False
        """Whether a request to create a job was not answered in time: the server may still be at it."""
        self._cancel: _Cancel

    def run(self, attempts: int) -> None:
        """To the success of one attempt; see `run_on_cluster`."""
        # the same work of another run, too
        for listing, options in self._cluster.watches(self._first.namespace, f"{LABEL}key={self._key}"):
            threading.Thread(target=_wake, args=(listing, options, self._woken, self._over), daemon=True).start()
        try:
            attempt = max(1, self._newest())
            while True:
                if self._follow_others() or self._published():
                    return
                job = self._job_of(attempt)
                verdict = self._attempt(job)
                if verdict.state is State.SUCCEEDED:
                    return
                if verdict.state is State.WRONG_INPUT:
                    raise InputError(verdict.reason)
                if verdict.state is State.YIELDED:
                    continue
                if verdict.state in (State.GONE, State.EXPIRED):
                    raise StorageFault(f"training job {job.name}: {verdict.reason}")
                if attempt >= attempts:
                    raise StorageFault(f"training job {job.name} failed: {verdict.reason}")
                log.warning(
                    "training job %s failed (attempt %d of %d): %s", job.name, attempt, attempts, verdict.reason
                )
                # another launcher of this run may be ahead
                attempt = max(attempt + 1, self._newest())
        finally:
            self._over.set()

    def _newest(self) -> int:
        try:
            return newest(self._cluster.jobs(self._first.namespace, self._selector), self._key)
        except ApiException as error:
            raise _refused(self._cluster.kind, self._first, error) from error

    # --- the same work of another run ---------------------------------------------------------------------------------

    def _others(self) -> list[dict[str, Any]]:
        """Jobs of the same work (and store) of other runs that are not over, the oldest first."""
        try:
            found = self._cluster.jobs(self._first.namespace, f"{LABEL}key={self._key}")
        except ApiException as error:
            raise _refused(self._cluster.kind, self._first, error) from error
        run = self._first.labels[f"{LABEL}run"]
        live = [
            job
            for job in found
            if job["metadata"]["labels"].get(f"{LABEL}run") != run
            and not has_ended(job)
            and not job["metadata"].get("deletionTimestamp")
        ]
        return sorted(live, key=_age)

    def _follow_others(self) -> bool:
        """Follows the jobs that other runs have for this work, until one has made its result, or there is none more.

        They are theirs: none is deleted from here, whatever becomes of this launcher. Whether the result is there.
        """
        while others := self._others():
            metadata = others[0]["metadata"]
            job = replace(self._first, name=metadata["name"])
            run = metadata["labels"].get(f"{LABEL}run", "")
            log.info("training job %s/%s of run %s does the same work: following it", job.namespace, job.name, run)
            logs = JobLogs(self._cluster.api, self._cluster.kind, job.namespace)
            try:
                verdict = self._follow(job, metadata["uid"], logs)
                logs.finish(not verdict.given_up)
            finally:
                logs.stop()
            if verdict.state is State.SUCCEEDED:
                return True
            if verdict.state is State.WRONG_INPUT:
                raise InputError(verdict.reason)
            if verdict.state is State.EXPIRED:
                # it is still there, and one of our own would have to yield to it
                raise StorageFault(f"training job {job.name} of run {run}, which does the same work: {verdict.reason}")
            log.warning(
                "training job %s of run %s: %s: %s; going on from its checkpoint with a job of our own",
                job.name,
                run,
                verdict.state.value,
                verdict.reason,
            )
        return False

    def _attempt(self, job: TrainingJob) -> Verdict:
        """Creates the job, or finds it, and follows it to its end."""
        logs = JobLogs(self._cluster.api, self._cluster.kind, job.namespace)
        try:
            uid = self._create(job)
            if self._made_now and any(_age(other) < self._made_now for other in self._others()):
                # of two runs that began at once, one trains
                self._delete(job, uid)
                self._forget(job, [])
                return Verdict(State.YIELDED)
            verdict = self._follow(job, uid, logs)
            logs.finish(not verdict.given_up)
            if verdict.state in (State.WRONG_INPUT, State.EXPIRED, State.SUCCEEDED):
                # one that has ended stays, and the result of one that has not may be there
                self._delete(job, uid)
        finally:
            logs.stop()
        self._forget(job, list(logs.kept))
        return verdict

    # --- to its beginning ---------------------------------------------------------------------------------------------

    def _create(self, job: TrainingJob) -> str:
        """The job's uid: created, or found and ours."""
        self._current = (job.name, "")
        self._made_now = None
        found = self._wait_for_the_last_one(job)
        owned = replace(job, owner=job.owner or self._cluster.workflow(job.namespace))
        policy_made = self._cluster.create_policy(owned)
        if found is None:
            try:
                found = self._post(owned)
            except InputError:
                if policy_made:
                    self._forget(job, [])
                raise
            if found is not None:
                log.info(
                    "training job %s/%s created: %d × %d", job.namespace, job.name, job.nodes, job.processes_per_node
                )
                self._current = (job.name, found["metadata"]["uid"])
                self._made_now = _age(found)
                return str(found["metadata"]["uid"])
            # made by this process before a lost answer, or by another launcher of this run
            found = self._cluster.read(job)
        if found is None:
            return ""
        newest([found], self._key)
        log.info("training job %s/%s is there: following it", job.namespace, job.name)
        self._current = (job.name, found["metadata"]["uid"])
        return str(found["metadata"]["uid"])

    def _wait_for_the_last_one(self, job: TrainingJob) -> dict[str, Any] | None:
        """The job of that name; one that is being deleted is none, when it has gone."""
        begin = time.monotonic()
        while (found := self._cluster.read(job)) is not None:
            if not found["metadata"].get("deletionTimestamp") or has_ended(found):
                return found
            if time.monotonic() - begin > GONE_WITHIN:
                holders = ", ".join(found["metadata"].get("finalizers", ())) or "nothing that it names"
                raise StorageFault(f"training job {job.name} is being deleted, and {holders} keeps it; see its events")
            log.info("training job %s/%s is being deleted: waiting for its end", job.namespace, job.name)
            self._sleep(LOOK_EVERY)
        return None

    def _post(self, job: TrainingJob) -> dict[str, Any] | None:
        """Creates the job; None when there is one of its name. Again while the server is away or busy."""

        def once(_request_timeout: Any) -> dict[str, Any]:
            if self.canceller.cancelled:
                raise SystemExit(EXIT_CANCELLED)
            self._posting = _Posting(lambda: self._cluster.create(job))
            try:
                return self._posting.answer()
            except UrllibTimeout:
                self._given_up = True
                raise

        try:
            created: dict[str, Any] = call(once)
        except ApiException as error:
            if error.status == 409:
                return None
            raise _refused(self._cluster.kind, job, error) from error
        return created

    # --- to its end ---------------------------------------------------------------------------------------------------

    def _follow(self, job: TrainingJob, uid: str, logs: JobLogs) -> Verdict:
        """Until it is over. What a launcher before this one has seen of it counts for its patience."""
        patience = Patience(self._waiting, job.deadline_seconds, job.grace_seconds)
        last, looked, said = Verdict(State.WAITING), 0.0, set[str]()
        seen_pods: dict[str, dict[str, Any]] = {}
        while True:
            found = self._cluster.read(job)
            if found is not None and uid and found["metadata"]["uid"] != uid:
                # deleted, and made again by another launcher
                found = None
            pods = self._cluster.pods(job, uid) if found is not None else []
            logs.follow(pods)
            starting = [pod["metadata"] for pod in pods if (pod.get("status") or {}).get("phase") == "Pending"]
            asked = {metadata["name"]: metadata.get("uid", "") for metadata in starting[:MOST_ASKED]}
            warnings = self._cluster.warnings(job, uid, asked) if found is not None else []
            # two seconds after a job has failed its pods are gone, and with them what they said
            seen_pods |= {pod["metadata"]["name"]: pod for pod in pods}
            failed = found is not None and "Failed" in true_conditions(found)
            seen = self._believed(judge(found, list(seen_pods.values()) if failed else pods, warnings), pods)
            now = time.monotonic()
            if looked:
                patience.spend(last.state, now - looked)
            else:
                patience.spend(seen.state, already(found, seen.state, datetime.now(UTC)))
            verdict, looked = patience.judge(seen, job.queue), now
            cause = f"{verdict.state}{verdict.cause or verdict.reason}"
            if verdict.state is not last.state or cause not in said:
                log.info(
                    "training job %s: %s", job.name, ": ".join(filter(None, (verdict.state.value, verdict.reason)))
                )
            said.add(cause)
            last = verdict
            if verdict.over:
                if verdict.state is State.GONE and self.canceller.cancelled:
                    raise SystemExit(EXIT_CANCELLED)
                return verdict
            for warning in warnings:
                if (cause := without_counts(warning)) not in said:
                    log.warning("training job %s: %s", job.name, warning)
                    said.add(cause)
            self._sleep(LOOK_EVERY)

    def _believed(self, verdict: Verdict, pods: list[dict[str, Any]]) -> Verdict:
        """The verdict, with the result that is there or is not: a Master may be done whose Worker was never made, and a
        job that "succeeded" may have left nothing."""
        done = any((pod.get("status") or {}).get("phase") == "Succeeded" for pod in pods)
        if verdict.state in (State.FAILED, State.GONE, State.EXPIRED) or (done and not verdict.over):
            try:
                return Verdict(State.SUCCEEDED) if self._published() else verdict
            except StorageFault as error:
                # the verdict stands: a job goes on and is looked at again, one that is overdue still has to go
                log.warning("whether the result is there is not known: %s", error)
                return verdict
        if verdict.state is State.SUCCEEDED and not self._published():
            return Verdict(State.FAILED, "its Master ended with 0, and published no result; see its log")
        return verdict

    def _sleep(self, seconds: float) -> None:
        """Until a watch says something."""
        try:
            self._woken.get(timeout=seconds)
        except queue.Empty:
            return
        while not self._woken.empty():
            self._woken.get()

    def _delete(self, job: TrainingJob, uid: str) -> None:
        """Unless it has ended: it then stays, to be looked into, for as long as its ttl says."""
        found = self._cluster.read(job)
        if found is None or has_ended(found):
            return
        try:
            self._cluster.delete(job.namespace, job.name, uid)
        except ApiException as error:
            raise unanswered(error) from error
        log.info("training job %s/%s deleted", job.namespace, job.name)

    def _forget(self, job: TrainingJob, lines: list[str]) -> None:
        """The job is over: its policy goes, its last lines are kept. Neither can make it fail."""
        try:
            self._cluster.delete_policy(job.namespace, job.name)
        except (ApiException, StorageFault) as error:
            log.warning("the NetworkPolicy %s/%s is left: %s", job.namespace, job.name, error)
        if lines:
            self._keep(job.name, lines)

    # --- a cancel -----------------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """In the canceller's thread: the job is deleted at once, by what is known of it."""
        self._cancel = _Cancel(self._cluster, self._first.namespace, time.monotonic() + CANCEL_WITHIN)
        if self._current is not None:
            self._cancel.delete(*self._current)
        else:
            # this launcher has not looked yet; one before it may have left a job
            self._cancel.delete_all(self._selector, self._key)

    def sweep(self) -> None:
        """Then, when the main thread creates nothing any more: what was under way, or is left."""
        if self._posting is not None:
            self._posting.over.wait(self._cancel.left())
        if self._current is None:
            return
        self._cancel.delete_all(self._selector, self._key)
        self._cancel.delete_policy(self._current[0])
        while self._given_up and self._cancel.left() > LATE_EVERY:
            time.sleep(LATE_EVERY)
            self._cancel.delete_all(self._selector, self._key)


class _Posting:
    """The request that creates a job, in a thread of its own: a cancel can then wait for its answer."""

    def __init__(self, request: Callable[[], dict[str, Any]]) -> None:
        self._request = request
        self._answer: dict[str, Any] = {}
        self._error: Exception | None = None
        self.over = threading.Event()
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        try:
            self._answer = self._request()
        except Exception as error:  # noqa: BLE001 - raised where the answer is waited for
            self._error = error
        finally:
            self.over.set()

    def answer(self) -> dict[str, Any]:
        self.over.wait()
        if self._error is not None:
            raise self._error
        return self._answer


class _Cancel:
    """The requests of a cancel: on connections of their own, each made again until it is answered or time is up."""

    def __init__(self, cluster: Cluster, namespace: str, deadline: float) -> None:
        self._cluster = cluster
        self._namespace, self._deadline = namespace, deadline

    def left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def _until_answered(self, request: Callable[..., Any], **options: Any) -> Any:
        pause = 0.1
        while True:
            try:
                return request(**options, _request_timeout=CANCEL_TIMEOUT)
            except (ApiException, HTTPError) as error:
                if not passes(error) or self.left() < pause:
                    raise
            time.sleep(pause)
            pause = min(pause * 2, 2.0)

    def delete(self, name: str, uid: str) -> None:
        try:
            if self._cluster.delete(self._namespace, name, uid, request=self._until_answered):
                log.info("training job %s/%s deleted", self._namespace, name)
        except (ApiException, HTTPError) as error:
            log.warning(
                "training job %s/%s could not be deleted (%s): the run's exit handler or the reaper will",
                self._namespace,
                name,
                short(error),
            )

    def delete_all(self, selector: str, key: str) -> None:
        """The jobs of this work that are not over, and their policies."""
        try:
            found = self._cluster.jobs(self._namespace, selector, request=self._until_answered)
        except (ApiException, HTTPError) as error:
            log.warning("whether a training job is left is not known (%s): the exit handler will see", short(error))
            return
        for job in found:
            ours = job["metadata"].get("labels", {}).get(f"{LABEL}key") == key
            if ours and not has_ended(job) and not job["metadata"].get("deletionTimestamp"):
                self.delete(job["metadata"]["name"], job["metadata"]["uid"])
                self.delete_policy(job["metadata"]["name"])

    def delete_policy(self, name: str) -> None:
        try:
            self._cluster.delete_policy(self._namespace, name, request=self._until_answered)
        except (ApiException, HTTPError) as error:
            log.warning("the NetworkPolicy %s/%s is left: %s", self._namespace, name, short(error))


# --- a run's exit handler ---------------------------------------------------------------------------------------------


def delete_unfinished(run: str, namespace: str) -> list[str]:
    """Deletes what a run has left: jobs of either kind that are not over, and jobs' policies. The jobs' names."""
    deleted, errors = [], []
    for kind in BY_BACKEND.values():
        cluster = Cluster(kind)
        place = namespace or cluster.namespace
        try:
            jobs = cluster.jobs(place, f"{LABEL}run={label_value(run)}")
        except ApiException as error:
            # without this kind's operator there are none
            if error.status != 404:
                errors.append(error)
            continue
        for job in jobs:
            name, uid = job["metadata"]["name"], job["metadata"]["uid"]
            try:
                if not has_ended(job) and cluster.delete(place, name, uid):
                    deleted.append(name)
                cluster.delete_policy(place, name)
            except ApiException as error:
                errors.append(error)
    if errors:
        raise unanswered(errors[0])
    return deleted


# --- what the server refuses ------------------------------------------------------------------------------------------


def _age(job: Mapping[str, Any]) -> tuple[str, str]:
    """Sorts jobs by when they were made; of the same second, by their uid."""
    return str(job["metadata"].get("creationTimestamp", "")), str(job["metadata"]["uid"])


_MENDS_OF_403 = {
    "quota": "free some of the quota, or ask for less",
    "admission webhook": "mend what it names",
    "violates PodSecurity": "let the namespace's Pod Security standard allow it",
    "being terminated": "give another --namespace",
}


def _mend_of_403(error: ApiException) -> str:
    """403 has many causes, and the server's words tell them: a Role is one of them."""
    words = short(error)
    return next(
        (mend for said, mend in _MENDS_OF_403.items() if said in words), "give this account the Role zhllama-runner"
    )


def _refused(kind: JobKind, job: TrainingJob, error: ApiException, what: str = "") -> Exception:
    if error.status in (400, 403, 404, 422):
        mend = {
            403: _mend_of_403(error),
            404: f"install {kind.operator}, or check --namespace",
        }.get(error.status, "mend the job's options")
        named = f"training job {job.namespace}/{job.name}" + (f" ({what})" if what else "")
        return InputError(f"{named} was refused: {short(error)}; {mend}")
    return unanswered(error)


# --- what happens meanwhile -------------------------------------------------------------------------------------------


def _wake(
    listing: Callable[..., Any], options: dict[str, Any], woken: "queue.SimpleQueue[None]", over: threading.Event
) -> None:
    """Puts a token into `woken` for every change that a watch shows, until `over`; a broken watch begins anew, with
    everything that is there then (no resourceVersion), so nothing that happened meanwhile is missed."""
    pause = FIRST_REWATCH
    while not over.is_set():
        try:
            for _ in watch.Watch(return_type="object").stream(
                listing,
                **options,
                timeout_seconds=WATCH_SECONDS,
                _request_timeout=(kubernetes_api.TIMEOUT[0], WATCH_SECONDS + 30),
            ):
                pause = FIRST_REWATCH
                woken.put(None)
                if over.is_set():
                    return
        except (ApiException, HTTPError, OSError, ValueError, KeyError) as error:
            log.debug("watch: %s", error)
        over.wait(pause)
        pause = min(pause * 2, LONGEST_REWATCH)
