"""A training job on a cluster: created once, followed to its end, deleted on a cancel.

Its name is a function of run, stage and attempt: a launcher that starts again, or a second one, finds it by that and
follows it. Nothing is remembered but on the API server. Of several runs with the same work one trains, and the others
follow its job.
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

from components.launch_training.cancel import Canceller, Deletion
from components.launch_training.cluster import Cluster, age, refused
from components.launch_training.follower import Follower
from components.launch_training.job_state import State, Verdict, in_time, newest
from zhllama.errors import EXIT_CANCELLED, InputError, StorageFault
from zhllama.kubernetes.api import call, short, unanswered
from zhllama.kubernetes.job_kinds import has_ended
from zhllama.kubernetes.names import LABEL
from zhllama.kubernetes.refusals import wants_room
from zhllama.kubernetes.training_job import TrainingJob

log = logging.getLogger("launch")

GONE_WITHIN = 600.0
"""Seconds for which a job of our name that is being deleted is waited for."""
QUOTA_EVERY, QUOTA_SAID_EVERY = 15.0, 60.0
"""Seconds after which a namespace without room for the job is asked again, and after which that is said again."""


class Launch:
    """The attempts at one stage of a run, each `job_of(attempt)`, with its namespace.

    waiting_seconds: for how long a job may wait; 0: for ever. starting_seconds: for how long by what no waiting
    mends; 0: no other. keep: gets each job's name and last lines at its end.
    published: whether the result is there: a job's success says no more than that its Master ended with 0.
    """

    def __init__(
        self,
        cluster: Cluster,
        job_of: Callable[[int], TrainingJob],
        waiting_seconds: float,
        keep: Callable[[str, list[str]], None],
        published: Callable[[], bool],
        starting_seconds: float = 0,
    ) -> None:
        self._cluster, self._job_of, self._keep, self._published = cluster, job_of, keep, published
        self._first = job_of(1)
        labels = self._first.labels
        self._run, self._key = labels[f"{LABEL}run"], labels[f"{LABEL}key"]
        self._selector = ",".join(f"{LABEL}{name}={labels[f'{LABEL}{name}']}" for name in ("run", "stage"))
        self.canceller = Canceller(self.cancel, self.sweep)
        self._follower = Follower(
            cluster, waiting_seconds, published, self.canceller.cancelled.is_set, starting_seconds
        )
        self._waiting = waiting_seconds
        self._no_room_since = self._no_room_said = 0.0
        """When (of time.monotonic) a quota kept the job out first, and when that was said; 0: it does not."""
        # what a cancel has to know, and may read at any moment
        self._current: tuple[str, str] | None = None
        self._posting: Future[dict[str, Any]] | None = None
        self._given_up = False
        """Whether a request to create a job was not answered in time: the server may still be at it."""
        self._deletion: Deletion

    def run(self, attempts: int) -> None:
        """To the success of one of so many attempts, or of another run's job for the same work. InputError when the
        training says that its input is wrong, StorageFault when the job fails, is deleted, or waits for too long. On
        SIGTERM and Ctrl-C the job is deleted before anything else."""
        # the same work of another run, too
        with self.canceller, self._follower.watching(self._first.namespace, f"{LABEL}key={self._key}"):
            attempt = max(1, self._newest())
            while not (self._follow_others() or self._published()):
                job = self._job_of(attempt)
                verdict = self._attempt(job)
                state, reason, ours = verdict.state, verdict.reason, f"training job {job.name}"
                if state is State.SUCCEEDED:
                    return
                if state is State.WRONG_INPUT:
                    raise InputError(reason)
                if state is State.YIELDED:
                    continue
                if state is State.NO_ROOM:
                    self._wait_for_room(job, reason)
                    continue
                if state in (State.GONE, State.EXPIRED):
                    raise StorageFault(f"{ours}: {reason}")
                if attempt >= attempts:
                    raise StorageFault(f"{ours} failed: {reason}")
                log.warning("%s failed (attempt %d of %d): %s", ours, attempt, attempts, reason)
                # another launcher of this run may be ahead
                attempt = max(attempt + 1, self._newest())

    def _newest(self) -> int:
        return newest(self._jobs(self._selector), self._key)

    def _jobs(self, selector: str) -> list[dict[str, Any]]:
        try:
            return self._cluster.jobs(self._first.namespace, selector)
        except ApiException as error:
            raise refused(self._cluster.kind, self._first, error) from error

    def _attempt(self, job: TrainingJob) -> Verdict:
        """Creates the job, or finds it, and follows it to its end."""
        if self._cluster.read(job) is None and not self._others_have_left():
            return Verdict(State.YIELDED)
        try:
            ours = self._create(job)
        except ApiException as error:
            return Verdict(State.NO_ROOM, short(error))
        uid = ours["metadata"]["uid"] if ours else ""
        waited = time.monotonic() - self._no_room_since if self._no_room_since else 0.0
        self._no_room_since = self._no_room_said = 0.0

        def yields() -> bool:
            # of two runs that began at once, one trains. One look is not enough: the times of the server are whole
            # seconds, so the job that is made after this one may count as the older
            return ours is not None and any(age(other) < age(ours) for other in self._others())

        verdict, lines = self._follower.follow(job, uid, yields, waited)
        if verdict.state in (State.WRONG_INPUT, State.EXPIRED, State.SUCCEEDED, State.YIELDED):
            # one that has ended stays, to be looked into; the result of one that has not may be there
            found = self._cluster.read(job)
            if found is not None and not has_ended(found):
                try:
                    self._cluster.delete(job.namespace, job.name, uid)
                except ApiException as error:
                    raise unanswered(error) from error
                log.info("training job %s/%s deleted", job.namespace, job.name)
        if lines:
            self._keep(job.name, lines)
        return verdict

    # --- to its beginning ---------------------------------------------------------------------------------------------

    def _create(self, job: TrainingJob) -> dict[str, Any] | None:
        """The job: created, or found and ours. None where it is gone; ApiException where a quota has no room for it. A
        job that is not made leaves nothing behind."""
        self._current = (job.name, "")
        found, said = self._wait_for_the_last_one(job), "is there: following it"
        newest([found] if found else [], self._key)
        if found is None:
            found = self._post(replace(job, owner=self._cluster.workflow(job.namespace)))
            said = f"created: {job.nodes} × {job.processes_per_node}" if found else said
        if found is None:
            if (found := self._cluster.read(job)) is None:
                # it was made by this process before a lost answer, or by another launcher of this run, and has gone
                return None
            newest([found], self._key)
            if found["metadata"].get("deletionTimestamp") and not has_ended(found):
                return self._create(job)
        if not has_ended(found):
            try:
                self._cluster.create_policy(job, found)
            except (ApiException, InputError, StorageFault):
                # no second half an hour, where the server is away by now
                deletion = Deletion(self._cluster, job.namespace, self._selector)
                deletion.delete(job.name, found["metadata"]["uid"])
                raise
        log.info("training job %s/%s %s", job.namespace, job.name, said)
        self._current = (job.name, found["metadata"]["uid"])
        return found

    def _wait_for_room(self, job: TrainingJob, reason: str) -> None:
        """Until it is time to ask again whether a quota has room for the job. It waits as its pods would."""
        now = time.monotonic()
        self._no_room_since = self._no_room_since or now
        waits = Verdict(State.WAITING, f"not created: {reason}")
        verdict = in_time(waits, now - self._no_room_since, job, self._waiting)
        if verdict.over:
            raise StorageFault(f"training job {job.name}: {verdict.reason}")
        if not self._no_room_said or now - self._no_room_said >= QUOTA_SAID_EVERY:
            self._no_room_said = now
            log.warning("training job %s: waiting: %s", job.name, waits.reason)
        self._follower.sleep(QUOTA_EVERY)
        if self.canceller.cancelled.is_set():
            raise SystemExit(EXIT_CANCELLED)

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

        def once(_request_timeout: tuple[float, float]) -> dict[str, Any]:
            """In a thread of its own: a cancel can then wait for the answer."""
            if self.canceller.cancelled.is_set():
                raise SystemExit(EXIT_CANCELLED)
            self._posting = answer = Future[dict[str, Any]]()

            def work() -> None:
                try:
                    answer.set_result(self._cluster.create(job, _request_timeout))
                except Exception as error:  # noqa: BLE001 - raised where the answer is waited for
                    answer.set_exception(error)

            threading.Thread(target=work, daemon=True).start()
            try:
                return answer.result()
            except UrllibTimeout:
                self._given_up = True
                raise

        try:
            created: dict[str, Any] = call(once)
        except ApiException as error:
            if error.status == 409:
                return None
            if wants_room(error):
                raise
            raise refused(self._cluster.kind, job, error) from error
        return created

    # --- the same work of other runs ----------------------------------------------------------------------------------

    def _of_another(self, thing: dict[str, Any]) -> bool:
        return bool(thing["metadata"]["labels"].get(f"{LABEL}run") != self._run)

    def _others(self) -> list[dict[str, Any]]:
        """Their jobs for it that are not over, the oldest first."""
        found = filter(self._of_another, self._jobs(f"{LABEL}key={self._key}"))
        live = [job for job in found if not has_ended(job) and not job["metadata"].get("deletionTimestamp")]
        return sorted(live, key=age)

    def _follow_others(self) -> bool:
        """Follows their jobs until one has made the result, or there is none more. They are theirs: none is deleted
        from here, whatever becomes of this launcher. Whether the result is there."""
        while others := self._others():
            metadata = others[0]["metadata"]
            job = replace(self._first, name=metadata["name"])
            run = metadata["labels"].get(f"{LABEL}run", "")
            log.info("training job %s/%s of run %s does the same work: following it", job.namespace, job.name, run)
            verdict, _ = self._follower.follow(job, metadata["uid"])
            if verdict.state is State.SUCCEEDED:
                return True
            if verdict.state is State.WRONG_INPUT:
                raise InputError(verdict.reason)
            theirs, ended = f"training job {job.name} of run {run}", f"{verdict.state.value}: {verdict.reason}"
            if verdict.state is State.EXPIRED:
                # it is still there, and one of our own would have to yield to it
                raise StorageFault(f"{theirs}, which does the same work: {verdict.reason}")
            log.warning("%s: %s; going on from its checkpoint with a job of our own", theirs, ended)
        return False

    def _others_have_left(self) -> bool:
        """Waits until none of their pods for it may still write, for the grace period at most: pods outlive a job that
        was deleted, and write their last checkpoint. False where another run has a job for it by now."""
        until, said = time.monotonic() + self._first.grace_seconds, ""
        while pods := [
            pod["metadata"]["name"]
            for pod in filter(self._of_another, self._cluster.pods_of(self._first.namespace, f"{LABEL}key={self._key}"))
            if (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")
        ]:
            if self._others():
                return False
            left = until - time.monotonic()
            if left <= 0:
                log.warning("pod %s is still there after its grace period: going on without its checkpoint", pods[0])
                return True
            if said != pods[0]:
                said = pods[0]
                log.info("pod %s of another run does the same work, and is on its way out: waiting for its end", said)
            self._follower.sleep(left)
        return True

    # --- a cancel -----------------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """In the canceller's thread: the job is deleted at once, by what is known of it."""
        self._follower.wake()
        self._deletion = Deletion(self._cluster, self._first.namespace, f"{self._selector},{LABEL}key={self._key}")
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
        if self._given_up:
            self._deletion.delete_late()
