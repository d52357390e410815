"""The launcher against an API server: one job, followed to its end whatever that is, by the operators' own statuses."""

import hashlib
import json
import re
import threading
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
import urllib3
from kubernetes.client.exceptions import ApiException

from components.launch_training.cluster import Cluster, refused
from components.launch_training.follower import Follower
from components.launch_training.job_state import State
from components.launch_training.launcher import training_job
from components.launch_training.options import LaunchTraining
from tests.components.launch_training.fake_cluster import ROOTS
from tests.components.launch_training.operators import fail, give_up, name_of, run, succeed, train
from tests.kubernetes_server import TOKEN, Fault
from zhllama import storage
from zhllama.errors import InputError, StorageFault
from zhllama.kubernetes.api import passes
from zhllama.kubernetes.job_kinds import PYTORCHJOB
from zhllama.kubernetes.training_job import TrainingJob

PLAIN = {"training": ("--deepspeed", "none")}


@pytest.fixture(autouse=True)
def brisk(monkeypatch):
    """No test waits for a back-off."""
    monkeypatch.setattr("zhllama.kubernetes.api.FIRST_WAIT", 0.01)
    for module in ("job_log", "follower"):
        for name in ("FIRST_WAIT", "FIRST_REWATCH"):
            monkeypatch.setattr(f"components.launch_training.{module}.{name}", 0.02, raising=False)


@pytest.fixture
def launch(stage):
    """`launch(**options)`: the stage, in this process, on the cluster."""
    return partial(stage, run_id="run-7")


# --- its end ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["pytorchjob", "trainjob"])
def test_the_jobs_result_is_the_launchers(cluster, launch, backend):
    cluster.on_create = succeed(cluster)
    manifest = launch(backend=backend, nodes=2, processes_per_node=4)
    assert (manifest.kind, manifest.stage) == ("adapter", "pretrain")
    (job,) = cluster.jobs.values()
    assert (job["kind"], name_of(job)) == (
        {"pytorchjob": "PyTorchJob", "trainjob": "TrainJob"}[backend],
        "run-7-lora-a1",
    )


def test_the_definitions_of_the_operators_hold_here(cluster):
    job = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": "x"},
        "spec": {"nprocPerNode": 8},
    }
    address = f"http://127.0.0.1:{cluster.port}{ROOTS['PyTorchJob']}"
    answer = urllib3.request("POST", address, json=job, headers={"Authorization": f"Bearer {TOKEN}"})
    assert answer.status == 422
    assert "spec.nprocPerNode in body must be of type string" in answer.json()["message"]


@pytest.mark.parametrize("backend", ["pytorchjob", "trainjob"])
def test_a_job_that_was_over_before_the_first_look(cluster, launch, backend):
    over = threading.Event()
    cluster.on_create = lambda job: (succeed(cluster)(job), over.set())

    def until_over(method: str, path: str) -> Fault | None:
        looks = method == "GET" and path.endswith("-a1") and cluster.jobs
        return Fault(hold=over) if looks else None

    cluster.fault = until_over
    assert launch(backend=backend).kind == "adapter"
    assert list(cluster.jobs) == ["run-7-lora-a1"]


def test_a_second_start_asks_the_cluster_nothing(cluster, launch):
    cluster.on_create = succeed(cluster)
    first = launch()
    asked = len(cluster.requests)
    assert launch(nodes=1, cpu="7") == first
    assert len(cluster.requests) == asked


def test_a_result_that_is_there_counts_whatever_became_of_the_job(cluster, launch):
    def operate(job):
        train(job)
        fail(cluster, times=9)(job)

    cluster.on_create = operate
    assert launch(attempts=1).kind == "adapter"
    assert launch(attempts=1).kind == "adapter"
    assert cluster.posts() == 1


@pytest.mark.parametrize("backend", ["pytorchjob", "trainjob"])
def test_a_failed_job_has_a_next_attempt(cluster, launch, caplog, backend):
    cluster.on_create = fail(cluster, times=1)
    launch(backend=backend)
    assert list(cluster.jobs) == ["run-7-lora-a1", "run-7-lora-a2"]
    assert "fault: a bug" in caplog.text


def test_after_the_last_attempt_the_step_fails_with_the_reason(cluster, launch):
    cluster.on_create = fail(cluster, times=9)
    with pytest.raises(
        StorageFault, match=r"a2 failed: PyTorchJobFailed: Job \S+ has failed because it has reached the .* a bug"
    ):
        launch(attempts=2)
    assert cluster.posts() == 2


def test_attempts_go_on_after_those_that_have_gone_by_their_ttl(cluster, launch):
    """A launcher that starts again must not begin with a1 while a2 runs."""
    cluster.on_create = fail(cluster, times=2)
    with pytest.raises(StorageFault):
        launch(attempts=2)
    cluster.delete_job("run-7-lora-a1")
    launch(attempts=3)
    assert list(cluster.jobs) == ["run-7-lora-a2", "run-7-lora-a3"]


@pytest.mark.parametrize("backend", ["pytorchjob", "trainjob"])
def test_wrong_input_ends_with_its_line_and_no_job(cluster, launch, backend):
    def operate(job) -> None:
        run(cluster, job)
        # OnFailure: the kubelet has already started the container again
        cluster.set_pod(name_of(job), "Running", 2, "error: --dataset x: mend it", last=True)

    cluster.on_create = operate
    with pytest.raises(InputError, match=r"^--dataset x: mend it$"):
        launch(backend=backend)
    assert not cluster.jobs
    assert not cluster.of_kind("NetworkPolicy")
    assert cluster.posts() == 1


def test_a_pod_of_an_earlier_job_of_that_name_says_nothing(cluster, launch):
    """A launcher was cancelled and started again: the first job's pods are still on their way out."""
    cluster.put_job("run-7-lora-a1")
    cluster.set_pod("run-7-lora-a1", "Running", 2, "error: long ago")
    with cluster.changed:
        cluster.objects.pop(f"{ROOTS['PyTorchJob']}/run-7-lora-a1")

    def operate(job) -> None:
        cluster.until(lambda: ("GET", ROOTS["Pod"]) in cluster.requests)
        cluster.remove(f"{ROOTS['Pod']}/{cluster.pod(name_of(job))[0]}")
        succeed(cluster)(job)

    cluster.on_create = operate
    launch()


def test_a_job_that_was_deleted_from_outside_is_a_fault(cluster, launch):
    cluster.on_create = lambda job: cluster.delete_job(name_of(job))
    with pytest.raises(StorageFault, match="deleted from outside"):
        launch()


def test_a_job_without_a_result_is_no_success(cluster, launch):
    cluster.on_create = lambda job: cluster.set_condition(name_of(job), "Succeeded")
    with pytest.raises(StorageFault, match="a3 failed: its Master ended with 0, and published no result"):
        launch()


def test_the_end_of_a_deadline_is_no_reason_for_another_attempt(cluster, launch):
    cluster.on_create = lambda job: cluster.set_condition(name_of(job), "Late")
    with pytest.raises(StorageFault, match="raise --deadline-seconds"):
        launch()
    assert cluster.posts() == 1


# --- its queue --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["pytorchjob", "trainjob"])
def test_a_job_may_wait_in_its_queue_for_hours_and_be_sent_back_to_it(cluster, launch, caplog, backend):
    """Kueue admits it, takes its nodes for another, and admits it again. Its deadline is no limit to its waiting."""

    def operate(job) -> None:
        name = name_of(job)
        cluster.set_condition(name, "Suspended")
        with cluster.changed:
            waiting_since = (datetime.now(UTC) - timedelta(hours=7)).strftime("%Y-%m-%dT%H:%M:%SZ")
            cluster.objects[f"{ROOTS[job['kind']]}/{name}"]["metadata"]["creationTimestamp"] = waiting_since
        for _ in range(2):
            run(cluster, job)
            cluster.until(lambda: caplog.text.count("a1: running") > evicted.count(1))
            if job["kind"] == "TrainJob":
                cluster.delete(f"{ROOTS['Pod']}/{cluster.pod(name)[0]}")
            cluster.set_condition(name, "Suspended")
            cluster.until(lambda: caplog.text.count("waits in its queue") > evicted.count(1))
            evicted.append(1)
        succeed(cluster)(job)

    evicted: list[int] = []
    cluster.on_create = operate
    with caplog.at_level("INFO"):
        launch(queue="gpus", deadline_seconds=60, backend=backend)
    assert len(evicted) == 2


def test_a_job_that_waits_for_too_long_is_given_up(cluster, launch, monkeypatch):
    monkeypatch.setattr("components.launch_training.follower.LOOK_EVERY", 0.05)
    cluster.on_create = lambda job: cluster.set_condition(name_of(job), "Suspended")
    with pytest.raises(StorageFault, match=r"waited \d+ s for queue gpus \(.*raise --waiting-seconds"):
        launch(queue="gpus", waiting_seconds=0.2)
    assert not cluster.jobs


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"unschedulable": "0/9 nodes are available: 9 Insufficient nvidia.com/gpu"}, "Unschedulable: 0/9 nodes"),
        ({"waiting": "ImagePullBackOff", "message": "no such image"}, "ImagePullBackOff: no such image"),
        ({"waiting": "CreateContainerConfigError", "message": 'secret "s3" not found'}, 'secret "s3" not found'),
    ],
)
def test_what_keeps_a_pod_from_starting_is_said(cluster, launch, caplog, told, said):
    def operate(job) -> None:
        cluster.set_pod(name_of(job), "Pending", **told)
        cluster.until(lambda: said in caplog.text)
        succeed(cluster)(job)

    cluster.on_create = operate
    with caplog.at_level("INFO"):
        launch()


def test_what_the_operator_complains_of_is_said_once(cluster, launch, caplog):
    def operate(job) -> None:
        cluster.warn(name_of(job), "FailedCreatePod", 'violates PodSecurity "restricted:latest"')
        for _ in range(3):
            cluster.set_condition(name_of(job), "Created")
            cluster.until(lambda: "violates PodSecurity" in caplog.text)
        succeed(cluster)(job)

    cluster.on_create = operate
    launch()
    assert caplog.text.count("violates PodSecurity") == 1


# --- a launcher that starts again, and two at once --------------------------------------------------------------------


@pytest.mark.slow
def test_two_launchers_follow_one_job_and_both_pass_its_lines_on(cluster, command):
    def operate(job) -> None:
        run(cluster, job, "step 1/2: loss 9.00")
        cluster.until(lambda: sum(one.path.endswith("/log") for one in cluster.asked) >= 2)
        cluster.write_log(cluster.pod(name_of(job))[0], "step 2/2: loss 8.00")
        succeed(cluster)(job)

    cluster.on_create = operate
    launchers = [command("--backend", "pytorchjob", "--run-id", "run-7") for _ in range(2)]
    said = [one.communicate(timeout=120)[1] for one in launchers]
    assert [one.returncode for one in launchers] == [0, 0], said
    assert list(cluster.jobs) == ["run-7-lora-a1"]
    for lines in said:
        assert [line for line in lines.splitlines() if "loss" in line] == [
            "run-7-lora-a1-master-0 | step 1/2: loss 9.00",
            "run-7-lora-a1-master-0 | step 2/2: loss 8.00",
        ]


def ended(launch) -> None:
    with pytest.raises(StorageFault):
        launch()


def test_a_job_that_is_being_deleted_is_waited_for_and_made_anew(cluster, launch, caplog):
    """A cancelled launcher's job is held by a finalizer; the next launcher does not follow it into its grave."""
    labels = {f"zhllama.io/{name}": value for name, value in (("run", "run-7"), ("stage", "lora"))}
    first = threading.Thread(target=ended, args=(launch,))
    first.start()
    # it follows its job
    cluster.until(lambda: any("/events" in path for _, path in cluster.requests))
    path = f"{ROOTS['PyTorchJob']}/run-7-lora-a1"
    with cluster.changed:
        assert labels.items() <= cluster.objects[path]["metadata"]["labels"].items()
        cluster.objects[path]["metadata"]["finalizers"] = ["a/finalizer"]
    cluster.delete(path)
    old = cluster.jobs["run-7-lora-a1"]["metadata"]["uid"]
    # a result that is there would be the first one's too
    cluster.on_create = lambda job: (first.join(120), succeed(cluster)(job))
    second = threading.Thread(target=launch)
    with caplog.at_level("INFO"):
        second.start()
        cluster.until(lambda: "waiting for its end" in caplog.text)
    with cluster.changed:
        del cluster.objects[path]["metadata"]["finalizers"]
        cluster.delete(path)
    second.join(120)
    first.join(120)
    assert cluster.jobs["run-7-lora-a1"]["metadata"]["uid"] != old


def test_a_job_of_that_name_with_other_work_is_not_followed(cluster, launch):
    cluster.put_job("run-7-lora-a1", labels={"zhllama.io/key": "other"})
    with pytest.raises(InputError, match="there is another training job team/run-7-lora-a1"):
        launch()
    assert list(cluster.jobs) == ["run-7-lora-a1"]


# --- the API server's moods -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=500),
        Fault(status=503),
        Fault(status=429, headers={"Retry-After": "0.01"}),
        Fault(lose="before"),
        Fault(lose="after"),
    ],
    ids=["500", "503", "429", "lost question", "lost answer"],
)
def test_a_busy_api_server_is_asked_again_and_makes_one_job(cluster, launch, fault):
    """Every request of a kind fails twice, whatever it asks."""
    cluster.on_create = succeed(cluster)
    met: dict[tuple[str, str], int] = {}

    def twice(method: str, path: str) -> Fault | None:
        met[method, path] = met.get((method, path), 0) + 1
        return fault if met[method, path] <= 2 and not path.endswith("/log") else None

    cluster.fault = twice
    launch()
    assert list(cluster.jobs) == ["run-7-lora-a1"]


@pytest.mark.parametrize("fault", [410, Fault(cut=100), Fault(cut=100, cleanly=True), Fault(lose="before")])
def test_watches_may_break_at_any_time(cluster, launch, fault):
    broken = []

    def break_watches(method: str, path: str) -> Fault | int | None:
        if method != "WATCH" or len(broken) > 6:
            return None
        broken.append(path)
        return fault

    cluster.fault = break_watches
    cluster.on_create = lambda job: (cluster.until(lambda: len(broken) > 5), succeed(cluster)(job))
    launch()


def test_an_expired_watch_begins_anew(cluster, launch, monkeypatch):
    """Each watch ends at once, and its resourceVersion is forgotten."""
    monkeypatch.setattr("components.launch_training.follower.WATCH_SECONDS", 0)
    monkeypatch.setattr("components.launch_training.follower.LONGEST_REWATCH", 0.02)

    def operate(job) -> None:
        watches = sum(one.method == "WATCH" for one in cluster.asked)
        cluster.forget()
        cluster.until(lambda: sum(one.method == "WATCH" for one in cluster.asked) > watches + 4)
        succeed(cluster)(job)

    cluster.on_create = operate
    launch()


def test_without_any_watch_the_job_is_looked_at_now_and_then(cluster, launch, monkeypatch):
    monkeypatch.setattr("components.launch_training.follower.LOOK_EVERY", 0.05)
    cluster.fault = lambda method, path: 403 if method == "WATCH" else None
    cluster.on_create = succeed(cluster)
    launch()


def test_an_api_server_that_stays_away_is_a_fault(cluster, launch, monkeypatch):
    monkeypatch.setattr("zhllama.kubernetes.api.GIVE_UP_AFTER", 0.1)
    cluster.fault = lambda method, path: Fault(lose="before")
    with pytest.raises(StorageFault, match="API server cannot be reached"):
        launch()


@pytest.mark.parametrize(
    ("status", "mend"), [(403, "Role zhllama-runner"), (404, "install the training operator"), (422, "mend the job")]
)
def test_a_refused_job_is_wrong_input(cluster, launch, status, mend):
    cluster.fault = lambda method, path: status if method == "POST" and "pytorchjobs" in path else None
    with pytest.raises(InputError, match=f"was refused: {status} .*{mend}"):
        launch()
    assert cluster.posts() == 1
    assert not cluster.of_kind("NetworkPolicy")


@pytest.mark.parametrize(
    ("words", "mend"),
    [
        ('pods "a" is forbidden: exceeded quota: team, requested: pods=1', "free some of the quota"),
        ('admission webhook "validator.pytorchjob" denied the request: no image', "mend what it names"),
        ("because it is being terminated", "give another --namespace"),
        ('User "a" cannot create resource', "give this account the Role zhllama-runner"),
    ],
    ids=["quota", "webhook", "namespace that goes", "role"],
)
def test_a_403_is_mended_by_what_the_server_says(words, mend):
    error = ApiException(403)
    error.body = json.dumps({"message": words})
    said = str(refused(PYTORCHJOB, TrainingJob(name="j", command=("true",)), error))
    assert words in said
    assert mend in said


def test_a_webhook_that_is_away_is_said_and_waited_for(cluster, launch, caplog):
    """The recorded answer of a server whose webhook has no endpoints."""
    cluster.on_create = succeed(cluster)
    answers = iter([500] * 5)
    cluster.fault = lambda method, path: next(answers, None) if method == "POST" and "pytorchjobs" in path else None
    launch()
    said = [line for line in caplog.messages if "trying again" in line]
    assert len(said) == 1
    assert said[0].startswith("the Kubernetes API server: 500 ")


@pytest.mark.parametrize("words", ["failed to create typed patch object (a/b): .spec.x: field not declared in schema"])
def test_a_500_that_will_be_one_for_ever_is_not_asked_again(words):
    error = ApiException(500)
    error.body = json.dumps({"message": words})
    assert not passes(error)


def test_a_job_that_another_launcher_made_a_moment_ago_is_heard_too(cluster, monkeypatch):
    """Its uid is not known: of those of its name that are there it is the one."""
    monkeypatch.setattr("components.launch_training.follower.LOOK_EVERY", 0.05)
    cluster.put_job("run-7-lora-a1")
    words = "Error pod run-7-lora-a1-master-0 container pytorch exitCode: 2 terminated message: error: no such layer"
    cluster.warn("run-7-lora-a1", "Error", words, uid=cluster.jobs["run-7-lora-a1"]["metadata"]["uid"])
    job = TrainingJob(name="run-7-lora-a1", command=("train",), namespace="team")
    verdict, _ = Follower(Cluster(PYTORCHJOB), 1, lambda: False, lambda: False).follow(job, "")
    assert (verdict.state, verdict.reason) == (State.WRONG_INPUT, "no such layer")


def test_events_of_an_earlier_job_of_the_same_name_say_nothing(cluster, launch):
    """They outlive their job by an hour: one that had wrong input must not end the next."""
    words = "Error pod run-7-lora-a1-master-0 container pytorch exitCode: 2 terminated message: error: long ago"
    cluster.warn("run-7-lora-a1", "Error", words, uid="uid-of-an-earlier-one")
    cluster.on_create = succeed(cluster)
    assert launch().kind == "adapter"


def test_half_a_job_is_not_running(cluster, launch, caplog):
    """The Master trains alone, and its Worker cannot be placed: the condition says Running."""
    said = "running, but 1 of 2 nodes alone; pod run-7-lora-a1-worker-0: Unschedulable: 0/9 nodes are available"

    def operate(job) -> None:
        name = name_of(job)
        cluster.set_pod(name, "Running")
        cluster.set_pod(name, "Pending", unschedulable="0/9 nodes are available", index=1)
        cluster.until(lambda: said in caplog.text)
        cluster.set_pod(name, "Running", index=1)
        train(job)
        for index in range(2):
            cluster.set_pod(name, "Succeeded", 0, index=index)

    cluster.on_create = operate
    with caplog.at_level("INFO"):
        launch(nodes=2)


def test_half_a_job_is_waited_for_no_longer_than_a_whole_one(cluster, launch, monkeypatch):
    """A refused pod leaves the job without a status, for ever: no deadline of the operator's runs."""
    monkeypatch.setattr("components.launch_training.follower.LOOK_EVERY", 0.05)

    def operate(job) -> None:
        cluster.set_pod(name_of(job), "Running")
        cluster.warn(name_of(job), "FailedCreatePod", 'Error creating: pods "x" is forbidden: exceeded quota: team')

    cluster.on_create = operate
    with pytest.raises(StorageFault, match=r"waited \d+ s .*1 of 2 nodes alone; FailedCreatePod: .*exceeded quota"):
        launch(nodes=2, waiting_seconds=0.3)
    assert not cluster.jobs


def test_the_launcher_ends_a_job_that_outlives_its_deadline(cluster, launch, monkeypatch):
    monkeypatch.setattr("components.launch_training.follower.LOOK_EVERY", 0.05)
    monkeypatch.setattr("components.launch_training.job_state.LATE", 0.1)
    cluster.on_create = lambda job: run(cluster, job)
    with pytest.raises(StorageFault, match=r"did not end at its deadline of 1 s; raise --deadline-seconds"):
        launch(deadline_seconds=1, grace_seconds=1)
    assert not cluster.jobs


def test_what_the_account_may_not_is_named(cluster, launch):
    cluster.on_create = succeed(cluster)
    cluster.fault = lambda method, path: 403 if path.endswith("/pods") and method == "GET" else None
    with pytest.raises(InputError, match=r"API server refused: 403 .*check the account and its Role"):
        launch()


def test_without_a_cluster_the_way_out_is_named(launch, monkeypatch, tmp_path):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "missing"))
    with pytest.raises(InputError, match="no Kubernetes cluster is configured"):
        launch()


# --- what is created --------------------------------------------------------------------------------------------------


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


def test_an_elastic_job_runs_with_workers_alone_and_its_first_is_heard(cluster, launch, capfd):
    def operate(job) -> None:
        run(cluster, job, "step 1/1: loss 9.00")
        # a node is lost, and comes back
        cluster.set_pod(name_of(job), "Failed", 1, "fault: lost its peer", index=1)
        succeed(cluster)(job)

    cluster.on_create = operate
    launch(nodes=2, min_nodes=1, max_nodes=4, **PLAIN)
    (job,) = cluster.jobs.values()
    assert list(job["spec"]["pytorchReplicaSpecs"]) == ["Worker"]
    assert (job["spec"]["elasticPolicy"]["minReplicas"], job["spec"]["elasticPolicy"]["maxReplicas"]) == (1, 4)
    assert "run-7-lora-a1-worker-0 | step 1/1: loss 9.00" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"min_nodes": 1, "max_nodes": 4}, "with --deepspeed zero2: ZeRO's checkpoints"),
        ({"min_nodes": 1, "max_nodes": 4, "backend": "trainjob", **PLAIN}, "a trainjob job cannot be elastic"),
        ({"min_nodes": 1, "max_nodes": 4, "backend": "local", **PLAIN}, "a local job cannot be elastic"),
        ({"min_nodes": 3, "max_nodes": 4, **PLAIN}, "in that order"),
    ],
    ids=["ZeRO", "TrainJob", "local", "range"],
)
def test_what_cannot_be_elastic_is_refused_before_there_is_a_job(cluster, launch, options, said):
    with pytest.raises(InputError, match=said):
        launch(**options)
    assert not cluster.posts()


def test_a_job_has_a_policy_of_its_own_while_it_lives(cluster, launch, monkeypatch):
    monkeypatch.setenv("ZHLLAMA_S3_ENDPOINT", "http://127.0.0.1:7480")
    cluster.on_create = succeed(cluster)
    launch()
    (job,), (policy,) = cluster.jobs.values(), cluster.of_kind("NetworkPolicy").values()
    assert policy["metadata"]["labels"]["zhllama.io/run"] == "run-7"
    *_, s3 = policy["spec"]["egress"]
    assert 7480 in [one["port"] for one in s3["ports"]]
    # it goes with the job, without anybody's right to delete it
    (owner,) = policy["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"]) == ("PyTorchJob", job["metadata"]["uid"])
    assert not [path for method, path in cluster.requests if method == "DELETE" and "networkpolicies" in path]


def test_without_the_right_to_make_policies_the_job_runs_and_it_is_said(cluster, launch, caplog):
    cluster.on_create = succeed(cluster)
    cluster.fault = lambda method, path: 403 if "networkpolicies" in path else None
    launch()
    assert "run-7-lora-a1 gets no NetworkPolicy of its own (403" in caplog.text


def test_in_a_pipeline_the_runs_workflow_owns_the_job(cluster, launch, monkeypatch, tmp_path):
    """And it is owned so that deleting the run deletes it, and nothing waits for it."""
    monkeypatch.setattr("components.launch_training.cluster.ACCOUNT", tmp_path)
    monkeypatch.setenv("HOSTNAME", "step-pod")
    workflow = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "run-abc", "uid": "uid-run-abc"}
    pod = {"name": "step-pod", "namespace": "team", "ownerReferences": [{**workflow, "controller": True}]}
    cluster.put(f"{ROOTS['Pod']}/step-pod", {"apiVersion": "v1", "kind": "Pod", "metadata": pod, "status": {}})
    seen = []
    cluster.before_create = lambda thing: seen.append((thing["kind"], thing["metadata"].get("ownerReferences")))
    cluster.on_create = succeed(cluster)
    launch()
    own = {"controller": False, "blockOwnerDeletion": False}
    assert [owners for kind, owners in seen if kind == "PyTorchJob"] == [[workflow | own]]
    (job,) = [owner for kind, owners in seen if kind == "NetworkPolicy" for owner in owners]
    assert (job["kind"], job["name"]) == ("PyTorchJob", "run-7-lora-a1")


def step_pod(cluster, name: str, *owners: dict[str, object]) -> None:
    """The pod of a launcher."""
    metadata = {"name": name, "namespace": "team", "ownerReferences": list(owners)}
    cluster.put(f"{ROOTS['Pod']}/{name}", {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "status": {}})


WORKFLOWS = {
    run: {
        "apiVersion": "argoproj.io/v1alpha1",
        "kind": "Workflow",
        "name": run,
        "uid": f"uid-{run}",
        "controller": True,
    }
    for run in ("run-1", "run-2")
}


@pytest.fixture
def named(cluster, monkeypatch, tmp_path):
    """`named(pod)`: the name of the job that a launcher without a run id makes in that pod."""
    monkeypatch.setattr("components.launch_training.cluster.ACCOUNT", tmp_path)
    config = LaunchTraining(stage="embeddings", model="m", dataset="d", store="s3://bucket", **PLAIN)

    def name(pod: str) -> str:
        monkeypatch.setenv("HOSTNAME", pod)
        return training_job(config, "0" * 32, ("true",), 1, Cluster(PYTORCHJOB).starter()).name

    return name


def test_without_a_run_id_two_runs_have_two_jobs(cluster, named):
    step_pod(cluster, "step-1", WORKFLOWS["run-1"])
    step_pod(cluster, "step-2", WORKFLOWS["run-2"])
    step_pod(cluster, "by-hand-1")
    step_pod(cluster, "by-hand-2")
    assert len({named(pod) for pod in ("step-1", "step-2", "by-hand-1", "by-hand-2")}) == 4


def test_without_a_run_id_the_next_pod_of_the_run_finds_its_job(cluster, named):
    step_pod(cluster, "step", WORKFLOWS["run-1"])
    step_pod(cluster, "step-again", WORKFLOWS["run-1"])
    assert named("step") == named("step-again")
    step_pod(cluster, "by-hand")
    assert named("by-hand") == named("by-hand")


def test_without_a_run_id_a_pod_that_may_not_be_read_is_told_by_its_name(cluster, named):
    cluster.fault = lambda method, path: 403 if "/pods/" in path else None
    assert named("step-1") == named("step-1") != named("step-2")


def test_without_a_run_id_a_server_that_does_not_answer_names_no_job(cluster, named, monkeypatch):
    monkeypatch.setattr("zhllama.kubernetes.api.GIVE_UP_AFTER", 0.1)
    step_pod(cluster, "step", WORKFLOWS["run-1"])
    cluster.fault = lambda method, path: 503
    with pytest.raises(StorageFault):
        named("step")


def test_a_launcher_without_a_run_id_names_its_job_after_the_run_of_its_pod(cluster, launch, named):
    step_pod(cluster, "step", WORKFLOWS["run-1"])
    named("step")
    cluster.on_create = succeed(cluster)
    launch(run_id="")
    (job,) = cluster.jobs.values()
    starter = hashlib.sha256(b"uid-run-1").hexdigest()[:8]
    assert re.fullmatch(rf"run-[0-9a-f]{{8}}-{starter}-lora-a1", name_of(job))
    assert name_of(job).startswith(job["metadata"]["labels"]["zhllama.io/run"])


# --- what is left -----------------------------------------------------------------------------------------------------


def test_the_last_lines_of_every_attempt_stay_in_the_store(cluster, launch, tmp_path, caplog):
    def operate(job) -> None:
        run(cluster, job, "step 1/2: loss 9.00", "Traceback: a bug")
        cluster.until(lambda: len({one.path for one in cluster.asked if one.method == "FOLLOW"}) == cluster.posts())
        give_up(cluster, job)

    cluster.on_create = operate
    with pytest.raises(StorageFault):
        launch(attempts=2)
    (folder,) = (tmp_path / "store" / "launch_training").glob("*/logs")
    assert sorted(path.name for path in folder.iterdir()) == ["run-7-lora-a1.txt", "run-7-lora-a2.txt"]
    said = storage.read_bytes(str(folder / "run-7-lora-a2.txt")).decode()
    assert said.splitlines() == [
        "run-7-lora-a2-master-0 | step 1/2: loss 9.00",
        "run-7-lora-a2-master-0 | Traceback: a bug",
    ]


def test_a_log_that_went_with_its_pod_before_the_first_look_is_said_not_to_be_heard(cluster, launch, caplog):
    failed = threading.Event()

    def operate(job) -> None:
        run(cluster, job, "Traceback: a bug")
        give_up(cluster, job)
        failed.set()

    cluster.on_create = operate
    cluster.fault = lambda method, path: Fault(hold=failed) if method == "POST" and "networkpolicies" in path else None
    with pytest.raises(StorageFault):
        launch(attempts=1)
    assert "training job run-7-lora-a1: no line of its log was heard: no pod of it was seen to run" in caplog.text
