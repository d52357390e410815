"""Logs of pods, passed on: each line once and none left out, wherever a stream breaks."""

import random
import re
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kubernetes import client

from components.launch_training import job_log
from components.launch_training.job_log import JobLogs, Passed
from tests.components.launch_training.fake_cluster import ROOTS, FakeCluster
from tests.kubernetes_server import Fault
from zhllama.kubernetes.api import connect
from zhllama.kubernetes.job_kinds import PYTORCHJOB

NOON = datetime(2026, 11, 25, 12, tzinfo=UTC)
POD = "run-a1-master-0"


@pytest.fixture
def job(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> JobLogs:
    """The logs of a job whose master runs; nothing waits for long."""
    monkeypatch.setattr(job_log, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(job_log, "LONGEST_WAIT", 0.05)
    monkeypatch.setattr(job_log, "LAST_LINES_WITHIN", 60.0)
    connect()
    cluster.put_job("run-a1")
    cluster.set_pod("run-a1", "Running")
    return JobLogs(client.ApiClient(), PYTORCHJOB, "team")


def follow(cluster: FakeCluster, logs: JobLogs) -> None:
    logs.follow(list(cluster.of_kind("Pod").values()))


def finish(cluster: FakeCluster, logs: JobLogs, restarts: int = 0) -> list[str]:
    cluster.set_pod("run-a1", "Succeeded", 0, restarts=restarts)
    logs.finish()
    return list(logs.kept)


def opened(cluster: FakeCluster) -> int:
    return sum(one.path.endswith("/log") for one in cluster.asked)


def test_lines_carry_the_pods_name_and_no_secret(cluster, job, capfd, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-for-anybodys-eyes")
    cluster.set_pod("run-a1", "Running", index=1)
    follow(cluster, job)
    cluster.write_log(POD, "step 1: loss 9.00", "the key is not-for-anybodys-eyes")
    cluster.write_log("run-a1-worker-0", "a warning")
    cluster.set_pod("run-a1", "Succeeded", 0, index=1)
    finish(cluster, job)
    assert sorted(capfd.readouterr().err.splitlines()) == [
        f"{POD} | step 1: loss 9.00",
        f"{POD} | the key is ***",
        "run-a1-worker-0 | a warning",
    ]


def test_a_line_without_end_takes_no_memory_and_what_comes_after_it_is_passed_on(cluster, job):
    follow(cluster, job)
    cluster.write_log(POD, "x" * 300_000, "step 1: loss 9.00")
    long, short = finish(cluster, job)
    stamp = len(f"{NOON:%Y-%m-%dT%H:%M:%S}.000000000Z ")
    assert long.startswith(f"{POD} | xxx")
    assert re.search(r"x … \(\d{3},\d{3} more bytes of this line are left out\)$", long)
    assert job_log.LONGEST_LINE - stamp <= long.count("x") <= job_log.LONGEST_LINE
    assert short == f"{POD} | step 1: loss 9.00"

    class Endless:
        def stream(self, decode_content: bool) -> Iterator[bytes]:
            yield from (bytes(2**20) for _ in range(200))
            yield b"\nnext"

    tracemalloc.start()
    try:
        first, last = job_log._lines(Endless())
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()
    assert (len(first) < 2**17, last) == (True, b"next")


@pytest.mark.parametrize("seed", range(8))
def test_streams_that_break_at_any_byte_repeat_no_line_and_lose_none(cluster, job, seed):
    """Equal lines, lines of one stamp, stamps that run backwards a little; streams cut, cleanly or not, and refused."""
    chance = random.Random(seed)

    def meet(method: str, path: str) -> Fault | None:
        if not path.endswith("/log") or chance.random() < 0.2:
            return None
        cut = chance.choice((0, 1, 20, 60, 200, 1000))
        # a cut that looks like an end is a proxy's doing, and those end the streams that are long
        clean = Fault(cut=cut, cleanly=method == "FOLLOW")
        return chance.choice((Fault(cut=cut), clean, Fault(status=500), Fault(lose="before")))

    cluster.fault = meet
    follow(cluster, job)
    written = []
    stamp = NOON
    for number in range(60):
        stamp += timedelta(microseconds=chance.choice((-3, 0, 0, 1, 400_000)))
        text = chance.choice((f"step {number}", "the same again", "", "x" * 300, "中文 训练"))
        written.append(text)
        with cluster.changed:
            cluster.logs.setdefault(POD, []).append(f"{stamp:%Y-%m-%dT%H:%M:%S}.{stamp.microsecond:06d}000Z {text}\n")
            cluster.changed.notify_all()
        if chance.random() < 0.2:
            seen = opened(cluster)
            cluster.until(lambda seen=seen: opened(cluster) > seen or len(job.kept) == len(written))
    passed = [line.removeprefix(f"{POD} | ") for line in finish(cluster, job)]
    assert passed == written


def test_a_container_that_was_started_again_is_heard_to_its_last_word(cluster, job):
    """The stream broke before the first container's last lines, and the kubelet has started the second."""
    cluster.write_log(POD, "first 1")
    follow(cluster, job)
    cluster.until(lambda: len(job.kept) == 1)
    held = threading.Event()
    cluster.fault = lambda method, path: Fault(hold=held, lose="before") if path.endswith("/log") else None
    # what is open now ends with the container
    cluster.restart_log(POD)
    with cluster.changed:
        stamp = datetime.now(UTC)
        cluster.previous_logs[POD].append(f"{stamp:%Y-%m-%dT%H:%M:%S}.{stamp.microsecond:06d}000Z first 2\n")
    cluster.set_pod("run-a1", "Running", 1, "fault", last=True, restarts=1)
    cluster.write_log(POD, "second 1")
    cluster.fault = lambda method, path: None
    held.set()
    assert finish(cluster, job, restarts=1) == [f"{POD} | {text}" for text in ("first 1", "first 2", "second 1")]


def test_two_streams_at_an_earlier_log_pass_its_lines_on_once(cluster, job):
    """The job is over while the follower is at the log of the container before: the last look reads it too."""
    earlier, last = threading.Event(), threading.Event()
    requests: list[str] = []

    def meet(method: str, path: str) -> Fault | None:
        if not path.endswith("/log"):
            return None
        kind = "earlier" if "previous" in cluster.asked[-1].query else method
        requests.append(kind)
        first = requests.count(kind) == 1
        return Fault(hold={"earlier": earlier, "GET": last}[kind]) if first and kind != "FOLLOW" else None

    cluster.fault = meet
    cluster.write_log(POD, "first 1")
    cluster.restart_log(POD)
    cluster.set_pod("run-a1", "Running", 1, "fault", last=True, restarts=1)
    cluster.write_log(POD, "second 1")
    before = set(threading.enumerate())
    follow(cluster, job)
    cluster.until(lambda: "earlier" in requests)
    finishing = threading.Thread(target=finish, args=(cluster, job, 1))
    finishing.start()
    cluster.until(lambda: "GET" in requests)
    (following,) = {one for one in threading.enumerate() if one.name == f"log of {POD}"} - before
    earlier.set()
    following.join(60)
    last.set()
    finishing.join(60)
    assert list(job.kept) == [f"{POD} | first 1", f"{POD} | second 1"]


def test_the_last_line_counts_without_a_line_break_and_the_kubelets_own_words_do_not(cluster, job):
    cluster.write_log(POD, "step 1")
    with cluster.changed:
        cluster.logs[POD].append("unable to retrieve container logs for containerd://0\n")
        stamp = datetime.now(UTC)
        cluster.logs[POD].append(f"{stamp:%Y-%m-%dT%H:%M:%S}.{stamp.microsecond:06d}000Z killed in mid-sen")
    follow(cluster, job)
    assert finish(cluster, job) == [f"{POD} | step 1", f"{POD} | killed in mid-sen"]


def test_a_log_that_cannot_be_had_holds_nobody_up(cluster, job, monkeypatch):
    monkeypatch.setattr(job_log, "LAST_LINES_WITHIN", 0.3)
    cluster.fault = lambda method, path: 500 if path.endswith("/log") else None
    cluster.write_log(POD, "step 1")
    follow(cluster, job)
    begun = time.monotonic()
    assert finish(cluster, job) == []
    # not the 60 s that a request may take
    assert time.monotonic() - begun < 30


def test_a_page_in_place_of_a_pod_ends_no_log(cluster, job):
    page, met = Fault(recorded={"status": 200, "text": "<html>"}), []

    def fault(method: str, path: str) -> Fault | None:
        if not path.endswith(f"/pods/{POD}"):
            return None
        met.append(path)
        return page if len(met) < 3 else None

    cluster.fault = fault
    cluster.write_log(POD, "step 1")
    follow(cluster, job)
    cluster.until(lambda: len(met) > 2)
    assert finish(cluster, job) == [f"{POD} | step 1"]


def looks(cluster: FakeCluster) -> int:
    """How often a log was asked for as it is, and not followed."""
    return sum(one.path.endswith("/log") and one.method == "GET" for one in cluster.asked)


def test_a_container_that_outlives_its_job_is_heard_to_its_end(cluster, job):
    """Its log has nothing new for a while: that is not its end."""
    cluster.write_log(POD, "step 1")
    follow(cluster, job)
    cluster.until(lambda: len(job.kept) == 1)
    finishing = threading.Thread(target=job.finish)
    finishing.start()
    cluster.until(lambda: looks(cluster) > 2 or not finishing.is_alive())
    cluster.write_log(POD, "the checkpoint is complete")
    cluster.set_pod("run-a1", "Succeeded", 0)
    finishing.join(60)
    assert list(job.kept) == [f"{POD} | step 1", f"{POD} | the checkpoint is complete"]


def test_a_container_that_never_ends_holds_nobody_up(cluster, job, monkeypatch):
    monkeypatch.setattr(job_log, "LAST_LINES_WITHIN", 0.3)
    cluster.write_log(POD, "step 1")
    follow(cluster, job)
    cluster.until(lambda: len(job.kept) == 1)
    begun = time.monotonic()
    job.finish()
    assert time.monotonic() - begun < 30
    assert list(job.kept) == [f"{POD} | step 1"]


def test_a_job_that_the_launcher_gives_up_is_not_heard_to_its_end(cluster, job):
    cluster.write_log(POD, "error: mend it")
    follow(cluster, job)
    begun = time.monotonic()
    job.finish(job_over=False)
    assert time.monotonic() - begun < 30
    assert list(job.kept) == [f"{POD} | error: mend it"]


def test_a_log_that_is_open_when_its_pod_goes_is_read_to_its_end(cluster, job):
    """The pod is deleted between the request for its log and the look at its restarts."""
    cluster.fault = lambda method, path: 503 if path.endswith("/log") else None
    follow(cluster, job)
    cluster.until(lambda: opened(cluster) > 0)
    cluster.write_log(POD, "the last words")
    cluster.fault = lambda method, path: 404 if path.endswith(POD) else None
    begun = time.monotonic()
    job.finish()
    assert time.monotonic() - begun < 30
    assert list(job.kept) == [f"{POD} | the last words"]


def test_an_open_log_is_read_to_its_end_though_its_pod_cannot_be_asked_any_more(cluster, job, caplog):
    """The operator has deleted the pod of a job that failed: only what is open still has its last words."""
    follow(cluster, job)
    cluster.write_log(POD, "step 1")
    cluster.until(lambda: len(job.kept) == 1)
    cluster.fault = lambda method, path: 404 if path.endswith("/log") else None
    finishing = threading.Thread(target=job.finish)
    finishing.start()
    cluster.until(lambda: looks(cluster) > 0)
    cluster.write_log(POD, "the last words")
    cluster.remove(f"{ROOTS['Pod']}/{POD}")
    finishing.join(60)
    assert list(job.kept) == [f"{POD} | step 1", f"{POD} | the last words"]
    assert "missing" not in caplog.text


def test_an_open_log_is_read_though_the_look_at_its_pod_fails(cluster, job):
    """The pod is gone by the next request: what is closed unread is lost."""
    logs, pods = iter((None,)), iter((Fault(lose="before"), 503))

    def meet(method: str, path: str) -> Fault | int | None:
        if path.endswith("/log"):
            return next(logs, 404)
        return next(pods, 404) if path.endswith(POD) else None

    cluster.fault = meet
    cluster.write_log(POD, "fault: a bug")
    follow(cluster, job)
    assert finish(cluster, job) == [f"{POD} | fault: a bug"]


def test_what_two_streams_bring_at_once_is_passed_on_once(cluster, job, monkeypatch):
    """The one that follows is slow; the one that looks is ahead of it, is cut twice, and then refused."""
    slow, cuts, lines = threading.Event(), iter((200, 400)), job_log._lines

    def held(answer: Any) -> Iterator[bytes]:
        for number, line in enumerate(lines(answer)):
            if number == 1 and threading.current_thread().name == f"log of {POD}":
                slow.wait(60)
            yield line

    def meet(method: str, path: str) -> Fault | int | None:
        if method != "GET" or not path.endswith("/log"):
            return None
        return Fault(cut=cut) if (cut := next(cuts, 0)) else 404

    monkeypatch.setattr(job_log, "_lines", held)
    cluster.fault = meet
    cluster.write_log(POD, *(f"step {number}" for number in range(40)))
    follow(cluster, job)
    cluster.until(lambda: len(job.kept) == 1)
    finishing = threading.Thread(target=finish, args=(cluster, job))
    finishing.start()
    cluster.until(lambda: looks(cluster) == 3)
    assert len(job.kept) > 5
    slow.set()
    finishing.join(60)
    assert list(job.kept) == [f"{POD} | step {number}" for number in range(40)]


def test_a_look_at_the_job_ends_the_pause_after_a_stream_that_broke(cluster, job, monkeypatch):
    """Two seconds after a job has failed its pod is gone: no pause may be longer."""
    monkeypatch.setattr(job_log, "FIRST_WAIT", 600.0)
    monkeypatch.setattr(job_log, "LONGEST_WAIT", 600.0)
    cluster.fault = lambda method, path: 503 if path.endswith("/log") else None
    cluster.write_log(POD, "fault: a bug")
    follow(cluster, job)
    cluster.until(lambda: opened(cluster) == 1)
    cluster.fault = lambda method, path: None
    follow(cluster, job)
    cluster.until(lambda: len(job.kept) == 1, seconds=30)


@pytest.mark.parametrize(
    ("met", "why"),
    [(503, "503 a fault that the test put here"), (404, "its pod was gone before it was answered")],
)
def test_lines_that_cannot_be_had_are_said_to_be_missing(cluster, job, caplog, monkeypatch, met, why):
    monkeypatch.setattr(job_log, "LAST_LINES_WITHIN", 0.3)
    cluster.fault = lambda method, path: met if path.endswith("/log") else None
    cluster.set_pod("run-a1", "Running", index=1)
    cluster.write_log(POD, "fault: a bug")
    follow(cluster, job)
    job.finish()
    assert [one.getMessage() for one in caplog.records if one.levelname == "WARNING"] == [
        f"the last lines of {POD} and 1 more are missing: {why}"
    ]


def test_rank_0_is_heard_first_where_there_are_more_pods_than_are_followed(cluster, job, monkeypatch):
    monkeypatch.setattr(job_log, "MOST_FOLLOWED", 2)
    for index in range(1, 5):
        cluster.set_pod("run-a1", "Running", index=index)
    job.follow(sorted(cluster.of_kind("Pod").values(), key=lambda pod: pod["metadata"]["name"], reverse=True))
    cluster.until(lambda: opened(cluster) >= 2)
    cluster.write_log(POD, "heard")
    cluster.set_pod("run-a1", "Succeeded", 0, index=1)
    assert f"{POD} | heard" in finish(cluster, job)
    assert len({one.path for one in cluster.asked if one.path.endswith("/log")}) == 2


# --- what a new stream repeats ----------------------------------------------------------------------------------------

steps = st.lists(st.tuples(st.integers(-1_000, 1_500_000), st.sampled_from(["a", "b"])), min_size=1, max_size=60)


@given(steps, st.data())
def test_a_stream_that_begins_again_brings_what_is_remembered_and_what_is_new(told, data):
    """Lines of any stamps (up to a millisecond backwards): a break after any of them."""
    lines, when = [], NOON
    for microseconds, text in told:
        when += timedelta(microseconds=microseconds)
        lines.append((when, f"{when.isoformat()} {text}".encode()))
    cut = data.draw(st.integers(0, len(lines)))
    passed = Passed()
    for stamp, line in lines[:cut]:
        passed.add(stamp, line)
    since = passed.since()
    begin = datetime.fromisoformat(since) if since else NOON - timedelta(days=1)
    repeated = Counter(line for stamp, line in lines if stamp >= begin)
    new = repeated - passed.to_skip()
    assert new == Counter(line for _, line in lines[cut:])


def test_no_more_is_remembered_than_the_last_seconds():
    passed = Passed()
    for number in range(10_000):
        passed.add(NOON + timedelta(milliseconds=100 * number), b"line %d" % number)
    assert sum(passed.to_skip().values()) <= 21
