"""A launcher on a real cluster: what it is shown is recorded (tests/recordings), what it says and does is held here.

tests/goldens/launcher.json has each course's lines, changes of the cluster and end; `UPDATE_GOLDENS=1` writes it again.
"""

import io
import re

import pytest

from components.launch_training.launcher import launch_training
from components.launch_training.options import LaunchTraining
from tests import golden
from tests.components.launch_training.operators import succeed
from tests.components.launch_training.replay import Clock, Played, options_of
from tests.kubernetes_server import Fault
from tests.recordings import answered
from zhllama.errors import InputError, StorageFault
from zhllama.stage.run import run_stage

GOLDENS = golden.GOLDENS / "launcher.json"


@pytest.fixture(autouse=True)
def brisk(monkeypatch):
    """No test waits for a back-off; a launcher looks again at once."""
    monkeypatch.setattr("zhllama.kubernetes.api.FIRST_WAIT", 0.01)
    monkeypatch.setattr("components.launch_training.follower.LOOK_EVERY", 0.01)
    for module, name in (("job_log", "WAIT"), ("follower", "REWATCH")):
        for which in ("FIRST", "LONGEST"):
            monkeypatch.setattr(f"components.launch_training.{module}.{which}_{name}", 0.02)


@pytest.fixture
def launch(tiny_model, packed_text, tmp_path):
    """`launch(**options)`: the stage, in this process, on the cluster."""

    def run_it(**options):
        chosen = {"stage": "lora", "model": tiny_model, "dataset": packed_text, "store": str(tmp_path / "store")}
        return run_stage(LaunchTraining(**{**chosen, "run_id": "r", "attempts": 1, **options}), launch_training)

    return run_it


# --- recorded jobs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def follow(cluster, launch, monkeypatch, caplog, tmp_path):
    """`follow(*recordings)`: what a launcher does whose jobs take these courses, one a job."""

    def said(prefix: str = "{level}: ") -> list[str]:
        ours = [one for one in [*caplog.records] if one.name == "launch"]
        return [prefix.format(level=one.levelname.lower()) + scrubbed(one.getMessage()) for one in ours]

    def scrubbed(text: str) -> str:
        text = re.sub(rf"{re.escape(str(tmp_path))}\S*/logs/", "STORE/logs/", text)
        # a part of it is this machine's time
        return re.sub(r"(waited|ran) \d+ s", r"\1 N s", text)

    def run_it(*names: str):
        clock, heard = Clock(), io.StringIO()
        monkeypatch.setattr("components.launch_training.follower.time", clock)
        monkeypatch.setattr("sys.stderr", heard)
        cluster.on_create = played = Played(cluster, clock, heard, lambda: said(""), *names)
        ended = "succeeded"
        with caplog.at_level("INFO"):
            try:
                launch(**options_of(names[0]), attempts=len(names))
            except (InputError, StorageFault) as error:
                ended = scrubbed(f"{type(error).__name__}: {error}")
        assert played.error is None
        # each line once, of every container that began
        assert sorted(heard.getvalue().splitlines()) == sorted(played.ran)
        asked = [f"{method} {path.partition('/team/')[2]}" for method, path in cluster.requests]
        return {"said": said(), "did": [one for one in asked if not one.startswith("GET")], "ended": ended}

    return run_it


COURSES = [
    "success", "elastic-worker-fails", "suspended-past-deadline", "ttl-0", "quota-second-pod", "pss-restricted",
    "configmap-volume-missing", "secret-missing", "image-pull-backoff", "exit-1-onfailure", "exit-2-onfailure", "oom",
    "command-missing", "evicted-api", "preempted", "deadline-touched", "deadline-master-alone",
    "deadline-while-pending", "deleted-while-running", "deleted-foreground",
    # to its success
    "success-worker-runs-on", "suspend-running", "backoff-sums-below", "pod-deleted-master", "pod-deleted-onfailure",
    # what keeps it from its beginning
    "quota-must-specify", "service-account-missing", "priority-class-missing", "invalid-pod-mount", "claim-missing",
    "unschedulable-gpu", "non-root-image", "image-invalid-name", "no-replicas", "init-gives-up",
    # what ends it
    "exit-1-never", "exit-2-onfailure-two-workers", "worker-fails-never", "oom-child", "sigkill-never", "backoff-sums",
    "log-after-failure", "master-ends-worker-refused", "evicted-by-kubelet", "pod-deleted-never", "deadline",
    "deadline-while-refused", "deadline-while-quota", "deleted-and-created",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", COURSES)
def test_a_recorded_job_is_followed_to_its_end(follow, name):
    golden.check(GOLDENS, name, follow(name))


def test_an_attempt_that_failed_is_followed_by_one_that_succeeds(follow):
    golden.check(GOLDENS, "log-after-failure, ttl-0", follow("log-after-failure", "ttl-0"))


# --- what the API server answers --------------------------------------------------------------------------------------


def only(method: str, place: str, name: str, times: int = 1000):
    """The recorded answer of that name, to so many requests of that kind."""
    left = iter(range(times))

    def fault(asked: str, path: str) -> Fault | None:
        hit = asked == method and place in path and next(left, None) is not None
        return Fault(recorded=answered(name)) if hit else None

    return fault


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("quota/count-pytorchjobs", r"403 pytorchjobs.kubeflow.org .* exceeded quota: .*; free some of the quota"),
        ("unprocessable/webhook", r'403 admission webhook "validator.pytorchjob.* denied the request.*; mend what it'),
        ("unprocessable/crd", r"422 PyTorchJob.kubeflow.org .* is invalid: .*spec.runPolicy.*; mend the job's options"),
        ("policy/deny-pytorchjob", r"403 .*every object needs a label team; mend what it names"),
        ("namespace/terminating-pytorchjob", r"403 .*because it is being terminated; give another --namespace"),
        ("rbac/create", r"403 .*cannot create resource .*; give this account the Role zhllama-runner"),
        ("not-found/group", r"404 Not Found; install the training operator, or check --namespace"),
    ],
)
def test_a_job_that_is_refused_leaves_nothing_and_says_how_to_mend_it(cluster, launch, name, said):
    cluster.fault = only("POST", "pytorchjobs", name)
    with pytest.raises(InputError, match=f"^training job team/r-lora-a1 was refused: {said}"):
        launch()
    assert cluster.posts() == 1
    assert not cluster.of_kind("NetworkPolicy")


def test_a_job_that_is_too_large_is_refused_once(cluster, launch):
    """Of all 500s this one stays."""
    cluster.fault = only("POST", "pytorchjobs", "large/etcd")
    with pytest.raises(StorageFault, match="500 etcdserver: request is too large"):
        launch()
    assert cluster.posts() == 1


def test_a_webhook_without_endpoints_is_said_and_waited_for(cluster, launch, caplog):
    cluster.on_create = succeed(cluster)
    cluster.fault = only("POST", "pytorchjobs", "webhook/no-endpoints-pytorchjob", times=5)
    launch()
    assert cluster.posts() == 6
    (said,) = [line for line in caplog.messages if "trying again" in line]
    words = 'the Kubernetes API server: 500 Internal error occurred: failed calling webhook "rec-away.example.com": '
    assert said.startswith(words)
    assert "connect: connection refused" in said


@pytest.mark.parametrize(
    ("place", "name", "said"),
    [
        ("/pytorchjobs", "rbac/list", r'was refused: 403 .*cannot list resource "pytorchjobs" .*Role zhllama-runner'),
        ("/pytorchjobs/r", "rbac/get", r"API server refused: 403 .*cannot get resource .*; check the account and its"),
        ("/pytorchjobs", "auth/wrong-token", r"API server refused: 401 Unauthorized; check the account and its Role"),
    ],
)
def test_what_the_account_may_not_is_said_in_the_servers_words(cluster, launch, place, name, said):
    cluster.on_create = succeed(cluster)
    cluster.fault = only("GET", place, name)
    with pytest.raises(InputError, match=said):
        launch()


def test_a_job_that_may_not_be_deleted_is_said(cluster, launch):
    """Its training says that its input is wrong, and the Role lacks `delete`."""
    cluster.on_create = lambda job: cluster.set_pod(job["metadata"]["name"], "Running", 2, "error: mend it", last=True)
    cluster.fault = only("DELETE", "pytorchjobs", "rbac/delete")
    with pytest.raises(InputError, match=r"refused: 403 .*cannot delete resource .*; check the account and its Role"):
        launch()
