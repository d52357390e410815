"""A training job as processes of this machine: one a node, with the variables that the operator would set.

They get SIGTERM when this process is told to stop (or, on Linux, when it dies), the grace period to end, and then
SIGKILL, each with whatever it started.
"""

import contextlib
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time

from zhllama.errors import EXIT_CANCELLED, EXIT_DONE, EXIT_INPUT, InputError, StorageFault
from zhllama.kubernetes.node_environment import local_environments
from zhllama.kubernetes.training_job import TrainingJob
from zhllama.stage.child_processes import die_with_parent
from zhllama.training.hardware import allowed_cores

log = logging.getLogger("launch")


def run_local(job: TrainingJob) -> None:
    """Runs the job to its end. InputError and SystemExit(143) as the training says, StorageFault for other ends."""
    environment = {**os.environ, **job.environment}
    share = max(1, allowed_cores() // (job.nodes * job.processes_per_node))
    environment.setdefault("OMP_NUM_THREADS", str(share))
    ended: queue.SimpleQueue[_Node] = queue.SimpleQueue()
    nodes = []
    try:
        for number, own in enumerate(local_environments(job, _port())):
            nodes.append(_Node(number, job, {**environment, **own}, ended))
        for _ in nodes:
            node = ended.get()
            if node.process.returncode != EXIT_DONE:
                raise node.outcome()
    finally:
        _stop([node.process for node in nodes], job.grace_seconds)
        for node in nodes:
            node.thread.join()


class _Node:
    """One node's process and the thread that passes its lines on, and puts the node into `ended` when it is over."""

    def __init__(
        self, number: int, job: TrainingJob, environment: dict[str, str], ended: "queue.SimpleQueue[_Node]"
    ) -> None:
        self._number, self._ended, self._last = number, ended, ""
        self._prefix = f"node {number} | " if job.nodes > 1 else ""
        self.process = subprocess.Popen(
            job.command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def _follow(self) -> None:
        assert self.process.stdout is not None
        for raw in self.process.stdout:
            if line := raw.decode(errors="replace").rstrip():
                self._last = line
                print(f"{self._prefix}{line}", file=sys.stderr, flush=True)
        self.process.wait()
        self._ended.put(self)

    def outcome(self) -> BaseException:
        """What its end means: the training's last line is its reason."""
        code = self.process.returncode
        if code == EXIT_INPUT:
            return InputError(self._last.partition(": ")[2])
        if code in (EXIT_CANCELLED, -signal.SIGTERM):
            return SystemExit(EXIT_CANCELLED)
        ended = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return StorageFault(f"the training's node {self._number} {ended}: {self._last}")


def _stop(processes: "list[subprocess.Popen[bytes]]", grace: float) -> None:
    """Ends what still runs: SIGTERM to each process, after the grace period SIGKILL to its whole group."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + grace
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.warning("the training did not end within %.0f s: killed", grace)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
