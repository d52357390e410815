"""The end of a training at its job's deadline, kept by the training itself.

The training operator sets no timer for activeDeadlineSeconds (seen with 1.9: a quiet job was not ended after 150 s of a
deadline of 8): a job fails by it only when something else touches it. The launcher looks, where there is one; people
who `kubectl apply` have none. So a pod is told the deadline (ZHLLAMA_DEADLINE_SECONDS), and at it the training does
what it does on SIGTERM: it writes a checkpoint and ends, with exit code 1 and a line that says why; the end of the
container wakes the operator, which then fails the job. A container that is started again in its pod counts from the
first start (a file in /tmp, the pod's volume); a pod that is replaced counts anew.
"""

import logging
import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from zhllama.errors import InputError, StorageFault
from zhllama.kubernetes.pod_environment import DEADLINE_VARIABLE

log = logging.getLogger("training")

STARTED = "zhllama-started"
"""The file with the time of the first start, in seconds since 1970."""


class Deadline:
    """While it is open, this process is told to stop when its deadline comes. StorageFault then takes the place of the
    cancel, and is raised at once where the deadline has passed already. InputError for a deadline that is no number."""

    def __init__(self) -> None:
        given = os.environ.get(DEADLINE_VARIABLE, "")
        if given and not (given.isascii() and given.isdigit() and int(given) > 0):
            raise InputError(f"{DEADLINE_VARIABLE}={given}: write whole seconds above 0, or unset it")
        self._seconds = int(given or 0)
        self._passed = threading.Event()
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Self:
        if self._seconds:
            left = self._seconds - (time.time() - _first_start())
            if left <= 0:
                raise StorageFault(self._line())
            self._timer = threading.Timer(left, self._stop)
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if error is not None and self._passed.is_set() and not isinstance(error, InputError):
            raise StorageFault(self._line()) from error

    def _stop(self) -> None:
        self._passed.set()
        log.warning("the deadline of %d s is here: stopping", self._seconds)
        os.kill(os.getpid(), signal.SIGTERM)

    def late(self) -> str:
        """The line that says that the deadline has passed, "" before it has."""
        return self._line() if self._passed.is_set() else ""

    def _line(self) -> str:
        return (
            f"the training was stopped at its deadline of {self._seconds} s; raise --deadline-seconds: it goes on from "
            "its newest checkpoint"
        )


def _first_start() -> float:
    """When this pod's training was first started."""
    place = Path(tempfile.gettempdir(), STARTED)
    try:
        return float(place.read_text())
    except (OSError, ValueError):
        now = time.time()
        place.write_text(str(now))
        return now
