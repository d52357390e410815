"""Two runs with the same work at once: one trains, the other follows, and neither touches what is the other's."""

import signal
import time
from datetime import datetime, timedelta
from functools import partial

import pytest

from components.launch_training.cleanup import Cleanup, cleanup
from components.launch_training.options import LaunchTraining
from tests.components.launch_training.fake_cluster import ROOTS
from tests.components.launch_training.operators import give_up, name_of, run, succeed, train


def names(cluster) -> list[str]:
    return sorted(cluster.jobs)


@pytest.fixture
def first(cluster, command):
    """The launcher of run 1, whose job runs."""
    cluster.on_create = lambda job: run(cluster, job)
    process = command("--backend", "pytorchjob", "--run-id", "run-1")
    cluster.until(lambda: names(cluster) == ["run-1-lora-a1"])
    yield process
    if process.poll() is None:
        process.kill()
        process.communicate()


@pytest.fixture
def launch(stage):
    """`launch(**options)`: the launcher of run 2, in this process."""
    return partial(stage, run_id="run-2", backend="pytorchjob")


class Following:
    """A launcher that has said that it follows a job of another run."""

    def __init__(self, process) -> None:
        self.process, self.before = process, ""
        while "does the same work" not in self.before:
            line = process.stderr.readline()
            assert line, self.before
            self.before += line

    def ends(self) -> tuple[int, str]:
        said = self.process.communicate(timeout=120)[1]
        return self.process.returncode, self.before + said


@pytest.fixture
def second(cluster, command, first):
    """The launcher of run 2, which follows the job of run 1."""
    process = command("--backend", "pytorchjob", "--run-id", "run-2")
    yield Following(process)
    if process.poll() is None:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_the_second_run_follows_the_firsts_job_and_takes_its_result(cluster, first, second):
    (job,) = cluster.jobs.values()
    train(job)
    cluster.set_pod("run-1-lora-a1", "Succeeded", 0)
    code, said = second.ends()
    assert code == 0, said
    assert "training job team/run-1-lora-a1 of run run-1 does the same work: following it" in said
    assert first.wait(120) == 0
    assert cluster.posts() == 1


@pytest.mark.slow
def test_a_cancel_of_the_second_leaves_the_firsts_job(cluster, first, second):
    second.process.send_signal(signal.SIGTERM)
    code, said = second.ends()
    assert code == 143, said
    assert names(cluster) == ["run-1-lora-a1"]
    assert not [path for method, path in cluster.requests if method == "DELETE"]
    assert first.poll() is None


@pytest.mark.slow
def test_when_the_first_is_cancelled_the_second_goes_on_with_a_job_of_its_own(cluster, first, second):
    cluster.on_create = succeed(cluster)
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 143
    code, said = second.ends()
    assert code == 0, said
    assert "going on from its checkpoint with a job of our own" in said
    assert names(cluster) == ["run-2-lora-a1"]


@pytest.mark.slow
def test_when_the_firsts_job_fails_the_second_makes_its_own_attempt(cluster, first, second):
    cluster.on_create = succeed(cluster)
    give_up(cluster, cluster.jobs["run-1-lora-a1"])
    code, said = second.ends()
    assert code == 0, said
    assert "fault: a bug" in said
    first.communicate(timeout=120)


@pytest.mark.slow
def test_a_second_run_that_waits_for_no_longer_ends_and_leaves_the_firsts_job(cluster, command):
    cluster.on_create = lambda job: cluster.set_condition(name_of(job), "Suspended")
    first = command("--backend", "pytorchjob", "--run-id", "run-1")
    cluster.until(lambda: names(cluster) == ["run-1-lora-a1"])
    second = command("--backend", "pytorchjob", "--run-id", "run-2", "--waiting-seconds", "1")
    cluster.until(
        lambda: sum(method == "GET" and path.endswith("run-1-lora-a1") for method, path in cluster.requests) > 3
    )
    # what wakes a launcher: any change of the job
    deadline = time.monotonic() + 60
    while second.poll() is None and time.monotonic() < deadline:
        cluster.set_condition("run-1-lora-a1", "Suspended")
        time.sleep(0.2)
    said = second.communicate(timeout=60)[1]
    assert second.returncode == 1, said
    assert "fault: training job run-1-lora-a1 of run run-1, which does the same work: it waited" in said
    assert (cluster.posts(), names(cluster)) == (1, ["run-1-lora-a1"])
    assert not [path for method, path in cluster.requests if method == "DELETE"]
    first.kill()
    first.communicate()


def test_the_exit_handler_of_one_run_leaves_the_jobs_of_another(cluster, first):
    cleanup(Cleanup(run_id="run-2", namespace="team"))
    assert names(cluster) == ["run-1-lora-a1"]


@pytest.mark.slow
def test_of_two_jobs_that_were_made_at_once_the_older_stays(cluster, command):
    """Both launchers look, and find nothing, before either has made its job."""

    def meanwhile(method, path):
        ours = cluster.jobs.get("run-2-lora-a1")
        if method == "GET" and path.endswith("/pytorchjobs") and ours and "run-0-lora-a1" not in cluster.jobs:
            before = datetime.fromisoformat(ours["metadata"]["creationTimestamp"]) - timedelta(seconds=1)
            made = before.strftime("%Y-%m-%dT%H:%M:%SZ")
            told = {"name": "run-0-lora-a1", "uid": "uid-0", "creationTimestamp": made}
            labels = {**ours["metadata"]["labels"], "zhllama.io/run": "run-0"}
            cluster.put(
                f"{ROOTS['PyTorchJob']}/run-0-lora-a1",
                {**ours, "metadata": {**told, "namespace": "team", "labels": labels}, "status": {}},
            )

    cluster.fault = meanwhile
    process = command("--backend", "pytorchjob", "--run-id", "run-2")
    cluster.until(lambda: names(cluster) == ["run-0-lora-a1"])
    (job,) = cluster.jobs.values()
    train(job)
    cluster.set_pod("run-0-lora-a1", "Succeeded", 0)
    cluster.set_condition("run-0-lora-a1", "Succeeded")
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said


class Rival:
    """Another run's launcher: it looked before our job was there, and posts its own after our first look at the others;
    in the same second, by the times of the server."""

    def __init__(self, cluster, uid: str, watches: bool) -> None:
        self.cluster, self.uid, self.watches = cluster, uid, watches
        self.looks_before = self.looks_after = 0

    def __call__(self, method, path):
        if method == "WATCH" and not self.watches:
            return 500
        ours = self.cluster.jobs.get("run-2-lora-a1")
        if method != "GET" or ours is None:
            return None
        there = "run-0-lora-a1" in self.cluster.jobs
        if path.endswith("/pytorchjobs"):
            self.looks_before += not there
            self.looks_after += there
        elif self.looks_before and not there:
            told = {"name": "run-0-lora-a1", "uid": self.uid, "namespace": "team"}
            told["creationTimestamp"] = ours["metadata"]["creationTimestamp"]
            told["labels"] = {**ours["metadata"]["labels"], "zhllama.io/run": "run-0"}
            self.cluster.put(f"{ROOTS['PyTorchJob']}/run-0-lora-a1", {**ours, "metadata": told, "status": {}})
        return None


@pytest.mark.parametrize("watches", [True, False])
@pytest.mark.parametrize(
    ("uid", "stays"), [("uid-0", "run-0-lora-a1"), ("uid-z", "run-2-lora-a1")], ids=["older", "younger"]
)
def test_of_two_jobs_of_one_second_one_trains_whichever_was_posted_last(
    cluster, launch, monkeypatch, uid, stays, watches
):
    for name, seconds in {"SETTLED": 0.2, "FIRST_REWATCH": 0.02}.items():
        monkeypatch.setattr(f"components.launch_training.follower.{name}", seconds)
    cluster.fault = rival = Rival(cluster, uid, watches)
    remain = [stays] if uid == "uid-0" else ["run-0-lora-a1", "run-2-lora-a1"]

    def operate(job):
        cluster.until(lambda: rival.looks_after and names(cluster) == remain)
        train(job)
        cluster.set_pod(stays, "Succeeded", 0)
        cluster.set_condition(stays, "Succeeded")
        # one that was away is back, and wakes the launcher
        rival.watches = True

    cluster.on_create = operate
    assert launch().kind == "adapter"
    assert names(cluster) == remain
    assert cluster.posts() == 1


class LastPod:
    """A pod of another run's job, which was deleted: it is there when the launcher looks for jobs. gone_after: the look
    at the pods at which it goes (0: never)."""

    def __init__(self, cluster, phase: str, gone_after: int) -> None:
        self.cluster, self.phase, self.gone_after = cluster, phase, gone_after
        self.path = f"{ROOTS['Pod']}/run-1-lora-a1-master-0"
        self.looks, self.posts_before = 0, 0

    def __call__(self, method, path):
        asked = next(one for one in reversed(self.cluster.asked) if (one.method, one.path) == (method, path))
        selector = asked.query.get("labelSelector", "")
        if method != "GET" or not selector.startswith("zhllama.io/key="):
            return
        if path.endswith("/pytorchjobs") and self.path not in self.cluster.objects and not self.looks:
            labels = {"zhllama.io/key": selector.partition("=")[2], "zhllama.io/run": "run-1"}
            metadata = {"name": self.path.rpartition("/")[2], "namespace": "team", "labels": labels}
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "status": {"phase": self.phase}}
            self.cluster.put(self.path, pod)
        elif path.endswith("/pods"):
            self.looks += 1
            self.posts_before = self.cluster.posts()
            if self.looks == self.gone_after:
                self.cluster.delete(self.path)


def test_a_job_of_our_own_waits_for_the_pods_of_another_runs_deleted_one(cluster, launch):
    cluster.on_create = succeed(cluster)
    cluster.fault = last = LastPod(cluster, "Running", gone_after=2)
    assert launch().kind == "adapter"
    assert (last.looks, last.posts_before, cluster.posts()) == (2, 0, 1)


def test_a_pod_that_has_ended_is_not_waited_for(cluster, launch):
    cluster.on_create = succeed(cluster)
    cluster.fault = last = LastPod(cluster, "Failed", gone_after=0)
    assert launch().kind == "adapter"
    assert last.looks == 1


def test_a_pod_that_stays_is_waited_for_no_longer_than_its_grace_period(cluster, launch, caplog):
    cluster.on_create = succeed(cluster)
    cluster.fault = LastPod(cluster, "Running", gone_after=0)
    assert launch(grace_seconds=1).kind == "adapter"
    assert "pod run-1-lora-a1-master-0 is still there after its grace period" in caplog.text


def test_the_same_work_in_two_stores_is_two_jobs(tmp_path):
    from components.launch_training.launcher import training_job

    made = [
        training_job(
            LaunchTraining(stage="lora", model="m", dataset="d", store=store, training=("--deepspeed", "none")),
            "0" * 32,
            ("true",),
            1,
        )
        for store in ("s3://bucket/a", "s3://bucket/b", "s3://bucket/a/")
    ]
    assert made[0].name == made[2].name != made[1].name
    assert made[0].labels["zhllama.io/key"] == made[2].labels["zhllama.io/key"] != made[1].labels["zhllama.io/key"]
