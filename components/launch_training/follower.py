"""Follows a job to its end: looks, judges (job_state.py), sleeps until something changes.

Watches on the job and its pods only wake the loop: one that breaks or misses an event costs LOOK_EVERY seconds at most.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from kubernetes import watch

from components.launch_training.cluster import Cluster
from components.launch_training.job_log import JobLogs
from components.launch_training.job_state import State, Verdict, already, in_time, judge, repeats, without_counts
from zhllama.errors import EXIT_CANCELLED, InputError, StorageFault
from zhllama.kubernetes import api as kubernetes_api
from zhllama.kubernetes.job_kinds import true_conditions
from zhllama.kubernetes.training_job import TrainingJob

log = logging.getLogger("launch")

LOOK_EVERY = 60.0
"""Seconds after which the job is looked at even if no watch said anything."""
WATCH_SECONDS = 300
"""How long a watch lasts. The API server ends it then, and it begins anew."""
FIRST_REWATCH, LONGEST_REWATCH = 0.5, 15.0
"""Seconds between a watch's end and the next one."""
SETTLED = 3.0
"""Seconds after which a job is looked at again in any case: another run's of the same second is there by then."""
REFUSED_WITHIN = 300.0
"""Seconds for which an account that could look at its job may be refused to: an API server that has just started knows
no Role yet, and one that is applied anew is away for a moment."""
REFUSED_EVERY = 5.0
"""Seconds after which it then looks again."""
MOST_ASKED = 8
"""Pods that do not start whose events are read: they mostly say the same."""


class Follower:
    """Follows jobs of one piece of work. Arguments as Launch's; cancelled: whether it has deleted the job itself."""

    def __init__(
        self,
        cluster: Cluster,
        waiting_seconds: float,
        published: Callable[[], bool],
        cancelled: Callable[[], bool],
        starting_seconds: float = 0,
    ) -> None:
        self._cluster, self._waiting, self._starting = cluster, waiting_seconds, starting_seconds
        self._published, self._cancelled = published, cancelled
        self._woken, self._over = threading.Event(), threading.Event()

    @contextmanager
    def watching(self, namespace: str, selector: str) -> Iterator[None]:
        """While it is open, a change of the jobs with those labels, or of their pods, ends a sleep."""
        for listing, options in self._cluster.watches(namespace, selector):
            threading.Thread(target=self._watch, args=(listing, options), daemon=True).start()
        try:
            yield
        finally:
            self._over.set()

    def _watch(self, listing: Callable[..., Any], options: dict[str, Any]) -> None:
        """A broken watch begins anew with all that is there then (no resourceVersion), so nothing is missed."""
        pause = FIRST_REWATCH
        while not self._over.is_set():
            try:
                timeout = (kubernetes_api.TIMEOUT[0], WATCH_SECONDS + 30)
                more = {**options, "timeout_seconds": WATCH_SECONDS, "_request_timeout": timeout}
                for _ in watch.Watch(return_type="object").stream(listing, **more):
                    pause = FIRST_REWATCH
                    self._woken.set()
                    if self._over.is_set():
                        return
            except Exception as error:  # noqa: BLE001 - a watch only saves time, whatever is answered
                log.debug("watch: %s", error)
            self._over.wait(pause)
            pause = min(pause * 2, LONGEST_REWATCH)

    def sleep(self, most: float = LOOK_EVERY) -> None:
        """Until a watch says something, or it is time to look: after so many seconds at most."""
        self._woken.wait(min(most, LOOK_EVERY))
        self._woken.clear()

    def wake(self) -> None:
        """Ends a sleep."""
        self._woken.set()

    def follow(
        self, job: TrainingJob, uid: str, yields: Callable[[], bool] = lambda: False, waited: float = 0
    ) -> tuple[Verdict, list[str]]:
        """Follows a job until it is over, its logs passed on: how it ended, and its last lines. yields: whether it is
        to be given up for another one; asked at each look. waited: seconds before it was there."""
        logs = JobLogs(self._cluster.api, self._cluster.kind, job.namespace)
        try:
            verdict = self._judge_until_over(job, uid, logs, yields, waited)
            # the launcher may have seen enough of a job that itself goes on
            logs.finish(verdict.state not in (State.EXPIRED, State.WRONG_INPUT, State.YIELDED))
            if verdict.state is State.FAILED and not logs.followed:
                log.warning("training job %s: no line of its log was heard: no pod of it was seen to run", job.name)
        finally:
            logs.stop()
        return verdict, list(logs.kept)

    def _judge_until_over(
        self, job: TrainingJob, uid: str, logs: JobLogs, yields: Callable[[], bool], waited: float
    ) -> Verdict:
        """What a launcher before this one has seen of it counts for its deadlines."""
        state, looked, said = State.WAITING, 0.0, set[str]()
        spent, stuck, stuck_for = dict.fromkeys(State, 0.0), False, 0.0
        spent[State.WAITING] = waited
        seen_pods: dict[str, dict[str, Any]] = {}
        settled = time.monotonic() + SETTLED
        refused_since = 0.0

        def refused(error: InputError) -> None:
            """Sleeps until it is time to look again; the error itself once it has lasted."""
            nonlocal refused_since
            now = time.monotonic()
            if not looked or now - (refused_since or now) > REFUSED_WITHIN:
                raise error
            if not refused_since:
                log.warning("training job %s: %s; looking again for %.0f s", job.name, error, REFUSED_WITHIN)
            refused_since = refused_since or now
            self.sleep(REFUSED_EVERY)

        while True:
            pods, told_by, warnings = [], [], list[str]()
            try:
                found = self._cluster.read(job)
                if found is not None:
                    # of an unknown uid: the one that is there
                    uid = uid or found["metadata"]["uid"]
                    # another one: deleted, and made again by another launcher
                    found = found if found["metadata"]["uid"] == uid else None
                if found is not None:
                    pods = told_by = self._cluster.pods(job, uid)
                    logs.follow(pods)
                    # two seconds after a job has failed its pods are gone, and with them what they said
                    seen_pods |= {pod["metadata"]["name"]: pod for pod in pods}
                    if "Failed" in true_conditions(found):
                        told_by = list(seen_pods.values())
                    pending = [
                        pod["metadata"] for pod in told_by if (pod.get("status") or {}).get("phase") == "Pending"
                    ]
                    asked = {metadata["name"]: metadata.get("uid", "") for metadata in pending[:MOST_ASKED]}
                    warnings = self._cluster.warnings(job, uid, asked)
            except InputError as error:
                refused(error)
                continue
            seen = self._believed(judge(found, told_by, warnings), pods)
            now = time.monotonic()
            if looked:
                spent[state] += now - looked
                stuck_for += now - looked if stuck else 0.0
                if seen.state is State.RUNNING:
                    # what keeps it after a restart is another matter
                    stuck_for = 0.0
            else:
                spent[seen.state] += already(found, seen.state, datetime.now(UTC))
            verdict = in_time(seen, spent[seen.state], job, self._waiting, stuck_for, self._starting)
            looked, stuck = now, seen.stuck
            cause = f"{verdict.state}{verdict.cause or verdict.reason}"
            if verdict.state is not state or cause not in said:
                reason = f": {verdict.reason}" if verdict.reason else ""
                level = logging.WARNING if verdict.kept else logging.INFO
                log.log(level, "training job %s: %s%s", job.name, verdict.state.value, reason)
            said.add(cause)
            state = verdict.state
            if verdict.over:
                if state is State.GONE and self._cancelled():
                    raise SystemExit(EXIT_CANCELLED)
                return verdict
            try:
                if yields():
                    return Verdict(State.YIELDED)
            except InputError as error:
                refused(error)
                continue
            refused_since = 0.0
            for warning in warnings:
                if (cause := without_counts(warning)) not in said:
                    said.add(cause)
                    if not repeats(warning, verdict):
                        log.warning("training job %s: %s", job.name, warning)
            left = settled - time.monotonic()
            self.sleep(left if left > 0 else LOOK_EVERY)

    def _believed(self, verdict: Verdict, pods: list[dict[str, Any]]) -> Verdict:
        """The verdict, with the result that is there or is not: a Master may be done whose Worker was never made, and a
        job that "succeeded" may have left nothing."""
        if verdict.state is State.SUCCEEDED:
            left_nothing = "its Master ended with 0, and published no result; see its log"
            return verdict if self._published() else Verdict(State.FAILED, left_nothing)
        done = any((pod.get("status") or {}).get("phase") == "Succeeded" for pod in pods)
        if verdict.state in (State.FAILED, State.GONE, State.EXPIRED) or (done and not verdict.over):
            try:
                return Verdict(State.SUCCEEDED) if self._published() else verdict
            except StorageFault as error:
                # the verdict stands: a job goes on and is looked at again, one that is overdue still has to go
                log.warning("whether the result is there is not known: %s", error)
        return verdict
