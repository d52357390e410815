"""What jobs and their pods, as the API server shows them, mean to the launcher: which attempt to go on with, how it
stands, and for how long it may. Pure: no clock, no network."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Any

from components.launch_training.options import LaunchTraining
from zhllama.errors import EXIT_INPUT, InputError
from zhllama.kubernetes.job_kinds import true_conditions
from zhllama.kubernetes.names import LABEL
from zhllama.kubernetes.pod_state import containers, matter_of, pending_reason, stuck, terminations
from zhllama.kubernetes.refusals import named_options
from zhllama.kubernetes.training_job import TrainingJob

LATE = 60.0
"""Seconds beyond its grace period that a job gets to end by itself at its deadline: no operator ends it."""

RAISE = "raise --deadline-seconds: it goes on from its checkpoint"


class State(Enum):
    WAITING = "waiting"
    """Created, or suspended in a queue: no pod runs yet."""
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    """Worth another attempt."""
    EXPIRED = "too late"
    """It waited or ran for longer than it may: another attempt would not be what was asked for."""
    WRONG_INPUT = "wrong input"
    """The training said that its input is wrong: another attempt would say so again."""
    GONE = "gone"
    """Deleted from outside."""
    NO_ROOM = "not created"
    """A quota of the namespace has no room for it."""
    YIELDED = "given up for another run's"
    """Another run began the same work a moment earlier."""


@dataclass(frozen=True)
class Verdict:
    state: State
    reason: str = ""
    cause: str = ""
    """What the reason is about: a reason whose words change from back-off to back-off has one cause."""
    kept: bool = False
    """Whether something keeps it from its start."""
    stuck: bool = False
    """Whether that is what no waiting mends."""

    @property
    def over(self) -> bool:
        return self.state not in (State.WAITING, State.RUNNING)


def newest(jobs: Sequence[Mapping[str, Any]], key: str) -> int:
    """The last attempt of those that are there (the first may have gone by their ttl), 0 without one. InputError when
    one of them is other work's."""
    for job in jobs:
        if job["metadata"].get("labels", {}).get(f"{LABEL}key") != key:
            name = f"{job['metadata'].get('namespace', '')}/{job['metadata']['name']}"
            raise InputError(f"there is another training job {name}; delete it, or give another --run-id")
    numbers = (re.search(r"-a(\d+)$", job["metadata"]["name"]) for job in jobs)
    return max((int(number[1]) for number in numbers if number), default=0)


def judge(job: Mapping[str, Any] | None, pods: Sequence[Mapping[str, Any]], warnings: Sequence[str] = ()) -> Verdict:
    """The verdict on a job (None: the API server has none of that name), its pods, and the warnings about it (oldest
    first). It runs when all of its nodes do: half a job waits for the rest and holds its GPUs for nothing."""
    if job is None:
        return Verdict(State.GONE, "the job was deleted from outside")
    conditions = true_conditions(job)
    if "Succeeded" in conditions or "Complete" in conditions:
        return Verdict(State.SUCCEEDED)
    if wrong := _wrong_input(pods, warnings):
        return Verdict(State.WRONG_INPUT, wrong)
    waits = [(pod["metadata"]["name"], why) for pod in pods if (why := pending_reason(pod))]
    # the one that somebody has to mend first
    waits.sort(key=lambda one: not stuck(one[1]))
    stand = f"pod {waits[0][0]}: {waits[0][1]}" if waits else ""
    # why a pod was not made, or does not start, is said in Events alone, and a job with a refused pod has no status for
    # ever
    told = _last(warnings, _PENDING)
    if "Failed" in conditions:
        said = _end(pods) or _last(warnings, _REFUSED, "exitCode") or stand
        if not said and not _has_run(job, pods):
            # of one that has run, Events tell what kept its pods before
            said = told or _last(warnings, _KEPT)
        return _failed(conditions["Failed"], said)
    if job.get("metadata", {}).get("deletionTimestamp"):
        return Verdict(State.WAITING, "it is being deleted")
    if "Suspended" in conditions:
        return Verdict(State.WAITING, "suspended: it waits in its queue")
    # the conditions say Running where the Master runs, with or without its Workers
    ran, needed, pending = sum(map(_runs, pods)), nodes_of(job), stand or told
    if ran >= needed or ("Running" in conditions and not pods):
        return Verdict(State.RUNNING)
    if ran:
        begin = f"running, but {ran} of {needed} nodes alone"
    elif "Restarting" in conditions or any(map(_ends, pods)):
        begin = "restarting"
    elif pods and all(pod["metadata"].get("deletionTimestamp") for pod in pods):
        begin, pending = "its pods are on their way out", _end(pods)
    else:
        begin = "created: its pods are starting"
    hopeless = stuck(waits[0][1]) if waits else len(pods) < nodes_of(job, whole=True) and _refused_for_good(told)
    hopeless = hopeless or (pending == told and told.startswith("FailedMount") and _ABSENT.search(told) is not None)
    reason, cause = "; ".join(filter(None, (begin, pending))), f"{ran} {without_counts(matter_of(pending))}"
    return Verdict(State.WAITING, reason, cause, bool(pending), bool(pending) and hopeless)


def _refused_for_good(told: str) -> bool:
    """Whether pods are refused by what no waiting mends: all but a quota that is used up."""
    return told.startswith(_REFUSED) and "exceeded quota" not in told and "unknown for quota" not in told


def nodes_of(job: Mapping[str, Any], whole: bool = False) -> int:
    """Pods that a job needs at least to train, or has when it is whole; 1 where it does not say."""
    spec = job.get("spec") or {}
    if not whole and (least := (spec.get("elasticPolicy") or {}).get("minReplicas")):
        return int(least)
    replicas = spec.get("pytorchReplicaSpecs")
    if replicas is not None:
        return max(1, sum(int((one or {}).get("replicas") or 1) for one in replicas.values()))
    return int((spec.get("trainer") or {}).get("numNodes") or 1)


def without_counts(text: str) -> str:
    """Words without the numbers and times in them, which grow while the matter stays the same."""
    return re.sub(r"(\d+[hms]?)+", "#", text)


_REFUSED = ("FailedCreatePod", "FailedCreateService", "FailedCreate")
_PENDING = (*_REFUSED, "FailedMount", "FailedAttachVolume", "FailedScheduling", "FailedCreatePodSandBox")
_ABSENT = re.compile(r"not found|non-existent")
"""Of a volume: a secret, a ConfigMap or a claim, or a key of one."""
_KEPT = ("Unschedulable", "ErrImage", "ImagePullBackOff", "InvalidImageName", "CreateContainer")
"""Reasons of Events on the job that repeat why a pod does not start."""
_REPEATS = re.compile(
    rf"({'|'.join(_KEPT)})|(Failed|BackOff|InspectFailed): .*(image|Image)|Failed: Error: (secret|conf|cont)"
)


def repeats(warning: str, verdict: Verdict) -> bool:
    """Whether an Event says what the verdict does, or what the pod that it is about will say itself."""
    return warning in verdict.reason or _REPEATS.match(warning) is not None


def _last(warnings: Sequence[str], reasons: tuple[str, ...], word: str = "\0") -> str:
    """The last warning with such a reason, or with the word in it."""
    return next((one for one in reversed(warnings) if one.startswith(reasons) or word in one), "")


def _has_run(job: Mapping[str, Any], pods: Sequence[Mapping[str, Any]]) -> bool:
    """Whether some of its pods ran."""
    conditions = (job.get("status") or {}).get("conditions") or ()
    began = any(one["type"] in ("Running", "Restarting") for one in conditions)
    return began or any((pod.get("status") or {}).get("phase") in ("Running", "Succeeded", "Failed") for pod in pods)


def _failed(condition: Mapping[str, Any], said: str) -> Verdict:
    reason, message = condition.get("reason", "Failed"), condition.get("message", "")
    text = "; ".join(filter(None, (f"{reason}: {message}".strip(": "), said)))
    # the operator of PyTorchJobs says it in its message alone
    if reason == "DeadlineExceeded" or "longer than specified deadline" in message:
        return Verdict(State.EXPIRED, f"{text}; {RAISE}")
    return Verdict(State.FAILED, text)


# --- deadlines --------------------------------------------------------------------------------------------------------


def in_time(
    verdict: Verdict, spent: float, job: TrainingJob, waiting: float, stuck_for: float = 0, starting: float = 0
) -> Verdict:
    """The verdict, or EXPIRED where a job has been at it for longer than it may. spent: seconds in that state, all
    together, for a job may be suspended again; waiting: seconds that it may wait, 0 for ever; stuck_for, starting:
    likewise, of what no waiting mends."""
    deadline, said = job.deadline_seconds, ""
    if verdict.stuck and 0 < starting < stuck_for:
        mend = f"mend that{named_options(verdict.reason, LaunchTraining)}, or raise --starting-seconds"
        said = f"it waited {stuck_for:.0f} s to start ({verdict.reason}); {mend}"
        return Verdict(State.EXPIRED, said)
    if verdict.state is State.WAITING and 0 < waiting < spent:
        place = f" for queue {job.queue}" if job.queue else ""
        said = f"it waited {spent:.0f} s{place} ({verdict.reason}); raise --waiting-seconds, or ask for less"
    elif verdict.state is State.RUNNING and deadline < spent - job.grace_seconds - LATE:
        said = f"it ran {spent:.0f} s, and did not end at its deadline of {deadline} s; {RAISE}"
    return Verdict(State.EXPIRED, said) if said else verdict


def already(job: Mapping[str, Any] | None, state: State, now: datetime) -> float:
    """Seconds for which a job that is found has been in its state, as its own times say; 0 where they do not."""
    conditions = {one["type"]: one for one in ((job or {}).get("status") or {}).get("conditions") or ()}
    since = None
    if state is State.RUNNING:
        since = conditions.get("Running", {}).get("lastTransitionTime")
    elif job and state is State.WAITING and "Running" not in conditions:
        since = job["metadata"].get("creationTimestamp")
    return max(0.0, (now - datetime.fromisoformat(since)).total_seconds()) if since else 0.0


# --- what pods say ----------------------------------------------------------------------------------------------------


def _runs(pod: Mapping[str, Any]) -> bool:
    """Whether a node trains, or is done: not while it is on its way out, or waits to be started again after a crash."""
    phase = (pod.get("status") or {}).get("phase")
    if pod["metadata"].get("deletionTimestamp"):
        return False
    waits = any((one.get("state") or {}).get("waiting") for one in containers(pod, "containerStatuses"))
    return phase == "Succeeded" or (phase == "Running" and not waits)


def _ends(pod: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """How the pod's containers ended."""
    return [end for container in containers(pod, "containerStatuses") for end in terminations(container)]


_ERROR_POD = re.compile(r"Error pod (\S+) container \S+ exitCode: (\d+) terminated message: ?(.*)", re.DOTALL)


def _wrong_input(pods: Sequence[Mapping[str, Any]], warnings: Sequence[str]) -> str:
    """The training's own line on it, of a pod or of the operator's Event, which outlives the pod; "" where there is no
    wrong input."""
    ends = [(pod["metadata"]["name"], end.get("exitCode"), end.get("message")) for pod in pods for end in _ends(pod)]
    ends += [(found[1], int(found[2]), found[3]) for found in map(_ERROR_POD.search, warnings) if found]
    for pod, code, message in ends:
        if code == EXIT_INPUT:
            return " ".join((message or "").split()).removeprefix("error: ") or f"pod {pod} ended with 2; see its log"
    return ""


def _end(pods: Sequence[Mapping[str, Any]]) -> str:
    """How the first pod that ended badly did."""
    for pod in pods:
        name, status = pod["metadata"]["name"], pod.get("status") or {}
        for end in _ends(pod):
            if end.get("exitCode"):
                message = " ".join((end.get("message") or end.get("reason") or "").split())
                return f"pod {name} ended with {end['exitCode']}" + (f": {message}" if message else "")
        # deleted, evicted, preempted: the cluster says so of the pod as a whole, or the kubelet that ended it
        told = true_conditions(pod).get("DisruptionTarget")
        if told is None and status.get("phase") == "Failed" and status.get("reason"):
            told = status
        if told is not None:
            return f"pod {name}: {told.get('reason', '')}: {told.get('message', '')}".rstrip(": ")
    return ""
