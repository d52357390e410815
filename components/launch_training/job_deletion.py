"""Deletes jobs for good: at a cancel, in the seconds that there are, and in a run's exit handler."""

import logging
import time
from collections.abc import Callable
from typing import Any

from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from components.launch_training.cluster import Cluster
from zhllama.kubernetes.api import passes, short, unanswered
from zhllama.kubernetes.job_kinds import BY_BACKEND, has_ended
from zhllama.kubernetes.names import LABEL, label_value

log = logging.getLogger("launch")

CANCEL_TIMEOUT = (2.0, 3.0)
"""Of a request that carries out a cancel: to connect, and for the answer."""
CANCEL_WITHIN = 20.0
"""Seconds for which a cancel is tried; a pod's default grace period is 30."""
LATE_EVERY = 0.5
"""Seconds between two looks for a job whose creation was given up before the cancel."""


class Deletion:
    """The requests of a cancel: on connections of their own, each made again until it is answered or time is up."""

    def __init__(self, cluster: Cluster, namespace: str, selector: str, key: str) -> None:
        self._cluster = cluster
        self._namespace, self._selector, self._key = namespace, selector, key
        self._deadline = time.monotonic() + CANCEL_WITHIN

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

    def delete_all(self) -> None:
        """The jobs of this work that are not over, and their policies."""
        try:
            found = self._cluster.jobs(self._namespace, self._selector, request=self._until_answered)
        except (ApiException, HTTPError) as error:
            log.warning("whether a training job is left is not known (%s): the exit handler will see", short(error))
            return
        for job in found:
            ours = job["metadata"].get("labels", {}).get(f"{LABEL}key") == self._key
            if ours and not has_ended(job) and not job["metadata"].get("deletionTimestamp"):
                self.delete(job["metadata"]["name"], job["metadata"]["uid"])
                self.delete_policy(job["metadata"]["name"])

    def delete_late(self) -> None:
        """What a request that was given up may still make: looked for until time is up."""
        while self.left() > LATE_EVERY:
            time.sleep(LATE_EVERY)
            self.delete_all()

    def delete_policy(self, name: str) -> None:
        try:
            self._cluster.delete_policy(self._namespace, name, request=self._until_answered)
        except (ApiException, HTTPError) as error:
            log.warning("the NetworkPolicy %s/%s is left: %s", self._namespace, name, short(error))


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
