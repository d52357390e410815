"""The same work of several runs: one of them trains, the others follow its job."""

import logging
import time
from dataclasses import replace
from typing import Any

from kubernetes.client.exceptions import ApiException

from components.launch_training.cluster import Cluster, age, refused
from components.launch_training.follower import Follower
from components.launch_training.job_state import State
from zhllama.errors import InputError, StorageFault
from zhllama.kubernetes.job_kinds import has_ended
from zhllama.kubernetes.names import LABEL
from zhllama.kubernetes.training_job import TrainingJob

log = logging.getLogger("launch")


class OtherRuns:
    """The jobs that other runs have for the work of `job` (and its store)."""

    def __init__(self, cluster: Cluster, follower: Follower, job: TrainingJob) -> None:
        self._cluster, self._follower, self._first = cluster, follower, job
        self._key = job.labels[f"{LABEL}key"]

    def live(self) -> list[dict[str, Any]]:
        """Jobs of the same work (and store) of other runs that are not over, the oldest first."""
        try:
            found = self._cluster.jobs(self._first.namespace, f"{LABEL}key={self._key}")
        except ApiException as error:
            raise refused(self._cluster.kind, self._first, error) from error
        run = self._first.labels[f"{LABEL}run"]
        live = [
            job
            for job in found
            if job["metadata"]["labels"].get(f"{LABEL}run") != run
            and not has_ended(job)
            and not job["metadata"].get("deletionTimestamp")
        ]
        return sorted(live, key=age)

    def follow(self) -> bool:
        """Follows the jobs that other runs have for this work, until one has made its result, or there is none more.

        They are theirs: none is deleted from here, whatever becomes of this launcher. Whether the result is there.
        """
        while others := self.live():
            metadata = others[0]["metadata"]
            job = replace(self._first, name=metadata["name"])
            run = metadata["labels"].get(f"{LABEL}run", "")
            log.info("training job %s/%s of run %s does the same work: following it", job.namespace, job.name, run)
            verdict, _ = self._follower.follow(job, metadata["uid"])
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

    def have_left(self) -> bool:
        """Waits until no pod of another run's job for this work is there, for the grace period at most: pods outlive a
        job that was deleted, and write their last checkpoint. False where another run has a job for it by now."""
        until, said = time.monotonic() + self._first.grace_seconds, ""
        while pods := self._pods():
            if self.live():
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

    def _pods(self) -> list[str]:
        """Pods of other runs' jobs for this work that may still write."""
        run = self._first.labels[f"{LABEL}run"]
        return [
            pod["metadata"]["name"]
            for pod in self._cluster.pods_of(self._first.namespace, f"{LABEL}key={self._key}")
            if pod["metadata"]["labels"].get(f"{LABEL}run") != run
            and (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")
        ]
