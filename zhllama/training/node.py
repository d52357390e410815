"""The agent of a node: while it waits for others it says so, a cancel ends it at once, and its deadline holds.

In the rendezvous, and in a worker's init_process_group, the main thread is in a call of C++, where no signal handler of
Python's runs (on a real cluster a cancelled pod stayed for 300 seconds). The C handler writes each signal into a pipe,
whatever the main thread does, and a thread reads it. Before the first step nothing is to be saved, so that thread ends
the workers and the process; after it the agent passes SIGTERM on, and the workers write a checkpoint.

The training operator (1.9) sets no timer for activeDeadlineSeconds: a job fails by it only when something else touches
it. So a pod is told the deadline (ZHLLAMA_DEADLINE_SECONDS), and at it the training does what it does on SIGTERM, and
ends with exit code 1 and a line that says why; that wakes the operator. A container that is started again in its pod
counts from the first start (a file in /tmp, the pod's volume); a pod that is replaced counts anew.
"""

import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Self

from zhllama.errors import EXIT_CANCELLED, EXIT_FAULT, InputError, StorageFault
from zhllama.kubernetes.pod_environment import DEADLINE_VARIABLE
from zhllama.stage.log import leave_last_line

log = logging.getLogger("training")

FIRST_START = "zhllama-started"
"""The file with the time of a pod's first start, in seconds since 1970."""
STARTED, TRAINING = "started-", "training-"
"""Files that a worker leaves in the agent's folder, with its process id: it is there; its first step has begun."""
FOLDER_VARIABLE = "ZHLLAMA_AGENT_FOLDER"
"""Tells a worker that folder."""


class Deadline:
    """While it is open, this process is told to stop when its deadline comes. StorageFault then takes the place of the
    cancel, and is raised at once where the deadline has passed already. InputError for a deadline that is no number."""

    def __init__(self) -> None:
        given = os.environ.get(DEADLINE_VARIABLE, "")
        if given and not (given.isascii() and given.isdigit() and int(given) > 0):
            raise InputError(f"{DEADLINE_VARIABLE}={given}: write whole seconds above 0, or unset it")
        self._seconds = int(given or 0)
        self._timer = threading.Timer(0, self._stop)
        said = f"the training was stopped at its deadline of {self._seconds} s"
        self.line = f"{said}; raise --deadline-seconds: it goes on from its newest checkpoint"
        self.passed = False

    def __enter__(self) -> Self:
        if self._seconds:
            place = Path(tempfile.gettempdir(), FIRST_START)
            try:
                started = float(place.read_text())
            except (OSError, ValueError):
                started = time.time()
                place.write_text(str(started))
            left = self._seconds - (time.time() - started)
            if left <= 0:
                raise StorageFault(self.line)
            self._timer.interval, self._timer.daemon = left, True
            self._timer.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._timer.cancel()
        if error is not None and self.passed and not isinstance(error, InputError):
            raise StorageFault(self.line) from error

    def _stop(self) -> None:
        self.passed = True
        log.warning("the deadline of %d s is here: stopping", self._seconds)
        os.kill(os.getpid(), signal.SIGTERM)


class Node:
    """This node, from the rendezvous on. folder: the agent's own, where its workers leave files; say_every: seconds
    between two lines about what is waited for."""

    def __init__(self, folder: Path, nodes: int, deadline: Deadline, say_every: float = 60.0) -> None:
        self._folder, self._nodes, self._deadline, self._say_every = folder, nodes, deadline, say_every
        self._begun = time.monotonic()
        self._over = threading.Event()

    def __enter__(self) -> Self:
        os.environ[FOLDER_VARIABLE] = str(self._folder)
        if self._nodes > 1:
            threading.Thread(target=self._say, daemon=True).start()
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        threading.Thread(target=self._wait, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._over.set()
        os.environ.pop(FOLDER_VARIABLE, None)
        signal.set_wakeup_fd(self._before)
        os.close(self._writing)

    def not_found(self, error: BaseException) -> str:
        """What it means that the rendezvous failed."""
        waited = time.monotonic() - self._begun
        if self._nodes == 1 or self._workers(STARTED):
            return f"the nodes of the training lost each other: {error}"
        came = "1 of 2" if self._nodes == 2 else f"not all of {self._nodes}"
        return f"the nodes of the training did not find each other: {came} came in {waited:.0f} s"

    def _workers(self, prefix: str) -> list[int]:
        """Processes that left such a file and are still there."""
        found = [int(path.name.removeprefix(prefix)) for path in self._folder.glob(f"{prefix}*")]
        return [process for process in found if Path(f"/proc/{process}").exists()]

    def _say(self) -> None:
        while not self._over.wait(self._say_every):
            if self._workers(STARTED):
                return
            waited = time.monotonic() - self._begun
            others = "the other node" if self._nodes == 2 else f"all of the {self._nodes} nodes"
            log.info("waiting for %s of the training since %.0f s", others, waited)

    def _wait(self) -> None:
        while number := os.read(self._reading, 1):
            if number[0] in (signal.SIGTERM, signal.SIGINT) and not self._workers(TRAINING):
                late = self._deadline.passed
                leave_last_line(f"fault: {self._deadline.line}" if late else "cancelled")
                for worker in multiprocessing.active_children():
                    worker.kill()
                shutil.rmtree(self._folder, ignore_errors=True)
                sys.stdout.flush()
                os._exit(EXIT_FAULT if late else EXIT_CANCELLED)
        os.close(self._reading)


def training_begins() -> None:
    """In a worker, at its first step: from now on a cancel asks for a checkpoint."""
    if folder := os.environ.get(FOLDER_VARIABLE):
        Path(folder, f"{TRAINING}{os.getpid()}").touch()
