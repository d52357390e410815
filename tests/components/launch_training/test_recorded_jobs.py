"""A launcher on a real cluster: what it is shown is recorded (tests/recordings), what it says and does is held here.

tests/goldens/launcher.json has each course's lines, changes of the cluster and end; `UPDATE_GOLDENS=1` writes it again.
"""

import io
import json
import re
import threading
from concurrent.futures import Future
from functools import partial

import pytest
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from components.launch_training.cluster import Cluster
from tests import golden
from tests.components.launch_training.fake_cluster import ROOTS
from tests.components.launch_training.operators import succeed
from tests.components.launch_training.replay import Clock, Played, options_of
from tests.kubernetes_server import Fault
from tests.recordings import answered
from zhllama.errors import InputError, StorageFault
from zhllama.kubernetes.api import call, connect
from zhllama.kubernetes.job_kinds import PYTORCHJOB

GOLDENS = golden.GOLDENS / "launcher.json"


pytestmark = pytest.mark.usefixtures("brisk")


@pytest.fixture
def launch(stage):
    """`launch(**options)`: the stage, in this process, on the cluster."""
    return partial(stage, run_id="r", attempts=1)


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
            finally:
                played.leave()
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
        (
            "unprocessable/webhook",
            r'403 admission webhook "validator.pytorchjob.* denied .*; mend what .* \(--nodes\)$',
        ),
        (
            "unprocessable/crd",
            r"422 .* is invalid: .*spec.runPolicy.*; mend the job's options \(--processes-per-node\)$",
        ),
        ("policy/deny-pytorchjob", r"403 .*every object needs a label team; mend what it names \(--labels\)$"),
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


def test_a_namespace_that_goes_is_a_fault(cluster, launch):
    """Nobody's options are wrong: the step may be started again when there is one."""
    cluster.fault = only("POST", "pytorchjobs", "namespace/terminating-pytorchjob")
    with pytest.raises(StorageFault, match=r"^training job team/r-lora-a1 was refused: 403 .*because it is being term"):
        launch()
    assert cluster.posts() == 1
    assert not cluster.of_kind("NetworkPolicy")


FULL = "quota/count-pytorchjobs"


@pytest.mark.parametrize("place", ["pytorchjobs"])
def test_a_quota_without_room_is_waited_for_and_said_once_a_minute(cluster, launch, caplog, monkeypatch, place):
    clock = Clock()
    monkeypatch.setattr("components.launch_training.cluster_job.time", clock)
    cluster.on_create = succeed(cluster)
    full = only("POST", place, FULL, times=12)

    def fault(method, path):
        # a quarter of a minute between two tries
        clock.at += 15 * (method == "POST" and place in path)
        return full(method, path)

    cluster.fault = fault
    launch()
    said = [line for line in caplog.messages if "exceeded quota" in line]
    assert len(said) == 3
    assert said[0].startswith("training job r-lora-a1: waiting: not created: 403 pytorchjobs.kubeflow.org ")
    # of those that were taken back, none is left
    owners = [one["metadata"]["ownerReferences"][0]["uid"] for one in cluster.of_kind("NetworkPolicy").values()]
    assert owners == [job["metadata"]["uid"] for job in cluster.jobs.values()]


def test_a_quota_that_stays_full_is_waited_for_no_longer_than_pods_are(cluster, launch):
    cluster.fault = only("POST", "pytorchjobs", FULL)
    said = r"a1: it waited \d+ s \(not created: 403 .*exceeded quota.*\); raise --waiting-seconds, or ask for less$"
    with pytest.raises(StorageFault, match=said):
        launch(waiting_seconds=0.1)
    assert cluster.posts() > 1
    assert not cluster.of_kind("NetworkPolicy")


def test_a_job_that_another_launcher_made_while_a_quota_was_full_is_followed(cluster, launch):
    """The other's job took the last of it: a quota is asked before whether the name is there."""
    first = launch_in_thread(launch)
    cluster.until(lambda: any("/events" in path for _, path in cluster.requests))
    cluster.fault = only("POST", "pytorchjobs", FULL)
    second = launch_in_thread(launch)
    cluster.until(lambda: sum(one.method == "WATCH" for one in cluster.asked) >= 4)
    succeed(cluster)(next(iter(cluster.jobs.values())))
    assert [one.result(60).kind for one in (first, second)] == ["adapter", "adapter"]
    assert list(cluster.jobs) == ["r-lora-a1"]


def test_a_job_that_cannot_be_made_leaves_no_policy(cluster, launch, monkeypatch, caplog):
    monkeypatch.setattr("zhllama.kubernetes.api.GIVE_UP_AFTER", 0.05)
    cluster.fault = only("POST", "pytorchjobs", "webhook/no-endpoints-pytorchjob")
    with pytest.raises(StorageFault, match=r'failed calling webhook "rec-away\.example\.com"'):
        launch()
    assert not cluster.of_kind("NetworkPolicy")


def test_a_webhook_that_is_away_is_said_at_its_first_failure_and_then_once_a_minute(caplog, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("tenacity.time.monotonic", clock.monotonic, raising=False)
    monkeypatch.setattr("zhllama.kubernetes.api.LONGEST_WAIT", 0.01)
    error = ApiException(500)
    error.body = json.dumps(answered("webhook/no-endpoints-pytorchjob")["body"])
    tries = iter(range(14))

    def request(_request_timeout):
        clock.at += 10
        if next(tries, None) is not None:
            raise error
        return {"kind": "PyTorchJob"}

    assert call(request)
    said = [line for line in caplog.messages if "trying again" in line]
    assert said[0].endswith("; trying again")
    assert "failed calling webhook" in said[0]
    assert 2 <= len(said) <= 4


def test_a_quota_that_is_counted_for_others_too_is_asked_again(cluster, launch):
    """`Conflict` on the quota itself: 409, and no job of that name."""
    words = 'Operation cannot be fulfilled on resourcequotas "team": the object has been modified'
    conflict = {"status": 409, "body": {"kind": "Status", "reason": "Conflict", "message": words, "code": 409}}
    answers = iter([Fault(recorded=conflict)] * 3)
    cluster.on_create = succeed(cluster)
    cluster.fault = lambda method, path: next(answers, None) if method == "POST" and "pytorchjobs" in path else None
    assert launch().kind == "adapter"
    assert cluster.posts() == 4


def test_a_job_that_is_deleted_as_it_is_asked_for_is_made_anew(cluster, launch, monkeypatch):
    """It was not there, it is there on its way out, and it has gone."""
    cluster.on_create = lambda job: job["spec"] and succeed(cluster)(job)
    path = f"{ROOTS['PyTorchJob']}/r-lora-a1"
    first, asked_for, create = iter([True]), [], Cluster.create
    monkeypatch.setattr(Cluster, "create", lambda self, job, *more: asked_for.append(job) or create(self, job, *more))

    def fault(method, asked):
        if method == "POST" and "pytorchjobs" in asked and next(first, False):
            cluster.put_job("r-lora-a1", finalizers=["a/b"], deletionTimestamp="2026-01-01T00:00:00Z")
            cluster.objects[path]["metadata"]["labels"] = {"zhllama.io/key": asked_for[0].labels["zhllama.io/key"]}
            threading.Timer(0.1, cluster.remove, (path,)).start()

    cluster.fault = fault
    assert launch().kind == "adapter"
    assert cluster.posts() == 2


def test_a_token_that_was_replaced_is_read_again(cluster, tmp_path):
    place = tmp_path / "kubeconfig"
    good = place.read_text()
    place.write_text(good.replace("a-token-of-the-tests", "an-old-one"))
    connect()
    place.write_text(good)
    listing = client.CustomObjectsApi().list_namespaced_custom_object
    assert call(listing, **PYTORCHJOB.place, namespace="team")["items"] == []
    assert call(listing, **PYTORCHJOB.place, namespace="team")["items"] == []
    assert len(cluster.requests) == 3


@pytest.mark.parametrize("place", ["/pytorchjobs", "/pytorchjobs/r", "/pods", "networkpolicies"])
def test_a_login_page_in_place_of_an_api_server_is_a_line(cluster, launch, place):
    page = {"status": 200, "text": "<html><title>Log in</title></html>"}
    cluster.fault = lambda method, path: Fault(recorded=page) if place in path and method != "WATCH" else None
    with pytest.raises(
        StorageFault,
        match=r"200 OK, but no answer of an API server \(<html><title>Log in.*; a login page or a proxy's\?",
    ):
        launch()


def launch_in_thread(launch):
    answer = Future()

    def work():
        try:
            answer.set_result(launch())
        except BaseException as error:  # noqa: BLE001 - raised where it is asked for
            answer.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return answer


def test_a_job_that_is_too_large_is_refused_once(cluster, launch):
    """Of all 500s this one stays."""
    cluster.fault = only("POST", "pytorchjobs", "large/etcd")
    with pytest.raises(InputError, match=r"500 etcdserver: request is too large; shorten .*labels, annotations"):
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
