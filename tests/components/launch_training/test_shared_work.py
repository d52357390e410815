"""Two runs with the same work at once: one trains, the other follows, and neither touches what is the other's."""

import signal
import time

import pytest

from components.launch_training.job_deletion import delete_unfinished
from tests.components.launch_training.fake_cluster import ROOTS
from tests.components.launch_training.operators import name_of, run, succeed, train


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
    cluster.set_condition("run-1-lora-a1", "Succeeded")
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
    cluster.set_pod("run-1-lora-a1", "Failed", 1, "fault: a bug")
    cluster.set_condition("run-1-lora-a1", "Failed", "BackoffLimitExceeded", "too many restarts")
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
    assert delete_unfinished("run-2", "team") == []
    assert names(cluster) == ["run-1-lora-a1"]


@pytest.mark.slow
def test_of_two_jobs_that_were_made_at_once_the_older_stays(cluster, command):
    """Both launchers look, and find nothing, before either has made its job."""

    def meanwhile(method, path):
        ours = cluster.jobs.get("run-2-lora-a1")
        if method == "GET" and path.endswith("/pytorchjobs") and ours and "run-0-lora-a1" not in cluster.jobs:
            told = {"name": "run-0-lora-a1", "uid": "uid-0", "creationTimestamp": "2020-01-01T00:00:00Z"}
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


def test_the_same_work_in_two_stores_is_two_jobs(tmp_path):
    from components.launch_training.launcher import training_job
    from components.launch_training.options import LaunchTraining

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
