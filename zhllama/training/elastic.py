"""The processes of this node, by torch's elastic launcher.

It runs in this process, from PET_* variables; without them the one process is this one. torchrun as a program turns
every exit code into 1 and kills workers 30 s after SIGTERM. Here a worker's 2 (wrong input, with its line) and 143
(cancelled) are the stage's too, and a SIGTERM is passed on to the workers, which get the grace period
(TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds). Workers are spawned, not forked: each imports torch and transformers anew
(4 s), but inherits no threads or locks.

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
import traceback
import uuid
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.published import find_published
from zhllama.errors import EXIT_CANCELLED, EXIT_FAULT, EXIT_INPUT, InputError, StorageFault
from zhllama.kubernetes.pods import DEADLINE_VARIABLE
from zhllama.secret_text import mask
from zhllama.stage.child_processes import die_with_parent
from zhllama.stage.log import leave_last_line, set_up_logging
from zhllama.storage.private import open_lock, temporary_folder
from zhllama.terminal import say
from zhllama.training.checkpoints import Run
from zhllama.training.hardware import allowed_cores
from zhllama.training.loopback import listen_on_loopback_alone

log = logging.getLogger("training")

SHUTDOWN_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
DEFAULT_SHUTDOWN_TIMEOUT = 60
JOIN_TIMEOUT = 3600
"""Seconds that a node waits for the others to come. PET_RDZV_CONF may say otherwise."""
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
            started = time.time()
            # another user's file of that name is not believed, and a link not followed
            with suppress(OSError), open_lock(Path(tempfile.gettempdir(), FIRST_START)) as file:
                if os.fstat(file.fileno()).st_uid == os.geteuid():
                    try:
                        started = float(file.read())
                    except ValueError:
                        os.ftruncate(file.fileno(), 0)
                        os.pwrite(file.fileno(), str(started).encode(), 0)
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
    """This node, from the rendezvous on: while it waits for others it says so, and a cancel ends it at once. In the
    rendezvous, and in a worker's init_process_group, the main thread is in a call of C++, where no handler of Python's
    runs (on a real cluster a cancelled pod stayed for 300 seconds). The C handler writes each signal into a pipe, and a
    thread reads it. Before the first step nothing is to be saved, so that thread ends the workers and the process;
    after it the agent passes SIGTERM on, and the workers write a checkpoint. folder: the agent's own, where its workers
    leave files; say_every: seconds between two lines about what is waited for."""

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


def run_workers(worker: Callable[[Run], None], run: Run, deadline: Deadline) -> Manifest:
    """Runs `worker(run)`, a function of a module (it is pickled), in every process of this node and returns what rank
    0, on whichever node, published. deadline: the one that is open. InputError with the worker's line when one ends
    with 2, SystemExit(143) when they were cancelled, StorageFault otherwise."""
    if any(name.startswith("PET_") for name in os.environ):
        _run_elastic(worker, run, deadline)
    else:
        os.environ.setdefault("OMP_NUM_THREADS", str(allowed_cores()))
        worker(run)
    manifest = find_published(run.store, run.stage, run.key)
    if manifest is None:
        raise StorageFault(f"{run.result_writer().root}: rank 0 of the training published nothing; see its log")
    return manifest


def _run_elastic(worker: Callable[[Run], None], run: Run, deadline: Deadline) -> None:
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    # the agent reports each failed worker in forty lines; we say it in one
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with temporary_folder() as said:
        config = _launch_config(said)
        # what a worker that is ended leaves goes with this folder
        place = os.environ.get("TMPDIR")
        os.environ["TMPDIR"] = said
        node = Node(Path(said), config.max_nodes, deadline)
        try:
            with node:
                elastic_launch(config, _in_worker)(worker, run, said)
        except SignalException as error:
            raise SystemExit(EXIT_CANCELLED) from error
        except ChildFailedError as error:
            codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            lines = {int(path.name.split("-")[1]): path.read_text() for path in Path(said).glob("rank-*")}
            raise _outcome(codes, lines) from error
        except (RendezvousError, DistError) as error:
            raise StorageFault(node.not_found(error)) from error
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            os.environ.pop("TMPDIR", None) if place is None else os.environ.update(TMPDIR=place)


def _launch_config(folder: str) -> Any:
    """torchrun's reading of PET_*, so that every variable means what it means there."""
    import torch
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.run import config_from_args, determine_local_world_size, get_args_parser

    # its own folder for logs, which nobody reads, would stay in TMPDIR
    arguments = [f"--log-dir={folder}", "worker"]
    if not any(name in os.environ for name in ("PET_MASTER_ADDR", "PET_RDZV_ENDPOINT", "PET_RDZV_BACKEND")):
        # nobody else to find: a file will do
        place = f"--rdzv-endpoint={folder}/rendezvous"
        arguments = ["--rdzv-backend=c10d", place, f"--rdzv-id={uuid.uuid4().hex}", *arguments]
    try:
        settings = get_args_parser().parse_args(arguments)
        processes = determine_local_world_size(settings.nproc_per_node)
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, allowed_cores() // processes)))
        if not torch.cuda.is_available():
            # gradients and logits come and go each step: glibc is to keep their pages (a tenth of the CPU time here)
            os.environ.setdefault("MALLOC_MMAP_MAX_", "0")
            os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**40))
        config, _, _ = config_from_args(settings)
    except (ValueError, AssertionError) as error:
        raise InputError(f"PET_* variables: {error}; set them as torchrun's options of the same names") from error
    if config.rdzv_endpoint == f"{folder}/rendezvous":
        config.rdzv_configs["store_type"] = "file"
    if config.max_nodes == 1 or config.rdzv_endpoint.startswith("127.0.0.1:"):
        listen_on_loopback_alone()
    config.logs_specs = DefaultLogsSpecs(log_dir=folder)
    if config.shutdown_timeout is None:
        config.shutdown_timeout = int(os.environ.get(SHUTDOWN_TIMEOUT) or DEFAULT_SHUTDOWN_TIMEOUT)
    for name in ("timeout", "join_timeout"):
        # one node may be done with fetching the model long before another
        config.rdzv_configs.setdefault(name, JOIN_TIMEOUT)
    return config


def _in_worker(worker: Callable[[Run], None], run: Run, said: str) -> None:
    """The body of a worker process. Leaves the line of an error in `said`, and ends with the contract's code."""
    # nobody would wait for this process: a new start must not find it still at work
    die_with_parent(signal.SIGKILL)
    set_up_logging()
    rank = int(os.environ["RANK"])
    if rank:
        logging.getLogger().setLevel(logging.WARNING)
    # what one library deprecates in another is no news to whoever trains
    warnings.filterwarnings("ignore", category=FutureWarning)
    # until the first step there is nothing to save, and no handler of Python's would run in a call of C++
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    Path(said, f"{STARTED}{os.getpid()}").touch()
    try:
        worker(run)
        return
    except InputError as error:
        code, line = EXIT_INPUT, str(error)
    except (KeyboardInterrupt, SystemExit) as stopped:
        # without the end of the libraries: the threads between the processes still run, and now and then that aborts
        # ("terminate called without an active exception") where 143 was to be said
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        given = getattr(stopped, "code", EXIT_CANCELLED)
        os._exit(given if isinstance(given, int) else EXIT_FAULT)
    except Exception as error:  # noqa: BLE001 - the end of the process: reported whole, exit code 1
        say(mask(traceback.format_exc()), sys.stderr)
        code, line = EXIT_FAULT, f"{type(error).__name__}: {error}"[:300]
    Path(said, f"rank-{rank}").write_text(" ".join(line.split()), encoding="utf-8")
    sys.exit(code)


def _outcome(codes: Mapping[int, int], said: Mapping[int, str]) -> BaseException:
    """What the end of the workers means, from exit codes and last lines by rank: wrong input wins over all else (the
    other ranks die of the loss of their peer), then a cancel, then a fault."""
    for rank in sorted(codes):
        if codes[rank] == EXIT_INPUT:
            return InputError(said.get(rank, f"rank {rank} says that the input is wrong; see its log"))
    if not {EXIT_CANCELLED, -signal.SIGTERM}.isdisjoint(codes.values()):
        return SystemExit(EXIT_CANCELLED)
    # a rank that was killed, or that says why, tells more than one that lost its peer
    rank = min(codes, key=lambda rank: (codes[rank] >= 0, rank not in said, rank))
    code = codes[rank]
    ended = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return StorageFault(f"training process {rank} {ended}" + (f": {said[rank]}" if rank in said else ""))
