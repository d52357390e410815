"""A node that waits for others: a cancel ends it at once, it says what it waits for, and its deadline holds."""

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from components.launch_training.local_job import _port
from zhllama.errors import StorageFault
from zhllama.kubernetes.job_manifest import local_environments
from zhllama.kubernetes.pods import DEADLINE_VARIABLE
from zhllama.kubernetes.training_job import TrainingJob
from zhllama.training.elastic import FIRST_START, Deadline, Node

FOLDER = Path(__file__).parent
WITHIN = 15.0
"""Seconds from its signal in which a cancelled node is gone, on a busy machine too: what it waits for takes minutes."""
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import elastic_examples as examples
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.training.options import TrainingOptions
from zhllama.stage.program import guarded
from zhllama.training.checkpoints import Run
from zhllama.training.elastic import Deadline, run_workers
options = TrainingOptions(store=sys.argv[2], model="m", dataset="d")
run = Run.of(options, ArtifactWriter(options.store, "stage", "key"))
def training():
    with Deadline() as deadline:
        run_workers(getattr(examples, sys.argv[3]), run, deadline)
guarded(training)
"""
WAITING = """
import signal, sys, time
from pathlib import Path
from zhllama.training.elastic import Deadline, Node
signal.signal(signal.SIGTERM, lambda *_: None)
with Deadline() as deadline, Node(Path(sys.argv[1]), 2, deadline):
    while True:
        time.sleep(60)
"""
"""A node whose main thread hears no signal, as in the rendezvous."""


def until(there: Callable[[], bool], process: "subprocess.Popen[str]", seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts a node's agent with a worker of elastic_examples."""
    started: list[subprocess.Popen[str]] = []

    def one(worker: str, **environment: str) -> "subprocess.Popen[str]":
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PET_")}
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(FOLDER), str(tmp_path), worker],
            env={**inherited, "TMPDIR": str(tmp_path), **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield one
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def in_call(process: "subprocess.Popen[str]", library: str) -> bool:
    """Whether a process has a library loaded: by then its agent has begun."""
    return library in Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8")


def connections(port: int) -> int:
    """Those that a server at this port has open."""
    lines = (
        Path("/proc/net/tcp").read_text(encoding="utf-8").splitlines()
        + Path("/proc/net/tcp6").read_text(encoding="utf-8").splitlines()
    )
    fields = [line.split() for line in lines]
    return sum(one[1].endswith(f":{port:04X}") and one[3] == "01" for one in fields)


def cancelled(*nodes: "subprocess.Popen[str]") -> float:
    """Seconds from SIGTERM to the end of all nodes of a job, which is 143."""
    begin = time.monotonic()
    for process in nodes:
        process.send_signal(signal.SIGTERM)
    for process in nodes:
        said = process.communicate(timeout=max(0.1, begin + WITHIN - time.monotonic()))[1]
        assert process.returncode == 143, said
        assert "Traceback" not in said
    return time.monotonic() - begin


@pytest.mark.slow
def test_a_master_that_waits_for_its_workers_ends_at_once(start):
    port = _port()
    job = TrainingJob(name="two", command=("unused",), nodes=2)
    master = start("publish", **local_environments(job, port)[0])
    until(lambda: listens(port), master)
    assert cancelled(master) < WITHIN


@pytest.mark.slow
def test_a_worker_node_whose_master_never_comes_ends_at_once(start):
    job = TrainingJob(name="two", command=("unused",), nodes=2)
    node = start("publish", **local_environments(job, _port())[1])
    until(lambda: in_call(node, "libtorch_python"), node)
    assert cancelled(node) < WITHIN


@pytest.mark.slow
@pytest.mark.parametrize("worker", ["waits_for_its_peers", "loads_for_ever"])
def test_workers_that_have_not_begun_to_train_end_at_once(start, tmp_path, worker):
    agent = start(worker, PET_NPROC_PER_NODE="1")
    until((tmp_path / "waiting").exists, agent)
    assert cancelled(agent) < WITHIN
    assert list(tmp_path.glob("zhllama-*")) == []


@pytest.mark.slow
def test_two_nodes_that_wait_for_a_third_end_at_once(start):
    port = _port()
    job = TrainingJob(name="three", command=("unused",), nodes=3)
    nodes = [start("publish", **environment) for environment in local_environments(job, port)[:2]]
    # the master's own, and the worker node's
    until(lambda: connections(port) > 1, nodes[0])
    assert cancelled(*nodes) < WITHIN


@pytest.mark.slow
def test_two_nodes_whose_workers_wait_for_each_other_end_at_once(start, tmp_path):
    """One worker stays in init_process_group for the other, which still loads."""
    job = TrainingJob(name="two", command=("unused",), nodes=2)
    nodes = [start("waits_for_rank_1", **environment) for environment in local_environments(job, _port())]
    until(lambda: len(list(tmp_path.glob("waiting-*"))) == 2, nodes[0])
    assert cancelled(*nodes) < WITHIN
    assert list(tmp_path.glob("zhllama-*")) == []


@pytest.mark.slow
def test_an_elastic_node_that_waits_for_others_ends_at_once(start):
    port = _port()
    job = TrainingJob(name="two", command=("unused",), nodes=2, min_nodes=2, max_nodes=2)
    node = start("publish", **local_environments(job, port)[0])
    until(lambda: listens(port), node)
    assert cancelled(node) < WITHIN


@pytest.mark.slow
def test_workers_that_train_are_asked_for_their_checkpoint(start, tmp_path):
    agent = start("save_when_told", PET_NPROC_PER_NODE="2")
    until(lambda: len(list(tmp_path.glob("running-*"))) == 2, agent)
    assert cancelled(agent) < WITHIN
    assert len(list(tmp_path.glob("saved-*"))) == 2


@pytest.mark.skipif(not shutil.which("unshare") or os.getuid() != 0, reason="only root makes a process the first one")
def test_the_first_process_of_a_container_takes_a_cancel_while_it_imports():
    """The kernel drops a signal to process 1 for which it has no handler."""
    program = "import components, signal; print('here', flush=True); signal.pause()"
    outer = subprocess.Popen(
        ["unshare", "--pid", "--fork", sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    )
    assert outer.stdout is not None
    assert outer.stdout.readline() == "here\n"
    first = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text(encoding="utf-8").split()
    os.kill(int(first[0]), signal.SIGTERM)
    assert outer.wait(WITHIN) == 143


# --- waiting ----------------------------------------------------------------------------------------------------------


def test_a_node_says_every_minute_that_it_waits(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "training"), Node(tmp_path, 2, Deadline(), say_every=0.05):
        end = time.monotonic() + 20
        while len(caplog.messages) < 2 and time.monotonic() < end:
            time.sleep(0.01)
    assert all(line.startswith("waiting for the other node of the training since") for line in caplog.messages)
    assert len(caplog.messages) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("node", [0, 1])
def test_nodes_that_do_not_find_each_other_say_so_in_one_line(start, node):
    job = TrainingJob(name="two", command=("unused",), nodes=2)
    alone = start("publish", **local_environments(job, _port())[node], PET_RDZV_CONF="timeout=3,read_timeout=3")
    said = alone.communicate(timeout=120)[1].splitlines()
    assert alone.returncode == 1
    assert said[-1].startswith("fault: the nodes of the training did not find each other: 1 of 2 came in ")
    assert not any("Traceback" in line for line in said), said


# --- the deadline -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_training_ends_itself_at_its_deadline_after_a_checkpoint(start, tmp_path):
    """Nobody else does: the operator sets no timer, and who applied the job by hand has no launcher."""
    (tmp_path / FIRST_START).write_text(str(time.time()))
    agent = start("save_when_told", PET_NPROC_PER_NODE="1", **{DEADLINE_VARIABLE: "25"})
    said = agent.communicate(timeout=90)[1].splitlines()
    assert agent.returncode == 1
    assert said[-1].startswith("fault: the training was stopped at its deadline of 25 s; raise --deadline-seconds")
    assert (tmp_path / "saved-0").exists()

    again = start("save_when_told", PET_NPROC_PER_NODE="1", **{DEADLINE_VARIABLE: "25"})
    said = again.communicate(timeout=90)[1].splitlines()
    assert again.returncode == 1, "started again in its pod, it does not train on"
    assert len(said) == 1


def test_a_deadline_that_comes_while_a_node_waits_for_others_is_no_cancel(tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path), DEADLINE_VARIABLE: "1"}
    ended = subprocess.run(
        [sys.executable, "-c", WAITING, str(tmp_path / "agent")],
        env=environment, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("fault: the training was stopped at its deadline of 1 s; raise")


@pytest.mark.slow
def test_a_deadline_that_comes_in_the_rendezvous_is_no_cancel(start):
    port = _port()
    job = TrainingJob(name="two", command=("unused",), nodes=2)
    master = start("publish", **local_environments(job, port)[0], **{DEADLINE_VARIABLE: "25"})
    until(lambda: listens(port), master)
    said = master.communicate(timeout=90)[1].splitlines()
    assert master.returncode == 1, said
    assert said[-1].startswith("fault: the training was stopped at its deadline of 25 s; raise --deadline-seconds")


def test_a_deadline_that_was_not_reached_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv(DEADLINE_VARIABLE, "3600")
    with Deadline():
        pass
    with pytest.raises(SystemExit), Deadline():
        raise SystemExit(143)


def test_a_container_that_is_started_again_counts_from_the_first_start(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv(DEADLINE_VARIABLE, "60")
    (tmp_path / FIRST_START).write_text(str(time.time() - 61))
    with pytest.raises(StorageFault, match="stopped at its deadline of 60 s"), Deadline():
        raise AssertionError("it must not begin")
