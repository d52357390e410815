"""A cancel that waits for nothing: what SIGTERM and Ctrl-C ask for is done by a thread that does nothing else.

Under Kubeflow Pipelines the step has a fraction of a second from SIGTERM on (the KFP launcher dies of the same signal).
A signal's Python handler runs in the main thread, which may be in a stalled request; the wake-up file descriptor is
written by the C handler itself: a thread reads it and deletes the job, on connections of its own. What is too late for
this is left to the pipeline's exit handler and the reaper.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, Self

from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from components.launch_training.cluster import Cluster
from zhllama.errors import EXIT_CANCELLED
from zhllama.kubernetes.api import passes, short
from zhllama.kubernetes.job_kinds import has_ended
from zhllama.retries import with_retries

log = logging.getLogger("launch")

LEAVE_WITHIN = 5.0
"""Seconds that the main thread gets to notice a cancel that has been carried out."""
CANCEL_TIMEOUT = (2.0, 3.0)
"""Of a request that carries out a cancel: to connect, and for the answer."""
CANCEL_WITHIN = 20.0
"""Seconds for which a cancel is tried; a pod's default grace period is 30."""
LATE_EVERY = 0.5
"""Seconds between two looks for a job whose creation was given up before the cancel."""


class Canceller:
    """While it is open, a cancel calls `at_once` in a thread of its own, and then, when the main thread has left the
    block (or does not leave it), `afterwards`. The block ends with SystemExit(143)."""

    def __init__(self, at_once: Callable[[], None], afterwards: Callable[[], None]) -> None:
        self._at_once, self._afterwards = at_once, afterwards
        self._left, self.cancelled = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        # signals are the main thread's: a launcher in another thread is never cancelled
        if threading.current_thread() is threading.main_thread():
            self._reading, self._writing = os.pipe()
            os.set_blocking(self._writing, False)
            self._before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._wait, name="canceller", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self._thread is None:
            return
        self._left.set()
        signal.set_wakeup_fd(self._before)
        # what was written before this is still read
        os.close(self._writing)
        self._thread.join()
        os.close(self._reading)
        if self.cancelled.is_set() and error is not None and not isinstance(error, SystemExit | KeyboardInterrupt):
            raise SystemExit(EXIT_CANCELLED) from error

    def _wait(self) -> None:
        while number := os.read(self._reading, 1):
            if number[0] in (signal.SIGTERM, signal.SIGINT):
                self.cancelled.set()
                self._at_once()
                self._left.wait(LEAVE_WITHIN)
                self._afterwards()
                if not self._left.is_set():
                    log.warning("cancelled; the main thread is stuck in a call")
                    os._exit(EXIT_CANCELLED)
                return


class Deletion:
    """The requests of a cancel: on connections of their own, each made again until it is answered or time is up."""

    def __init__(self, cluster: Cluster, namespace: str, selector: str) -> None:
        self._cluster, self._namespace, self._selector = cluster, namespace, selector
        self._deadline = time.monotonic() + CANCEL_WITHIN

    def left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def _try(self, failed: str, request: Callable[..., Any], *words: str) -> Any:
        """The answer, None where there is none: it is then said what has `failed`."""
        try:
            return request(self._namespace, *words, request=self._until_answered)
        except (ApiException, HTTPError) as error:
            log.warning(failed, short(error))
            return None

    def _until_answered(self, request: Callable[..., Any], **options: Any) -> Any:
        return with_retries(
            lambda: request(**options, _request_timeout=CANCEL_TIMEOUT), passes,
            first=0.1, longest=2.0, goes_on=lambda: self.left() > 0.1,
        )  # fmt: skip

    def delete(self, name: str, uid: str) -> None:
        job = f"training job {self._namespace}/{name}"
        failed = f"{job} could not be deleted (%s): the run's exit handler or the reaper will"
        if self._try(failed, self._cluster.delete, name, uid):
            log.info("%s deleted", job)

    def delete_all(self) -> None:
        """The jobs with those labels that are not over."""
        failed = "whether a training job is left is not known (%s): the exit handler will see"
        for job in self._try(failed, self._cluster.jobs, self._selector) or ():
            metadata = job["metadata"]
            if not has_ended(job) and not metadata.get("deletionTimestamp"):
                self.delete(metadata["name"], metadata["uid"])

    def delete_late(self) -> None:
        """What a request that was given up may still make: looked for until time is up."""
        while self.left() > LATE_EVERY:
            time.sleep(LATE_EVERY)
            self.delete_all()
