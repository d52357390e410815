"""The processes of a training on this node: torch's elastic launcher, in this process, from PET_* variables.

torchrun as a program turns every exit code into 1 and kills workers 30 s after SIGTERM. Here a worker's 2 (wrong input,
with its line) and 143 (cancelled) are the stage's too, and a SIGTERM is passed on to the workers, which get the grace
period (TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds). Workers are spawned, not forked: each imports torch and transformers
anew (4 s), but inherits no threads or locks. Without PET_* the one process is this one.
"""

import logging
import os
import signal
import sys
import tempfile
import traceback
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.published import find_published
from zhllama.errors import EXIT_CANCELLED, EXIT_FAULT, EXIT_INPUT, InputError, StorageFault
from zhllama.stage.child_processes import die_with_parent
from zhllama.stage.log import mask, set_up_logging
from zhllama.training.checkpoints import Run
from zhllama.training.hardware import allowed_cores
from zhllama.training.node import STARTED, Deadline, Node

SHUTDOWN_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
DEFAULT_SHUTDOWN_TIMEOUT = 60
JOIN_TIMEOUT = 3600
"""Seconds that a node waits for the others to come. PET_RDZV_CONF may say otherwise."""


class TrainingFault(StorageFault):
    """A training process ended badly: one line that says which and how; exit code 1, worth another attempt."""


def run_workers(worker: Callable[[Run], None], run: Run, deadline: Deadline) -> Manifest:
    """Runs `worker(run)` in every process of this node and returns what rank 0, on whichever node, published.

    `worker` is a function of a module (it is pickled); deadline: the one that is open. InputError with the worker's
    line when one ends with 2, SystemExit(143) when they were cancelled, TrainingFault otherwise.
    """
    if any(name.startswith("PET_") for name in os.environ):
        _run_elastic(worker, run, deadline)
    else:
        os.environ.setdefault("OMP_NUM_THREADS", str(allowed_cores()))
        worker(run)
    manifest = find_published(run.store, run.stage, run.key)
    if manifest is None:
        raise TrainingFault(f"{run.result_writer().root}: rank 0 of the training published nothing; see its log")
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
    with tempfile.TemporaryDirectory(prefix="zhllama-") as said:
        config = _launch_config(said)
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
            raise TrainingFault(node.not_found(error)) from error
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _launch_config(folder: str) -> Any:
    """torchrun's reading of PET_*, so that every variable means what it means there."""
    import torch
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.run import config_from_args, determine_local_world_size, get_args_parser

    arguments = ["worker"]
    if not any(name in os.environ for name in ("PET_MASTER_ADDR", "PET_RDZV_ENDPOINT", "PET_RDZV_BACKEND")):
        # nobody else to find: any free port will do
        arguments = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", f"--rdzv-id={uuid.uuid4().hex}", "worker"]
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
    except InputError as error:
        code, line = EXIT_INPUT, str(error)
    except (KeyboardInterrupt, SystemExit) as stopped:
        # without the end of the libraries: the threads between the processes still run, and now and then that aborts
        # ("terminate called without an active exception") where 143 was to be said
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        given = stopped.code if isinstance(stopped, SystemExit) else EXIT_CANCELLED
        os._exit(given if isinstance(given, int) else EXIT_FAULT)
    except Exception as error:  # noqa: BLE001 - the end of the process: reported whole, exit code 1
        print(mask(traceback.format_exc()), file=sys.stderr, flush=True)
        code, line = EXIT_FAULT, f"{type(error).__name__}: {error}"[:300]
    else:
        return
    Path(said, f"rank-{rank}").write_text(" ".join(line.split()))
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
    return TrainingFault(f"training process {rank} {ended}" + (f": {said[rank]}" if rank in said else ""))
