"""Workers for test_elastic.py: functions of a module that a spawned process can import."""

import atexit
import os
import signal
import socket
import sys
import time
from pathlib import Path

from zhllama.artifacts.manifest import Manifest
from zhllama.errors import InputError
from zhllama.training.checkpoints import Run
from zhllama.training.elastic import training_begins


def publish_ranks(run: Run) -> None:
    """Every rank leaves a file; rank 0 publishes when all are there."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    folder = Path(run.store)
    (folder / f"rank-{rank}").write_text(os.environ["OMP_NUM_THREADS"])
    if rank == 0:
        while len(list(folder.glob("rank-*"))) < world:
            time.sleep(0.01)
        publish(run)


def publish(run: Run) -> Manifest:
    out = run.result_writer()
    out.add_bytes("done.txt", b"done")
    return out.publish("files")


def rank_1_has_wrong_input(run: Run) -> None:
    if os.environ["RANK"] == "1":
        raise InputError("the file x: is wrong; mend it")
    signal.pause()


def rank_1_fails(run: Run) -> None:
    if os.environ["RANK"] == "1":
        raise RuntimeError("a bug")
    signal.pause()


def rank_1_is_killed(run: Run) -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def rank_1_is_stopped_and_breaks_on_its_way_out(run: Run) -> None:
    if os.environ["RANK"] == "1":
        atexit.register(os.abort)
        print("the last words", flush=False)
        sys.exit(143)
    signal.pause()


def save_when_told(run: Run) -> None:
    """Says that it runs; on SIGTERM takes a moment to save, then ends with 143."""
    folder, rank = Path(run.store), os.environ["RANK"]

    def save(signum: int, frame: object) -> None:
        time.sleep(0.5)
        (folder / f"saved-{rank}").touch()
        sys.exit(143)

    signal.signal(signal.SIGTERM, save)
    training_begins()
    (folder / f"running-{rank}").touch()
    while True:
        signal.pause()


def nothing(run: Run) -> None:
    pass


def waits_for_its_peers(run: Run) -> None:
    """Stays in init_process_group, a call of C++: the second process never comes."""
    import torch.distributed as dist

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    (Path(run.store) / "waiting").touch()
    dist.init_process_group("gloo", init_method=place, rank=0, world_size=2)


def waits_for_rank_1(run: Run) -> None:
    """Rank 0 stays in init_process_group for rank 1, which loads for ever."""
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    (Path(run.store) / f"waiting-{rank}").touch()
    while rank:
        time.sleep(0.1)
    dist.init_process_group("gloo")


def loads_for_ever(run: Run) -> None:
    """Has not begun to train."""
    (Path(run.store) / "waiting").touch()
    while True:
        time.sleep(0.1)
