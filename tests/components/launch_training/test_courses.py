"""What befalls a job's surroundings while a launcher follows it: its namespace goes, an image comes late, a right is
taken and given back. The answers are those of the recordings."""

from functools import partial

import pytest

from tests.components.launch_training.fake_cluster import ROOTS
from tests.components.launch_training.operators import name_of, run, succeed
from tests.components.launch_training.replay import Clock
from tests.kubernetes_server import Fault
from tests.recordings import answered
from zhllama.errors import InputError, StorageFault

pytestmark = pytest.mark.usefixtures("brisk")


@pytest.fixture
def launch(stage):
    """`launch(**options)`: the stage, in this process, on the cluster."""
    return partial(stage, run_id="r")


def recorded(name: str) -> Fault:
    return Fault(recorded=answered(name))


# --- its namespace goes -----------------------------------------------------------------------------------------------


def terminate(cluster) -> None:
    """As the recorded `DELETE` leaves a namespace: its contents go one by one, and nothing new is taken."""
    metadata = {"name": "team", "deletionTimestamp": "2026-01-01T00:00:00Z"}
    cluster.put("/api/v1/namespaces/team", {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})


def pods_first(cluster, name: str) -> None:
    """The operator restarts what it may not make any more."""
    cluster.delete(f"{ROOTS['Pod']}/{cluster.pod(name)[0]}")
    told = answered("namespace/terminating-pod")["body"]["message"]
    cluster.warn(name, "FailedCreatePod", f"Error creating: {told}", cluster.jobs[name]["metadata"]["uid"])
    cluster.until(lambda: cluster.said())
    cluster.delete_job(name)


def job_first(cluster, name: str) -> None:
    cluster.delete_job(name)


def held(cluster, name: str) -> None:
    """By a finalizer, for a while."""
    path = f"{ROOTS['PyTorchJob']}/{name}"
    with cluster.changed:
        cluster.objects[path]["metadata"]["finalizers"] = ["a/b"]
    cluster.delete(path)
    cluster.until(lambda: cluster.said())
    cluster.remove(path)


@pytest.mark.parametrize(
    ("order", "meanwhile"),
    [(pods_first, "because it is being terminated"), (job_first, ""), (held, "it is being deleted")],
    ids=["its pods first", "its job first", "its job is held"],
)
def test_a_namespace_that_goes_in_mid_run_ends_the_step_as_a_fault(cluster, launch, caplog, order, meanwhile):
    caplog.set_level("INFO")
    cluster.said = lambda: meanwhile in caplog.text

    def operate(job) -> None:
        run(cluster, job, "step 1/2: loss 9.00")
        cluster.until(lambda: "step 1/2" in str(cluster.logs) and ": running" in caplog.text)
        terminate(cluster)
        order(cluster, name_of(job))

    cluster.on_create = operate
    with pytest.raises(StorageFault, match=r"^training job r-lora-a1: the job was deleted from outside$"):
        launch()
    assert cluster.posts() == 1


def test_an_attempt_after_the_namespace_began_to_go_is_refused_as_nobodys_mistake(cluster, launch, caplog):
    caplog.set_level("INFO")

    def operate(job) -> None:
        run(cluster, job)
        cluster.until(lambda: ": running" in caplog.text)
        terminate(cluster)
        cluster.set_condition(name_of(job), "Failed")

    cluster.on_create = operate
    with pytest.raises(
        StorageFault, match=r"r-lora-a2 was refused: 403 .*because it is being terminated; give another"
    ):
        launch()


def test_a_policy_that_a_going_namespace_does_not_take_leaves_no_job(cluster, launch):
    cluster.before_create = lambda thing: thing["kind"] == "PyTorchJob" and terminate(cluster)
    with pytest.raises(StorageFault, match=r"its NetworkPolicy\) was refused: 403 .*being terminated"):
        launch()
    assert not cluster.jobs


# --- an image that comes late -----------------------------------------------------------------------------------------

PULL = 'failed to pull and unpack image "r.example.com/a:1": failed to resolve reference "r.example.com/a:1": '


def test_an_image_that_comes_late_is_said_once_a_matter_and_waited_for(cluster, launch, caplog, monkeypatch):
    """The kubelet alternates between two reasons, and grows its back-off in the second's words."""
    caplog.set_level("INFO")
    clock = Clock()
    monkeypatch.setattr("components.launch_training.follower.time", clock)

    def looked(then: str) -> None:
        """By the launcher, twice: what it saw, it has said."""
        before = len(cluster.asked)
        cluster.until(lambda: sum(one.path.endswith(then) for one in cluster.asked[before:]) > 2)

    def operate(job) -> None:
        name = name_of(job)
        for tries in range(5):
            clock.at += 100
            cluster.set_pod(name, "Pending", waiting="ErrImagePull", message=f"{PULL}503 Service Unavailable")
            looked("/events")
            back_off = f'Back-off pulling image "r.example.com/a:1": ErrImagePull: {PULL}503 (in {2**tries * 10}s)'
            cluster.set_pod(name, "Pending", waiting="ImagePullBackOff", message=back_off)
            clock.at += 500
            looked("/events")
        # it ran, and was restarted: what it waited before its start counts no more
        run(cluster, job)
        cluster.until(lambda: "a1: running" in caplog.text)
        for _ in range(2):
            clock.at += 400
            cluster.set_pod(name, "Pending", waiting="ImagePullBackOff", message=f"{PULL}503")
            looked("/events")
        succeed(cluster)(job)

    cluster.on_create = operate
    launch(starting_seconds=3600)
    said = [line for line in caplog.messages if "r.example.com/a:1" in line]
    assert 1 <= len(said) <= 3, said
    assert cluster.posts() == 1


# --- a right that is taken and given ----------------------------------------------------------------------------------


def test_a_role_that_is_given_after_a_refusal_is_enough(cluster, launch):
    cluster.fault = lambda method, path: recorded("rbac/create") if method == "POST" else None
    with pytest.raises(InputError, match="give this account the Role zhllama-runner"):
        launch()
    cluster.fault = lambda method, path: None
    cluster.on_create = succeed(cluster)
    assert launch().kind == "adapter"
    assert cluster.posts() == 2


@pytest.mark.parametrize("name", ["rbac/get", "auth/wrong-token"])
def test_a_right_that_is_away_for_a_moment_in_mid_run_ends_no_run(cluster, launch, caplog, monkeypatch, name):
    """An API server that has just started knows no Role yet; a release that is applied anew deletes and makes them."""
    # it may just have looked: the next look is in a minute, unless something happens
    monkeypatch.setattr("components.launch_training.follower.LOOK_EVERY", 0.2)
    caplog.set_level("INFO")

    def operate(job) -> None:
        run(cluster, job)
        cluster.until(lambda: ": running" in caplog.text)
        cluster.fault = lambda method, path: recorded(name) if method == "GET" and "log" not in path else None
        cluster.until(lambda: "looking again" in caplog.text)
        cluster.fault = lambda method, path: None
        succeed(cluster)(job)

    cluster.on_create = operate
    assert launch().kind == "adapter"
    # of the job it is said which one, of its pods that it was the server
    assert "API server refused: " in caplog.text or "training job team/r-lora-a1 was refused: " in caplog.text


def test_a_right_that_stays_away_in_mid_run_is_said_and_the_job_is_left_to_the_reaper(
    cluster, launch, caplog, monkeypatch
):
    monkeypatch.setattr("components.launch_training.follower.REFUSED_WITHIN", 0.05)
    monkeypatch.setattr("components.launch_training.follower.LOOK_EVERY", 0.2)
    caplog.set_level("INFO")

    def operate(job) -> None:
        run(cluster, job)
        cluster.until(lambda: ": running" in caplog.text)
        cluster.fault = lambda method, path: recorded("rbac/get") if method == "GET" else None

    cluster.on_create = operate
    with pytest.raises(InputError, match=r"(API server|job team/r-lora-a1 was) refused: 403 .*cannot get resource"):
        launch()
