"""What the API server shows, and what it means."""

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from components.launch_training.follower import Follower
from components.launch_training.job_state import LATE, State, Verdict, already, in_time, judge, newest
from zhllama.errors import InputError
from zhllama.kubernetes.job_kinds import PYTORCHJOB
from zhllama.kubernetes.training_job import TrainingJob


def job(*conditions: tuple[str, str]) -> dict:
    return {"status": {"conditions": [{"type": kind, "status": status} for kind, status in conditions]}}


def pod(exit_code: int, message: str = "", where: str = "state") -> dict:
    end = {"terminated": {"exitCode": exit_code, "message": message}}
    return {"metadata": {"name": "p"}, "status": {"containerStatuses": [{where: end}]}}


@pytest.mark.parametrize(
    ("seen", "pods", "state"),
    [
        (None, [], State.GONE),
        ({}, [], State.WAITING),
        (job(("Created", "True")), [], State.WAITING),
        (job(("Created", "True"), ("Suspended", "True")), [], State.WAITING),
        (job(("Suspended", "False"), ("Running", "True")), [], State.RUNNING),
        (job(("Running", "True"), ("Restarting", "True")), [pod(1, where="lastState")], State.WAITING),
        (job(("Running", "False"), ("Succeeded", "True")), [], State.SUCCEEDED),
        (job(("Running", "False"), ("Failed", "True")), [pod(1)], State.FAILED),
        (job(("Running", "True")), [pod(2, "error: mend it", "lastState")], State.WRONG_INPUT),
        (job(("Failed", "True")), [pod(1), pod(2, "error: mend it")], State.WRONG_INPUT),
        (job(("Succeeded", "True")), [pod(2, "error: before its restart", "lastState")], State.SUCCEEDED),
        (job(("Suspended", "False"), ("Complete", "True")), [], State.SUCCEEDED),
        (job(("Suspended", "False")), [{"metadata": {"name": "p"}, "status": {"phase": "Running"}}], State.RUNNING),
        ({"metadata": {"deletionTimestamp": "2026-11-25T00:00:00Z"}, **job(("Running", "True"))}, [], State.WAITING),
    ],
    ids=[
        "gone", "no status yet", "created", "in a queue", "running", "restarting", "succeeded", "failed",
        "wrong input, before the operator restarts it", "wrong input, after the job failed", "succeeded all the same",
        "a TrainJob that is complete", "a TrainJob that runs, as its pods say", "being deleted",
    ],
)  # fmt: skip
def test_a_job_means(seen, pods, state):
    assert judge(seen, pods).state is state


def test_a_failure_gives_the_operators_reason_and_the_pods_termination_message():
    failed = {"status": {"conditions": [{"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded"}]}}
    assert judge(failed, [pod(137, "killed")]).reason == "BackoffLimitExceeded; pod p ended with 137: killed"
    evicted = {"metadata": {"name": "p"}, "status": {"phase": "Failed", "reason": "Evicted", "message": "low on disk"}}
    assert judge(failed, [evicted]).reason == "BackoffLimitExceeded; pod p: Evicted: low on disk"


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("DeadlineExceeded", ""),
        ("PyTorchJobFailed", "Job a has failed because it was active longer than specified deadline"),
    ],
    ids=["TrainJob", "PyTorchJob"],
)
def test_a_deadline_that_is_over_is_no_failure_like_others(reason, message):
    condition = {"type": "Failed", "status": "True", "reason": reason, "message": message}
    assert judge({"status": {"conditions": [condition]}}, []).state is State.EXPIRED


def test_wrong_input_gives_the_trainings_own_line():
    assert judge(job(("Running", "True")), [pod(2, "error: --dataset: mend it\n")]).reason == "--dataset: mend it"


# --- which attempt ----------------------------------------------------------------------------------------------------


def attempt(name: str, key: str = "k") -> dict:
    return {"metadata": {"name": name, "labels": {"zhllama.io/key": key}}}


def test_the_newest_attempt_is_gone_on_with_even_when_the_first_have_gone():
    assert newest([], "k") == 0
    assert newest([attempt("run-lora-a9"), attempt("run-lora-a10")], "k") == 10
    with pytest.raises(InputError, match="there is another training job"):
        newest([attempt("run-lora-a1"), attempt("run-lora-a2", "other")], "k")


# --- deadlines --------------------------------------------------------------------------------------------------------

WAITS, RUNS = Verdict(State.WAITING, "suspended"), Verdict(State.RUNNING)
JOB = TrainingJob(name="job", command=("train",), queue="gpus", deadline_seconds=1000, grace_seconds=300)


def test_a_job_that_waits_for_too_long_has_expired():
    assert in_time(WAITS, 100, JOB, waiting=100) is WAITS
    late = in_time(WAITS, 101, JOB, waiting=100)
    assert late.state is State.EXPIRED
    assert "waited 101 s for queue gpus (suspended)" in late.reason


def test_waiting_adds_up_and_running_does_not_count_as_waiting(monkeypatch):
    """Kueue may suspend a job again, and again."""
    now, stays = [1.0], iter([("Suspended", 50), ("Running", 500)] * 2 + [("Suspended", 1)] * 2)

    def look(_: TrainingJob) -> dict:
        condition, seconds[0] = next(stays)
        return job((condition, "True")) | {"metadata": {"name": "job", "uid": "uid"}}

    def sleep(_: Follower, most: float) -> None:
        now[0] += seconds[0]

    seconds = [0.0]
    monkeypatch.setattr("components.launch_training.follower.time.monotonic", lambda: now[0])
    monkeypatch.setattr(Follower, "sleep", sleep)
    cluster: Any = SimpleNamespace(api=None, kind=PYTORCHJOB, read=look, pods=lambda *_: [], warnings=lambda *_: [])
    verdict, _ = Follower(cluster, 100, lambda: False, lambda: False).follow(JOB, "uid")
    assert verdict.state is State.EXPIRED
    assert "waited 101 s for queue gpus (suspended" in verdict.reason


def test_the_launcher_keeps_the_deadline_for_the_operator_sets_no_timer():
    assert in_time(RUNS, 1300 + LATE, JOB, waiting=1) is RUNS
    assert in_time(RUNS, 1301 + LATE, JOB, waiting=1).state is State.EXPIRED
    assert in_time(Verdict(State.SUCCEEDED), 1301 + LATE, JOB, waiting=1).state is State.SUCCEEDED


def waiting_pod(reason: str, message: str = "") -> dict:
    state = {"state": {"waiting": {"reason": reason, "message": message}}}
    return {"metadata": {"name": "p"}, "status": {"phase": "Pending", "containerStatuses": [state]}}


UNSCHEDULABLE = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
REFUSED = 'FailedCreatePod: Error creating: pods "p" is forbidden: '


@pytest.mark.parametrize(
    ("pods", "warnings", "stuck"),
    [
        ([waiting_pod("ErrImagePull")], [], True),
        ([waiting_pod("ImagePullBackOff")], [], True),
        ([waiting_pod("InvalidImageName")], [], True),
        ([waiting_pod("CreateContainerConfigError", 'secret "zhllama-s3" not found')], [], True),
        ([waiting_pod("ContainerCreating")], [], False),
        ([waiting_pod("ContainerCreating")], ['FailedMount: ... : configmap "none" not found'], True),
        ([waiting_pod("ContainerCreating")], ['FailedMount: ... : secret "zhllama-s3" not found'], True),
        ([waiting_pod("ContainerCreating")], ["FailedMount: ... : references non-existent secret key: K"], True),
        ([waiting_pod("ContainerCreating")], ["FailedMount: timed out waiting for the condition"], False),
        ([waiting_pod("CrashLoopBackOff")], [], False),
        ([], [f"{REFUSED}exceeded quota: team, requested: pods=1"], False),
        ([], [f"{REFUSED}failed quota: team: must specify limits.memory for: pytorch"], True),
        ([], [f'{REFUSED}violates PodSecurity "restricted:latest": runAsNonRoot != true'], True),
        ([], [f'{REFUSED}error looking up service account team/x: serviceaccount "x" not found'], True),
        ([], [f"{REFUSED}maximum memory usage per Container is 8Gi, but limit is 16Gi"], True),
        # long ago: the pod is there by now
        ([waiting_pod("ContainerCreating")], [f"{REFUSED}no PriorityClass with name x was found"], False),
    ],
)
def test_what_no_waiting_mends_is_told_from_what_may_pass(pods, warnings, stuck):
    verdict = judge(job(("Created", "True")), pods, warnings)
    assert (verdict.state, verdict.stuck) == (State.WAITING, stuck)


def test_of_several_pods_the_one_that_somebody_has_to_mend_is_named():
    waits = {"metadata": {"name": "w"}, "status": {"conditions": [UNSCHEDULABLE | {"message": "0/9 nodes"}]}}
    verdict = judge(job(("Created", "True")), [waits, waiting_pod("ErrImagePull", "no such image")])
    assert verdict.reason == "created: its pods are starting; pod p: ErrImagePull: no such image"


PULL = 'failed to pull and unpack image "r/a:1": failed to resolve reference "r/a:1": '


def test_a_pull_that_fails_is_one_matter_in_one_short_line():
    seen = [("ErrImagePull", f"{PULL}r/a:1: not found"), ("ImagePullBackOff", 'Back-off pulling image "r/a:1"')]
    seen += [("ImagePullBackOff", f'Back-off pulling image "r/a:1": ErrImagePull: {PULL}r/a:1: not found')]
    # CRI-O's words for the first of them
    seen += [("RegistryUnavailable", "pull failed"), ("SignatureValidationFailed", "no signature")]
    verdicts = [judge(job(("Created", "True")), [waiting_pod(*one)]) for one in seen]
    assert len({one.cause for one in verdicts}) == 1
    assert [one.reason.partition("pod p: ")[2] for one in verdicts] == [
        'ErrImagePull: failed to pull and unpack image "r/a:1": r/a:1: not found',
        'ImagePullBackOff: Back-off pulling image "r/a:1"',
        'ImagePullBackOff: Back-off pulling image "r/a:1": r/a:1: not found',
        "RegistryUnavailable: pull failed", "SignatureValidationFailed: no signature",
    ]  # fmt: skip
    assert all(one.stuck for one in verdicts)


def test_what_no_waiting_mends_has_a_shorter_wait_of_its_own():
    stuck = Verdict(State.WAITING, "pod p: ErrImagePull: no such image", stuck=True)
    assert in_time(stuck, 200, JOB, waiting=1000, stuck_for=100, starting=100) is stuck
    late = in_time(stuck, 200, JOB, waiting=1000, stuck_for=101, starting=100)
    assert late.state is State.EXPIRED
    said = "it waited 101 s to start (pod p: ErrImagePull: no such image); "
    assert late.reason == f"{said}mend that (--training-image), or raise --starting-seconds"
    # what was stuck and is no more, and a wait without a bound of its own
    assert in_time(WAITS, 200, JOB, waiting=1000, stuck_for=101, starting=100) is WAITS
    assert in_time(stuck, 200, JOB, waiting=1000, stuck_for=1e9, starting=0) is stuck


def test_nought_is_for_ever():
    assert in_time(WAITS, 1e9, JOB, waiting=0) is WAITS


def test_a_launcher_that_starts_again_knows_for_how_long_the_job_has_waited_or_run():
    now = datetime(2026, 11, 25, 12, tzinfo=UTC)
    waits = {"metadata": {"creationTimestamp": "2026-11-25T09:00:00Z"}}
    assert already(waits, State.WAITING, now) == 3 * 3600
    begun = {"type": "Running", "status": "True", "lastTransitionTime": "2026-11-25T11:59:00Z"}
    runs = {**waits, "status": {"conditions": [begun]}}
    assert already(runs, State.RUNNING, now) == 60
    # it has run before: since when it waits again is not known
    sent_back = {**waits, "status": {"conditions": [{**begun, "status": "False"}]}}
    assert already(sent_back, State.WAITING, now) == 0
    assert already(None, State.WAITING, now) == 0
