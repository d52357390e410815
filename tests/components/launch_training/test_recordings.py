"""The launcher's judgement of what a real API server and training operator showed: recorded jobs, replayed."""

import pytest

from components.launch_training.job_state import State, judge
from tests.recordings import Replay
from zhllama.kubernetes.job_kinds import true_conditions


def judged(name: str) -> tuple[list[State], list[str]]:
    """The states of a recorded job, one after the other, and the reasons, each cause once, as the launcher has them."""
    replay, states, said, causes, ended = Replay(name), [], [], set(), {}
    for _ in replay.moments():
        if replay.job is None and not states:
            continue
        ended |= replay.pods
        failed = replay.job is not None and "Failed" in true_conditions(replay.job)
        found = judge(replay.job, list((ended if failed else replay.pods).values()), replay.warnings)
        if not states or states[-1] is not found.state:
            states.append(found.state)
        if (cause := f"{found.state}{found.cause or found.reason}") not in causes:
            causes.add(cause)
            said.append(found.reason)
    return states, said


@pytest.mark.parametrize(
    ("name", "states", "text"),
    [
        ("success", "waiting running succeeded", ""),
        ("success-worker-runs-on", "waiting running succeeded", ""),
        ("success-clean-none", "waiting running succeeded", ""),
        ("elastic-worker-fails", "waiting running succeeded", ""),
        ("ttl-0", "waiting running succeeded gone", "the job was deleted from outside"),
        (
            "quota-second-pod",
            "waiting",
            'running, but 1 of 2 nodes alone; FailedCreatePod: Error creating: pods "j-worker-0" is forbidden',
        ),
        (
            "deadline-while-quota",
            "waiting",
            'running, but 1 of 2 nodes alone; FailedCreatePod: Error creating: pods "j-worker-0"',
        ),
        ("master-ends-worker-refused", "waiting failed", "1 Master replica(s) failed.; pod j-master-0 ended with 1"),
        (
            "deadline-while-refused",
            "waiting",
            'FailedCreatePod: Error creating: pods "j-master-0" is forbidden: violates PodSecurity "restricted:latest"',
        ),
        ("pss-restricted", "waiting", 'is forbidden: violates PodSecurity "restricted:latest"'),
        ("service-account-missing", "waiting", 'serviceaccount "nobody" not found'),
        ("priority-class-missing", "waiting", "no PriorityClass with name none-here was found"),
        ("quota-must-specify", "waiting", "failed quota: team: must specify limits.memory for: pytorch"),
        ("invalid-pod-gpu-half", "waiting", 'FailedCreatePod: Error creating: Pod "j-master-0" is invalid'),
        ("invalid-pod-mount", "waiting", 'volumeMounts[0].name: Not found: "none"'),
        ("restart-sometimes", "waiting", 'spec.restartPolicy: Unsupported value: "Sometimes"'),
        ("no-replicas", "waiting", "created: its pods are starting"),
        (
            "unschedulable-gpu",
            "waiting",
            "pod j-master-0: Unschedulable: 0/1 nodes are available: 1 Insufficient nvidia.com/gpu",
        ),
        ("unschedulable-selector", "waiting", "didn't match Pod's node affinity/selector"),
        ("claim-missing", "waiting", 'persistentvolumeclaim "none" not found'),
        (
            "configmap-volume-missing",
            "waiting",
            'FailedMount: MountVolume.SetUp failed for volume "c" : configmap "none" not found',
        ),
        ("secret-missing", "waiting", 'pod j-master-0: CreateContainerConfigError: secret "zhllama-s3" not found'),
        ("secret-key-missing", "waiting", "couldn't find key AWS_ACCESS_KEY_ID in Secret"),
        ("non-root-image", "waiting", "container has runAsNonRoot and image will run as root"),
        ("image-never-pull", "waiting", "pod j-master-0: ErrImageNeverPull"),
        ("image-pull-backoff", "waiting", "pod j-master-0: ErrImagePull"),
        ("image-invalid-name", "waiting", "pod j-master-0: InvalidImageName"),
        ("deadline-while-pending", "waiting", "pod j-master-0: Unschedulable"),
        ("deadline-master-alone", "waiting running", ""),
        ("deadline-touched", "waiting running waiting too-late", "active longer than specified deadline"),
        ("exit-2-never", "waiting running wrong-input", "the input is wrong: no such model"),
        ("exit-2-onfailure", "waiting running wrong-input", "the input is wrong: no such model"),
        ("exit-2-onfailure-two-workers", "waiting running wrong-input succeeded", "the input is wrong"),
        (
            "exit-1-onfailure",
            "waiting running waiting running waiting failed",
            "pod j-master-0 ended with 1: reason: broken",
        ),
        ("exit-1-never", "waiting running waiting failed", "pod j-master-0 ended with 1"),
        ("log-after-failure", "waiting running waiting failed", "backoff limit; pod j-master-0 ended with 1"),
        ("worker-fails-never", "waiting running failed", "pod j-worker-0 ended with 1"),
        ("oom", "waiting failed", "pod j-master-0 ended with 137: OOMKilled"),
        ("oom-child", "waiting running waiting failed", "pod j-master-0 ended with 1: OOMKilled"),
        ("command-missing", "waiting failed", "pod j-master-0 ended with 128: failed to create containerd task"),
        ("sigkill-never", "waiting running waiting failed", "pod j-master-0 ended with 137"),
        ("evicted-api", "waiting running waiting running succeeded", ""),
        ("evicted-by-kubelet", "waiting running waiting running waiting running waiting running", ""),
        ("preempted", "waiting running waiting running", "restarting; pod j-master-0: Unschedulable"),
        ("pod-deleted-onfailure", "waiting running succeeded", ""),
        ("pod-deleted-never", "waiting running failed", "1 Worker replica(s) failed."),
        ("deleted-while-running", "waiting running gone", "the job was deleted from outside"),
        ("deleted-foreground", "waiting running waiting gone", "it is being deleted"),
        (
            "deleted-and-created",
            "waiting running gone waiting running succeeded",
            'object is being deleted: pods "j-master-0" already exists',
        ),
        ("suspend-true-then-false", "waiting running succeeded", "suspended: it waits in its queue"),
        ("suspend-running", "waiting running waiting running succeeded", "suspended: it waits in its queue"),
        ("suspended-past-deadline", "waiting running succeeded", "suspended: it waits in its queue"),
        ("backoff-sums", "waiting running waiting failed", "it has reached the specified backoff limit"),
        ("backoff-sums-below", "waiting running succeeded", ""),
    ],
)
def test_a_recorded_job_is_understood(name, states, text):
    found, said = judged(name)
    assert " ".join(state.value.replace(" ", "-") for state in found) == states
    assert any(text in reason for reason in said), said


@pytest.mark.parametrize(
    "name",
    [
        "image-pull-backoff",
        "exit-1-onfailure",
        "exit-1-onfailure-backoff-4",
        "quota-second-pod",
        "pod-deleted-onfailure",
    ],
)
def test_what_goes_on_for_a_while_is_said_once(name):
    """ErrImagePull and ImagePullBackOff take turns, the counts of refused pods grow, back-offs become longer."""
    _, said = judged(name)
    assert len(said) <= 6, said


@pytest.mark.parametrize("pods_are_gone", [False, True])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("unschedulable-gpu", "0/1 nodes are available: 1 Insufficient nvidia.com/gpu"),
        ("image-pull-backoff", "registry.example.com/team/none:1"),
        ("configmap-volume-missing", 'FailedMount: MountVolume.SetUp failed for volume "c" : configmap "none"'),
        ("secret-missing", 'secret "zhllama-s3" not found'),
        ("deadline-while-refused", 'FailedCreatePod: Error creating: pods "j-master-0" is forbidden'),
    ],
)
def test_a_job_that_ends_at_its_deadline_before_it_began_says_what_kept_it(name, text, pods_are_gone):
    """The deadline's own words are the operator's, of deadline-touched; a moment later it deletes the pods."""
    replay = Replay(name)
    for _ in replay.moments():
        pass
    assert replay.job is not None
    found = judge(with_deadline_over(replay.job), [] if pods_are_gone else [*replay.pods.values()], replay.warnings)
    assert found.state is State.EXPIRED
    assert "active longer than specified deadline; " in found.reason
    assert text in found.reason


def test_a_job_that_ran_to_its_deadline_does_not_blame_what_kept_it_before():
    replay = Replay("success")
    for _ in replay.moments():
        if replay.job is not None and "Running" in true_conditions(replay.job):
            break
    assert replay.job is not None
    earlier = ["FailedMount: a volume that came later", "Unschedulable: Error pod j-master-0 condition message: none"]
    for pods in (list(replay.pods.values()), []):
        reason = judge(with_deadline_over(replay.job), pods, earlier).reason
        assert reason.endswith(
            "active longer than specified deadline; raise --deadline-seconds: it goes on from its checkpoint"
        )


def with_deadline_over(job):
    """The job as the operator leaves it at its deadline."""
    told = {"type": "Failed", "status": "True", "reason": "PyTorchJobFailed"}
    told["message"] = "Job j has failed because it was active longer than specified deadline"
    before = [
        one | {"status": "False"} if one["type"] == "Running" else one
        for one in (job.get("status") or {}).get("conditions") or ()
    ]
    return {**job, "status": {"conditions": [*before, told]}}
