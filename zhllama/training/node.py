"""The agent of a node while it waits for others: it says what it waits for, and a cancel ends it at once.

In the rendezvous, and in a worker's init_process_group, the main thread is in a call of C++, where no signal handler of
Python's runs: on a real cluster a cancelled pod stayed for the whole of its 300 seconds. The C handler writes each
signal into a pipe, whatever the main thread does, and a thread reads it. Before the first step nothing is to be saved,
so that thread ends the workers and the process, be it for a cancel or for the deadline (deadline.py); after it the
agent passes SIGTERM on, and the workers write a checkpoint.
"""

import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from zhllama.errors import EXIT_CANCELLED, EXIT_FAULT
from zhllama.stage.log import leave_last_line

log = logging.getLogger("training")

STARTED, TRAINING = "started-", "training-"
"""Files that a worker leaves in the agent's folder, with its process id: it is there; its first step has begun."""
FOLDER_VARIABLE = "ZHLLAMA_AGENT_FOLDER"
"""Tells a worker that folder."""
SAY_EVERY = 60.0
"""Seconds between two lines about what is waited for."""


class Node:
    """This node, from the rendezvous on. folder: the agent's own, where its workers leave files; late: the line that
    says that a deadline has passed, which is no cancel."""

    def __init__(
        self, folder: Path, nodes: int, say_every: float = SAY_EVERY, late: Callable[[], str] = lambda: ""
    ) -> None:
        self._folder, self._nodes, self._say_every, self._late = folder, nodes, say_every, late
        self._begun = time.monotonic()
        self._over = threading.Event()

    def __enter__(self) -> Self:
        os.environ[FOLDER_VARIABLE] = str(self._folder)
        if self._nodes > 1:
            threading.Thread(target=self._say, daemon=True).start()
        # signals are the main thread's
        self._watching = threading.current_thread() is threading.main_thread()
        if self._watching:
            self._reading, self._writing = os.pipe()
            os.set_blocking(self._writing, False)
            self._before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
            threading.Thread(target=self._wait, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        os.environ.pop(FOLDER_VARIABLE, None)
        if self._watching:
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
                late = self._late()
                leave_last_line(f"fault: {late}" if late else "cancelled")
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
