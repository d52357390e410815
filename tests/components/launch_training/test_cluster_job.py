"""The launcher against an API server: one job, followed to its end whatever that is, and none left after a cancel."""

import json
import signal
import threading

import pytest

from components.launch_training.cleanup import Cleanup, cleanup
from components.launch_training.launcher import LaunchTraining, launch_training
from components.shared import storage
from components.shared.artifact import ArtifactWriter
from components.shared.cli import run_stage
from components.shared.errors import InputError, StorageFault


@pytest.fixture
def launch(tiny_model, packed_text, tmp_path):
    """`launch(**options)`: the stage, in this process, on the cluster."""

    def run(**options):
        chosen = {"stage": "lora", "model": tiny_model, "dataset": packed_text, "store": str(tmp_path / "store")}
        return run_stage(LaunchTraining(run_id="run-7", **{**chosen, **options}), launch_training)

    return run


def train(job) -> None:
    """What the job's training leaves: an artifact, and a copy of its manifest where `--output` says."""
    words = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]["command"]
    options = dict(zip(words[3::2], words[4::2], strict=True))
    out = ArtifactWriter(options["--store"], "pretrain", "key")
    out.add_bytes("adapter_model.safetensors", b"weights")
    storage.write_bytes(options["--output"], out.publish("adapter").to_json())


def succeed(cluster):
    def operate(job) -> None:
        name = job["metadata"]["name"]
        cluster.set_pod(name, "Running")
        cluster.set_condition(name, "Running")
        train(job)
        cluster.set_pod(name, "Succeeded", 0)
        cluster.set_condition(name, "Succeeded")

    return operate


def fail(cluster, times: int, exit_code: int = 1, message: str = "fault: a bug"):
    """The first `times` jobs fail, the next succeeds."""
    begun = []

    def operate(job) -> None:
        name = job["metadata"]["name"]
        begun.append(name)
        if len(begun) > times:
            return succeed(cluster)(job)
        cluster.set_pod(name, "Running")
        cluster.set_condition(name, "Running")
        cluster.set_pod(name, "Failed", exit_code, message)
        cluster.set_condition(name, "Failed", "BackoffLimitExceeded", "too many restarts")
        return None

    return operate


def posts(cluster) -> int:
    return sum(method == "POST" for method, _ in cluster.requests)


def test_the_jobs_result_is_the_launchers(cluster, launch, tmp_path):
    cluster.on_create = succeed(cluster)
    manifest = launch()
    assert (manifest.kind, manifest.stage) == ("adapter", "pretrain")
    assert list(cluster.jobs) == ["run-7-lora-a1"]


def test_a_second_start_asks_the_cluster_nothing(cluster, launch):
    cluster.on_create = succeed(cluster)
    first = launch()
    asked = len(cluster.requests)
    assert launch(nodes=1, cpu="7") == first
    assert len(cluster.requests) == asked


def test_a_failed_job_has_a_next_attempt(cluster, launch, caplog):
    cluster.on_create = fail(cluster, times=1)
    launch()
    assert list(cluster.jobs) == ["run-7-lora-a1", "run-7-lora-a2"]
    assert "pod run-7-lora-a1-master-0 ended with 1: fault: a bug" in caplog.text


def test_after_the_last_attempt_the_step_fails_with_the_reason(cluster, launch):
    cluster.on_create = fail(cluster, times=9)
    with pytest.raises(StorageFault, match="a2 failed: BackoffLimitExceeded: too many restarts"):
        launch(attempts=2)
    assert posts(cluster) == 2


def test_wrong_input_ends_with_its_line_and_no_job(cluster, launch):
    def operate(job) -> None:
        name = job["metadata"]["name"]
        cluster.set_condition(name, "Running")
        # OnFailure: the kubelet has already started the container again
        cluster.set_pod(name, "Running", 2, "error: --dataset x: mend it", last=True)

    cluster.on_create = operate
    with pytest.raises(InputError, match=r"^--dataset x: mend it$"):
        launch()
    assert not cluster.jobs
    assert posts(cluster) == 1


def test_a_job_that_was_deleted_from_outside_is_a_fault(cluster, launch):
    cluster.on_create = lambda job: cluster.delete(job["metadata"]["name"])
    with pytest.raises(StorageFault, match="deleted from outside"):
        launch()


def test_a_launcher_that_starts_again_follows_its_job(cluster, launch):
    """The first launcher sees its job created and is lost; the second finds it, and creates none."""
    held = threading.Event()

    def operate(job) -> None:
        held.wait(60)
        succeed(cluster)(job)

    cluster.on_create = operate
    first = threading.Thread(target=launch)
    first.start()
    with cluster.changed:
        assert cluster.changed.wait_for(lambda: cluster.jobs, 60)
    second = threading.Thread(target=launch)
    second.start()
    with cluster.changed:
        watches = lambda: sum(path.endswith("/pods") for _, path in cluster.requests) >= 4  # noqa: E731
        assert cluster.changed.wait_for(watches, 60)
    held.set()
    first.join(60)
    second.join(60)
    assert posts(cluster) == 1
    assert list(cluster.jobs) == ["run-7-lora-a1"]


def test_a_job_of_that_name_with_other_work_is_not_followed(cluster, launch):
    cluster.created({"metadata": {"name": "run-7-lora-a1", "labels": {"zhllama.io/key": "other"}}}, "team")
    with pytest.raises(InputError, match="there is another training job team/run-7-lora-a1"):
        launch()
    assert list(cluster.jobs) == ["run-7-lora-a1"]


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_busy_api_server_is_asked_again(cluster, launch, status, monkeypatch):
    monkeypatch.setattr("components.shared.kubernetes_api.attempted.retry.wait", lambda state: 0)
    cluster.on_create = succeed(cluster)
    cluster.faults = [status, status]
    launch()
    assert list(cluster.jobs) == ["run-7-lora-a1"]


@pytest.mark.parametrize(
    ("status", "mend"), [(403, "Role zhllama-runner"), (404, "install the training operator"), (422, "mend the job")]
)
def test_a_refused_job_is_wrong_input(cluster, launch, status, mend):
    # the first question, for a job of that name, is answered 404 anyway
    cluster.faults = [404, status]
    with pytest.raises(InputError, match=f"was refused: {status} .*{mend}"):
        launch()


def test_without_a_cluster_the_way_out_is_named(launch, monkeypatch, tmp_path):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "missing"))
    with pytest.raises(InputError, match="no Kubernetes cluster is configured"):
        launch()


def test_the_masters_log_is_passed_on(cluster, launch, capfd):
    cluster.logs["run-7-lora-a1-master-0"] = (
        "2026-11-24T10:00:00.000000001Z step 1/2: loss 9.00\n2026-11-24T10:00:01.000000001Z step 2/2: loss 8.00\n"
    )
    cluster.on_create = succeed(cluster)
    launch()
    said = capfd.readouterr().err
    assert [line for line in said.splitlines() if line.startswith("run-7")] == [
        "run-7-lora-a1-master-0 | step 1/2: loss 9.00",
        "run-7-lora-a1-master-0 | step 2/2: loss 8.00",
    ]


def test_sigterm_deletes_the_job(cluster, command):
    process = command("--backend", "pytorchjob", "--run-id", "run-8")
    with cluster.changed:
        followed = lambda: any(path.endswith("/pods") for _, path in cluster.requests)  # noqa: E731
        assert cluster.changed.wait_for(followed, 60)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 143, said
    assert not cluster.jobs
    assert said.splitlines()[-1] == "cancelled"


def test_the_exit_handler_deletes_the_runs_unfinished_jobs(cluster):
    for name, run, end in (("a", "run-1", ""), ("b", "run-1", "Succeeded"), ("c", "run-2", "")):
        cluster.created({"metadata": {"name": name, "labels": {"zhllama.io/run": run}}}, "team")
        if end:
            cluster.set_condition(name, end)
    cleanup(Cleanup(run_id="run-1"))
    assert sorted(cluster.jobs) == ["b", "c"]


def test_the_exit_handler_of_a_local_run_has_nothing_to_do(caplog):
    with caplog.at_level("INFO"):
        cleanup(Cleanup(run_id="run-1", backend="local"))
    assert "nothing to clean up" in caplog.text


def test_the_job_that_is_created_is_the_rendered_one(cluster, launch):
    cluster.on_create = succeed(cluster)
    launch(
        size="13b", nodes=3, processes_per_node=8, gpu_resource="nvidia.com/gpu", queue="gpus", s3_secret="zhllama-s3"
    )
    job = cluster.jobs["run-7-lora-a1"]
    labels = job["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == "gpus"
    assert (labels["zhllama.io/run"], labels["zhllama.io/size"], labels["zhllama.io/stage"]) == ("run-7", "13b", "lora")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert (replicas["Master"]["replicas"], replicas["Worker"]["replicas"]) == (1, 2)
    assert job["spec"]["nprocPerNode"] == "8"
    assert json.dumps(job).count('"nvidia.com/gpu": "8"') == 4
