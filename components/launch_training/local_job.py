"""A training job as processes of this machine: one a node, with the variables that the operator would set. When this
process is told to stop (or, on Linux, dies) they get SIGTERM, and after the grace period SIGKILL with all they started.
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
from zhllama.kubernetes.job_manifest import local_environments
from zhllama.kubernetes.training_job import TrainingJob
from zhllama.stage.child_processes import die_with_parent
from zhllama.terminal import say
from zhllama.training.hardware import allowed_cores

log = logging.getLogger("launch")


def run_local(job: TrainingJob) -> None:
    """Runs the job to its end. InputError and SystemExit(143) as the training says, StorageFault for other ends."""
    environment = {**os.environ, **job.environment}
    share = max(1, allowed_cores() // (job.nodes * job.processes_per_node))
    environment.setdefault("OMP_NUM_THREADS", str(share))
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    processes, threads = [], []
    try:
        for node, own in enumerate(local_environments(job, _port())):
            process = subprocess.Popen(
                job.command,
                env={**environment, **own},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
            processes.append(process)
            prefix = f"node {node} | " if job.nodes > 1 else ""
            thread = threading.Thread(target=_follow, args=(process, node, prefix, ended), daemon=True)
            thread.start()
            threads.append(thread)
        for _ in processes:
            if (failed := ended.get()) is not None:
                raise failed
    finally:
        _stop(processes, job.grace_seconds)
        for thread in threads:
            thread.join()


def _follow(
    process: "subprocess.Popen[bytes]", node: int, prefix: str, ended: "queue.SimpleQueue[BaseException | None]"
) -> None:
    """Passes a node's lines on, and says what its end means: the training's last line is its reason."""
    last = ""
    assert process.stdout is not None
    for raw in process.stdout:
        if line := raw.decode(errors="replace").rstrip():
            last = line
            say(prefix + line, sys.stderr)
    code = process.wait()
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    failed: BaseException | None = StorageFault(f"the training's node {node} {how}: {last}")
    if code == EXIT_DONE:
        failed = None
    elif code == EXIT_INPUT:
        failed = InputError(last.partition(": ")[2])
    elif code in (EXIT_CANCELLED, -signal.SIGTERM):
        failed = SystemExit(EXIT_CANCELLED)
    ended.put(failed)


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
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])
