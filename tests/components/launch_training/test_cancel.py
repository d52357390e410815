"""A cancel: the job is deleted at once, in whatever state the launcher is; and by others where the launcher cannot."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from components.launch_training import cancel, cluster_job
from components.launch_training.cleanup import Cleanup, cleanup
from components.launch_training.cluster import Cluster
from tests.components.launch_training.fake_cluster import ROOTS, FakeCluster
from tests.components.launch_training.operators import name_of, run
from tests.kubernetes_server import Fault
from tests.recordings import answered
from zhllama.errors import InputError
from zhllama.kubernetes import api as kubernetes_api
from zhllama.kubernetes.job_kinds import PYTORCHJOB
from zhllama.kubernetes.reaper import reap
from zhllama.kubernetes.training_job import TrainingJob

AT_ONCE = 5.0
"""Seconds from the signal to the arrival of the DELETE: some milliseconds, and what a busy machine makes of them."""
JOB = f"{ROOTS['PyTorchJob']}/run-8-lora-a1"


def deletes(cluster: FakeCluster) -> list[float]:
    return [one.at for one in cluster.asked if (one.method, one.path) == ("DELETE", JOB)]


def asked(cluster: FakeCluster, method: str, ending: str, times: int = 1) -> bool:
    return sum(one.method == method and one.path.endswith(ending) for one in cluster.asked) >= times


# --- the states that a launcher can be in: each brings it there, and says what lets go of it --------------------------


def policed(cluster):
    """Jobs that have a policy, by the policies' owners."""
    return [one["metadata"]["ownerReferences"][0]["name"] for one in cluster.of_kind("NetworkPolicy").values()]


def before_create(cluster, command):
    """It has not even asked which jobs there are; a launcher before it left one."""
    first = command("--backend", "pytorchjob", "--run-id", "run-8")
    cluster.until(lambda: cluster.jobs)
    first.kill()
    first.communicate()
    held = threading.Event()
    seen = []

    def hold_the_first(method: str, path: str) -> Fault | None:
        if (method, path) != ("GET", ROOTS["PyTorchJob"]) or seen:
            return None
        seen.append(path)
        return Fault(hold=held)

    cluster.fault = hold_the_first
    process = command("--backend", "pytorchjob", "--run-id", "run-8")
    cluster.until(lambda: seen)
    return process, held


def creating(cluster, command):
    """The request is at the server, which has not got to it."""
    held = threading.Event()
    cluster.fault = lambda method, path: Fault(hold=held) if method == "POST" and "pytorchjobs" in path else None
    process = command("--backend", "pytorchjob", "--run-id", "run-8")
    cluster.until(lambda: asked(cluster, "POST", "pytorchjobs"))
    return process, held


def queued(cluster, command):
    cluster.on_create = lambda job: cluster.set_condition(name_of(job), "Suspended")
    process = command("--backend", "pytorchjob", "--run-id", "run-8")
    cluster.until(lambda: asked(cluster, "GET", "/events", 2))
    return process, threading.Event()


def without_room(cluster, command):
    """A quota is full: there is no job yet."""
    full = Fault(recorded=answered("quota/count-pytorchjobs"))
    cluster.fault = lambda method, path: full if method == "POST" and "pytorchjobs" in path else None
    process = command("--backend", "pytorchjob", "--run-id", "run-8")
    # nothing is made for a job that is not, and it waits
    cluster.until(lambda: asked(cluster, "POST", "pytorchjobs"))
    return process, threading.Event()


def watching(cluster, command):
    cluster.on_create = lambda job: cluster.set_condition(name_of(job), "Running")
    process = command("--backend", "pytorchjob", "--run-id", "run-8")
    cluster.until(lambda: asked(cluster, "WATCH", "/pods") and asked(cluster, "GET", "/pods", 2))
    return process, threading.Event()


def streaming(cluster, command):
    cluster.on_create = lambda job: run(cluster, job, "step 1/9: loss 9.00")
    process = command("--backend", "pytorchjob", "--run-id", "run-8")
    cluster.until(lambda: asked(cluster, "FOLLOW", "/log"))
    return process, threading.Event()


def backing_off(cluster, command):
    """The API server is away, and has said that it will be for a minute."""
    away = Fault(status=503, headers={"Retry-After": "60"})
    cluster.fault = lambda method, path: away if method == "GET" and path == JOB and cluster.jobs else None
    process = command("--backend", "pytorchjob", "--run-id", "run-8")
    cluster.until(lambda: cluster.jobs and asked(cluster, "GET", "run-8-lora-a1"))
    return process, threading.Event()


def stalled(cluster, command):
    held = threading.Event()
    cluster.fault = lambda method, path: Fault(hold=held) if path == JOB and method == "GET" and cluster.jobs else None
    process = command("--backend", "pytorchjob", "--run-id", "run-8")
    cluster.until(lambda: cluster.jobs and asked(cluster, "GET", "run-8-lora-a1", 2))
    return process, held


@pytest.mark.slow
@pytest.mark.parametrize(
    "state",
    [before_create, creating, without_room, queued, watching, streaming, backing_off, stalled],
    ids=lambda state: state.__name__,
)
def test_the_delete_leaves_at_once_in_every_state(cluster, command, state):
    process, held = state(cluster, command)
    begun = len(deletes(cluster))
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    cluster.until(lambda: len(deletes(cluster)) > begun)
    waited = deletes(cluster)[begun] - sent
    held.set()
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 143, said
    assert said.splitlines()[-1] == "cancelled"
    # a request to create it may have been under way
    assert not cluster.jobs
    assert not cluster.of_kind("NetworkPolicy")
    assert waited < AT_ONCE


@pytest.mark.slow
def test_the_delete_is_made_again_until_it_is_answered(cluster, command):
    process, _ = watching(cluster, command)
    refusals = iter([503, Fault(lose="before"), 429])
    cluster.fault = lambda method, path: next(refusals, None) if method == "DELETE" else None
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 143, said
    assert not cluster.jobs


@pytest.mark.slow
def test_a_creation_that_was_given_up_and_arrives_after_the_delete_is_undone(cluster, monkeypatch):
    """The API server has not answered in time, so the launcher asked again; then it is cancelled."""
    monkeypatch.setattr(kubernetes_api, "TIMEOUT", (5.0, 0.3))
    monkeypatch.setattr(kubernetes_api, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(cancel, "LATE_EVERY", 0.05)
    monkeypatch.setattr(cancel, "CANCEL_WITHIN", 8.0)
    held, made = threading.Event(), []
    cluster.before_create = lambda thing: made.append(thing["kind"])

    def meet(method: str, path: str) -> Fault | None:
        if method == "POST" and "pytorchjobs" in path:
            return Fault(hold=held)
        if deletes(cluster) and method == "GET" and path == ROOTS["PyTorchJob"]:
            # the canceller has found nothing: only now the server gets to it
            threading.Timer(0.1, held.set).start()
        return None

    cluster.fault = meet
    labels = {f"zhllama.io/{name}": value for name, value in (("run", "run-8"), ("stage", "lora"), ("key", "k"))}
    one = TrainingJob(name="run-8-lora-a1", command=("true",), image="i:1", namespace="team", labels=labels)
    launch = cluster_job.Launch(Cluster(PYTORCHJOB), lambda attempt: one, 0, lambda name, lines: None, lambda: False)
    ended = []

    def work() -> None:
        try:
            launch.run(1)
        except SystemExit as error:
            ended.append(error.code)

    thread = threading.Thread(target=work)
    thread.start()
    cluster.until(lambda: cluster.posts() >= 2)
    launch.canceller.cancelled.set()
    launch.cancel()
    launch.sweep()
    thread.join(60)
    assert ended == [143]
    assert "PyTorchJob" in made
    assert not cluster.jobs


def test_a_page_in_place_of_every_answer_ends_no_cancel(cluster, caplog):
    cluster.fault = lambda method, path: Fault(recorded={"status": 200, "text": "<html>"})
    deletion = cancel.Deletion(Cluster(PYTORCHJOB), "team", "zhllama.io/run=r")
    deletion.delete("r", "a-uid")
    deletion.delete_all()
    assert ["200 OK, but no answer of an API server (<html>)" in line for line in caplog.messages] == [True] * 2


def test_ctrl_c_is_a_cancel_too(cluster, command):
    process, _ = watching(cluster, command)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 143, said
    assert not cluster.jobs


def test_a_main_thread_that_hears_no_signal_is_ended(tmp_path):
    """A name look-up that does not return, say: Python's own handlers wait for its end."""
    program = (
        "import hashlib, sys\n"
        "from components.launch_training import cancel\n"
        "from zhllama.stage.program import guarded\n"
        "cancel.LEAVE_WITHIN = 0.1\n"
        "def work():\n"
        "    with cancel.Canceller(lambda: print('at once', flush=True), lambda: print('afterwards', flush=True)):\n"
        "        print('begun', flush=True)\n"
        "        hashlib.pbkdf2_hmac('sha256', b'x', b'y', 10**9)\n"
        "guarded(work)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "at once\nafterwards\n"
        assert process.wait(60) == 143


# --- when the launcher cannot -----------------------------------------------------------------------------------------


@pytest.fixture
def orphan(cluster, command):
    """`orphan(backend)`: a job whose launcher was killed."""

    def leave(backend: str) -> None:
        cluster.on_create = lambda job: run(cluster, job)
        process = command("--backend", backend, "--run-id", "run-8")
        cluster.until(lambda: asked(cluster, "WATCH", "/pods") and policed(cluster))
        process.kill()
        process.communicate()
        assert list(cluster.jobs) == policed(cluster) == ["run-8-lora-a1"]

    return leave


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pytorchjob", "trainjob"])
def test_the_exit_handler_alone_is_enough(cluster, orphan, backend):
    orphan(backend)
    words = ["--run-id", "run-8", "--namespace", "", "--backend", backend]
    ended = subprocess.run(
        [sys.executable, "-m", "components.launch_training.cleanup", *words],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert "deleted run-8-lora-a1" in ended.stderr
    assert not cluster.jobs
    assert not cluster.of_kind("NetworkPolicy")


@pytest.mark.parametrize("backend", ["pytorchjob", "trainjob"])
def test_the_reaper_alone_is_enough(cluster, orphan, backend):
    orphan(backend)
    assert reap("team", "0s", dry_run=False) == []
    metadata = {"name": "w", "namespace": "team", "uid": "u", "labels": {"pipeline/runid": "run-8"}}
    cluster.put(f"{ROOTS['Workflow']}/w", {"kind": "Workflow", "metadata": metadata, "status": {"phase": "Failed"}})
    (line,) = reap("team", "0s", dry_run=False)
    assert "run-8-lora-a1 (run run-8): deleted; its Workflow w has ended: Failed" in line
    assert not cluster.jobs
    assert not cluster.of_kind("NetworkPolicy")


def test_the_exit_handler_deletes_the_runs_unfinished_jobs_and_no_others(cluster):
    for name, its, end in (("a", "run-1", ""), ("b", "run-1", "Succeeded"), ("c", "run-2", "")):
        cluster.put_job(name, labels={"zhllama.io/run": its})
        if end:
            cluster.set_condition(name, end)
    cluster.put_job("d", "TrainJob", labels={"zhllama.io/run": "run-1"})
    cluster.put_job("e", "TrainJob", labels={"zhllama.io/run": "run-1"})
    cluster.set_condition("e", "Complete")
    cleanup(Cleanup(run_id="run-1"))
    assert sorted(cluster.jobs) == ["b", "c", "e"]


def test_the_exit_handler_does_what_it_can_and_names_what_it_may_not(cluster):
    for kind in ("PyTorchJob", "TrainJob"):
        cluster.put_job(kind.lower(), kind, labels={"zhllama.io/run": "run-1"})
    cluster.fault = lambda method, path: 403 if method == "DELETE" and "pytorchjobs" in path else None
    with pytest.raises(InputError, match="refused: 403"):
        cleanup(Cleanup(run_id="run-1"))
    assert list(cluster.jobs) == ["pytorchjob"]


def test_the_exit_handler_of_a_cluster_with_one_operator_asks_no_more(cluster):
    cluster.put_job("a", labels={"zhllama.io/run": "run-1"})
    cluster.fault = lambda method, path: 404 if "trainjobs" in path else None
    cleanup(Cleanup(run_id="run-1"))
    assert not cluster.jobs


def test_the_exit_handler_of_a_local_run_has_nothing_to_do(caplog):
    with caplog.at_level("INFO"):
        cleanup(Cleanup(run_id="run-1", backend="local"))
    assert "nothing to clean up" in caplog.text


def open_files() -> set[int]:
    """The inodes of what this process has open."""
    inodes = set()
    for number in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # closed since it was listed, as the listing itself is
            inodes.add(os.fstat(int(number)).st_ino)
    return inodes


def test_signals_are_as_they_were_when_a_launch_is_over():
    from components.launch_training.cancel import Canceller

    before = signal.set_wakeup_fd(-1)
    with Canceller(lambda: None, lambda: None):
        waker = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(waker)
        pipe = os.fstat(waker).st_ino
        assert pipe in open_files()
    assert signal.set_wakeup_fd(before) == -1
    assert pipe not in open_files()  # neither end: not their number, which other threads change
