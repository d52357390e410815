"""What the API server shows, and what it means."""

import pytest

from components.launch_training.job_state import State, judge


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
        (job(("Running", "True"), ("Restarting", "True")), [pod(1, where="lastState")], State.RUNNING),
        (job(("Running", "False"), ("Succeeded", "True")), [], State.SUCCEEDED),
        (job(("Running", "False"), ("Failed", "True")), [pod(1)], State.FAILED),
        (job(("Running", "True")), [pod(2, "error: mend it", "lastState")], State.WRONG_INPUT),
        (job(("Failed", "True")), [pod(1), pod(2, "error: mend it")], State.WRONG_INPUT),
        (job(("Succeeded", "True")), [pod(2, "error: before its restart", "lastState")], State.SUCCEEDED),
    ],
    ids=[
        "gone", "no status yet", "created", "in a queue", "running", "restarting", "succeeded", "failed",
        "wrong input, before the operator restarts it", "wrong input, after the job failed", "succeeded all the same",
    ],
)  # fmt: skip
def test_a_job_means(seen, pods, state):
    assert judge(seen, pods).state is state


def test_a_failure_gives_the_operators_reason_and_the_pods_last_words():
    failed = {"status": {"conditions": [{"type": "Failed", "status": "True", "reason": "DeadlineExceeded"}]}}
    assert judge(failed, [pod(137, "killed")]).reason == "DeadlineExceeded; pod p ended with 137: killed"


def test_wrong_input_gives_the_trainings_own_line():
    assert judge(job(("Running", "True")), [pod(2, "error: --dataset: mend it\n")]).reason == "--dataset: mend it"
