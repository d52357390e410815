"""A training job on a cluster: created once, followed to its end, deleted on a cancel.

The job's name is a function of run, stage and attempt: a launcher that starts again, or a second one, finds the job by
it and goes on following. Nothing is remembered but on the API server.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import replace
from typing import Any

from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import TimeoutError as UrllibTimeout

from components.launch_training.cancel import Canceller
from components.launch_training.cluster import Cluster, age, refused
from components.launch_training.follower import Follower
from components.launch_training.job_deletion import Deletion
from components.launch_training.job_state import State, Verdict, newest
from components.launch_training.shared_work import OtherRuns
from zhllama.errors import EXIT_CANCELLED, InputError, StorageFault
from zhllama.kubernetes.api import call, unanswered
from zhllama.kubernetes.job_kinds import has_ended
from zhllama.kubernetes.names import LABEL
from zhllama.kubernetes.training_job import TrainingJob

log = logging.getLogger("launch")

GONE_WITHIN = 600.0
"""Seconds for which a job of our name that is being deleted is waited for."""


def run_on_cluster(
    cluster: Cluster,
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
        self._cluster, self._job_of, self._keep = cluster, job_of, keep
        self._published = published
        self._first = job_of(1)
        labels = self._first.labels
        self._key = labels[f"{LABEL}key"]
        self._selector = ",".join(f"{LABEL}{name}={labels[f'{LABEL}{name}']}" for name in ("run", "stage"))
        self._follower = Follower(cluster, waiting_seconds, published, lambda: self.canceller.cancelled)
        self._others = OtherRuns(cluster, self._follower, self._first)
        # what a cancel has to know, and may read at any moment
        self._current: tuple[str, str] | None = None
        self._posting: Future[dict[str, Any]] | None = None
        self._given_up = False
        """Whether a request to create a job was not answered in time: the server may still be at it."""
        self._deletion: Deletion

    def run(self, attempts: int) -> None:
        """To the success of one attempt; see `run_on_cluster`."""
        # the same work of another run, too
        self._follower.watch(self._first.namespace, f"{LABEL}key={self._key}")
        try:
            attempt = max(1, self._newest())
            while True:
                if self._others.follow() or self._published():
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
            self._follower.stop()

    def _newest(self) -> int:
        try:
            return newest(self._cluster.jobs(self._first.namespace, self._selector), self._key)
        except ApiException as error:
            raise refused(self._cluster.kind, self._first, error) from error

    def _attempt(self, job: TrainingJob) -> Verdict:
        """Creates the job, or finds it, and follows it to its end."""
        if self._cluster.read(job) is None and not self._others.have_left():
            return Verdict(State.YIELDED)
        own = self._create(job)
        uid = own[1]

        def yields() -> bool:
            # of two runs that began at once, one trains. One look is not enough: the times of the server are whole
            # seconds, so the job that is made after this one may count as the older
            return bool(uid) and any(age(other) < own for other in self._others.live())

        verdict, lines = self._follower.follow(job, uid, yields)
        if verdict.state in (State.WRONG_INPUT, State.EXPIRED, State.SUCCEEDED, State.YIELDED):
            # one that has ended stays, and the result of one that has not may be there
            self._delete(job, uid)
        self._forget(job, lines)
        return verdict

    # --- to its beginning ---------------------------------------------------------------------------------------------

    def _create(self, job: TrainingJob) -> tuple[str, str]:
        """The job's age, with its uid: created, or found and ours. Both "" where it is gone."""
        self._current = (job.name, "")
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
                return age(found)
            # made by this process before a lost answer, or by another launcher of this run
            found = self._cluster.read(job)
        if found is None:
            return "", ""
        newest([found], self._key)
        log.info("training job %s/%s is there: following it", job.namespace, job.name)
        self._current = (job.name, found["metadata"]["uid"])
        return age(found)

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
            self._follower.sleep()
        return None

    def _post(self, job: TrainingJob) -> dict[str, Any] | None:
        """Creates the job; None when there is one of its name. Again while the server is away or busy."""

        def once(_request_timeout: Any) -> dict[str, Any]:
            if self.canceller.cancelled:
                raise SystemExit(EXIT_CANCELLED)
            self._posting = in_a_thread(lambda: self._cluster.create(job))
            try:
                return self._posting.result()
            except UrllibTimeout:
                self._given_up = True
                raise

        try:
            created: dict[str, Any] = call(once)
        except ApiException as error:
            if error.status == 409:
                return None
            raise refused(self._cluster.kind, job, error) from error
        return created

    # --- its end ------------------------------------------------------------------------------------------------------

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
        self._deletion = Deletion(self._cluster, self._first.namespace, self._selector, self._key)
        if self._current is not None:
            self._deletion.delete(*self._current)
        else:
            # this launcher has not looked yet; one before it may have left a job
            self._deletion.delete_all()

    def sweep(self) -> None:
        """Then, when the main thread creates nothing any more: what was under way, or is left."""
        if self._posting is not None:
            wait([self._posting], self._deletion.left())
        if self._current is None:
            return
        self._deletion.delete_all()
        self._deletion.delete_policy(self._current[0])
        if self._given_up:
            self._deletion.delete_late()


def in_a_thread(request: Callable[[], dict[str, Any]]) -> "Future[dict[str, Any]]":
    """The request that creates a job, in a thread of its own: a cancel can then wait for its answer."""
    answer: Future[dict[str, Any]] = Future()

    def work() -> None:
        try:
            answer.set_result(request())
        except Exception as error:  # noqa: BLE001 - raised where the answer is waited for
            answer.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return answer
