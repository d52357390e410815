"""A cancel that waits for nothing: what SIGTERM and Ctrl-C ask for is done by a thread that does nothing else.

Under Kubeflow Pipelines the step's container has a fraction of a second from SIGTERM on (the KFP launcher dies of the
same signal). Python runs a signal's handler between two steps of the main thread, which may be in the middle of a name
look-up, a stalled request or somebody's clean-up, where the exception of a handler may even get lost. The wake-up file
descriptor, though, is written by the C handler itself, whatever the main thread does: a thread reads it and deletes the
job at once, on connections of its own, while the main thread is on its way out. What is too late for this is left to
the pipeline's exit handler and the reaper.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from zhllama.errors import EXIT_CANCELLED

log = logging.getLogger("launch")

LEAVE_WITHIN = 5.0
"""Seconds that the main thread gets to notice a cancel that has been carried out."""


class Canceller:
    """While it is open, a cancel calls `at_once` in a thread of its own, and then, when the main thread has left the
    block (or does not leave it), `afterwards`. The block ends with SystemExit(143)."""

    def __init__(self, at_once: Callable[[], None], afterwards: Callable[[], None]) -> None:
        self._at_once, self._afterwards = at_once, afterwards
        self._left = threading.Event()
        self._thread: threading.Thread | None = None
        self._begun = threading.Event()

    @property
    def cancelled(self) -> bool:
        return self._begun.is_set()

    def __enter__(self) -> Self:
        # signals are the main thread's: a launcher in another thread is never cancelled
        if threading.current_thread() is threading.main_thread():
            self._reading, self._writing = os.pipe()
            os.set_blocking(self._writing, False)
            self._before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._wait, name="canceller", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        self._left.set()
        signal.set_wakeup_fd(self._before)
        # what was written before this is still read
        os.close(self._writing)
        self._thread.join()
        os.close(self._reading)
        if self.cancelled and error is not None and not isinstance(error, SystemExit | KeyboardInterrupt):
            raise SystemExit(EXIT_CANCELLED) from error

    def _wait(self) -> None:
        while number := os.read(self._reading, 1):
            if number[0] in (signal.SIGTERM, signal.SIGINT):
                self._begun.set()
                self._at_once()
                self._left.wait(LEAVE_WITHIN)
                self._afterwards()
                if not self._left.is_set():
                    log.warning("cancelled; the main thread is stuck in a call")
                    os._exit(EXIT_CANCELLED)
                return
