"""A rollout is judged as the real Deployment controller's recorded events tell it (tests/recordings/scenarios)."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from components.serve.rollout import (
    Progress,
    answers,
    controlled_by,
    judge_deployment,
    judge_inference_service,
    newest_replica_set,
)

SCENARIOS = Path(__file__).parents[2] / "recordings" / "scenarios"


@dataclass
class Replay:
    """What a client would have seen and said, event by event."""

    name: str
    said: list[tuple[float, Progress]] = field(default_factory=list)
    objects: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        events = json.loads((SCENARIOS / f"deployment-{self.name}.json").read_text())["events"]
        for event in events:
            thing = event.get("object")
            if thing is None or thing["kind"] not in ("Deployment", "ReplicaSet", "Pod"):
                continue
            key = (thing["kind"], thing["metadata"]["name"])
            # a recorded change holds what changes; labels and owners stand in the first event of an object
            known = self.objects.get(key, {"metadata": {}, "spec": {}})
            whole = thing | {"metadata": known["metadata"] | thing["metadata"], "spec": known["spec"] | thing["spec"]}
            self.objects[key] = whole
            if event["type"] == "DELETED":
                del self.objects[key]
            if ("Deployment", "d") in self.objects:
                self.said.append((event["t"], judge_deployment(self.deployment, self.pods)))

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [thing for (one, _), thing in self.objects.items() if one == kind]

    @property
    def deployment(self) -> dict[str, Any]:
        return self.objects["Deployment", "d"]

    @property
    def pods(self) -> list[dict[str, Any]]:
        newest = newest_replica_set(self.deployment, self.of_kind("ReplicaSet"))
        return controlled_by(self.of_kind("Pod"), newest["metadata"]["uid"]) if newest else []

    def at(self, seconds: float) -> Progress:
        return [progress for t, progress in self.said if t <= seconds][-1]

    @property
    def last(self) -> Progress:
        return self.said[-1][1]


def names(progress: Progress) -> list[str]:
    return [pod["metadata"]["name"].rpartition("-")[0] for pod in progress.pods]


def test_a_rollout_is_ready_only_when_its_new_pods_are_and_names_them() -> None:
    replay = Replay("rollout")
    assert names(replay.at(1.42)) == ["d-c57fd58c5"]
    # a change is applied at 3.43: the old pod is Ready all the while
    between = [progress for t, progress in replay.said if 3.43 <= t < 5.7]
    assert between
    assert not any(progress.pods or progress.late for progress in between)
    assert names(replay.last) == ["d-5dc89d746d"]


def test_an_old_pod_that_is_ready_and_terminating_is_never_among_those_that_answer() -> None:
    replay = Replay("rollout")
    # 5.76: counted as one replica of one, while the old pod is still Ready
    assert replay.at(5.76).reason == "ready"
    assert all(names(progress) == ["d-5dc89d746d"] for t, progress in replay.said if t >= 5.76)
    terminating = next(
        event["object"]
        for event in json.loads((SCENARIOS / "deployment-rollout.json").read_text())["events"]
        if "deletionTimestamp" in event.get("object", {}).get("metadata", {})
    )
    assert {"type": "Ready", "status": "True"}.items() <= terminating["status"]["conditions"][2].items()
    assert not answers(terminating)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("quota", 'ReplicaFailure=True (FailedCreate): pods "d-c57fd58c5-9dp75" is forbidden: exceeded quota: team'),
        ("pss", '0 of 1 new pods ready; ReplicaFailure=True (FailedCreate): pods "d-c57fd58c5-jbjkk" is forbidden: v'),
        ("surge-quota", '0 of 1 new pods ready; ReplicaFailure=True (FailedCreate): pods "d-5dc89d746d-pbw5b" is fo'),
        ("crash", "d-f6d8f85d6-mbx79: server ended with 1: Error; "),
        ("bad-image", "d-7d8c4d8969-n98f5: server: ErrImagePull: failed to pull and unpack image"),
        ("never-ready", "d-f5858fc8f-hk28k is not ready: containers with unready status: [server]; "),
    ],
)  # fmt: skip
def test_a_rollout_past_its_deadline_has_failed_and_says_why(name: str, said: str) -> None:
    last = Replay(name).last
    assert last.late
    assert not last.pods
    assert said in last.reason
    assert "Progressing=False (ProgressDeadlineExceeded): ReplicaSet" in last.reason
    assert "\n" not in last.reason


@pytest.mark.parametrize("name", ["quota", "pss", "surge-quota", "service-account"])
def test_a_refused_pod_is_said_as_soon_as_the_deployment_says_it_and_is_waited_for(name: str) -> None:
    replay = Replay(name)
    refused = [
        progress
        for (_, progress) in replay.said
        if "ReplicaFailure=True (FailedCreate)" in progress.reason and "forbidden" in progress.reason
    ]
    assert not refused[0].pods
    assert not refused[0].late
    # before the Deployment had said so, no reason of another kind had been given out as final
    before = replay.said[: [progress for _, progress in replay.said].index(refused[0])]
    assert not any(progress.late for _, progress in before)


def test_a_missing_account_is_named() -> None:
    last = Replay("service-account").last
    assert not last.pods
    assert not last.late
    assert 'serviceaccount "nobody" not found' in last.reason
    assert "Available=False (MinimumReplicasUnavailable)" in last.reason


def test_old_pods_do_not_make_a_new_version_look_ready() -> None:
    replay = Replay("surge-quota")
    assert replay.at(4.9).pods
    # "1 of 1 ready" was said here while the new version could not start
    assert replay.at(6).reason.startswith("0 of 1 new pods ready; ReplicaFailure=True")
    assert not replay.at(6).pods


def test_after_a_rollback_the_newest_replica_set_is_the_one_that_was_gone_back_to() -> None:
    owner = [{"uid": "u", "controller": True}]

    def made(name: str, revision: str, owners: Any) -> dict[str, Any]:
        annotations = {"deployment.kubernetes.io/revision": revision}
        return {"metadata": {"name": name, "annotations": annotations, "ownerReferences": owners}}

    sets = [
        made("first", "10", owner),
        made("second", "9", owner),
        made("other", "11", [{"uid": "v", "controller": True}]),
    ]
    newest = newest_replica_set({"metadata": {"uid": "u"}}, sets)
    assert newest is not None
    assert newest["metadata"]["name"] == "first"


def test_new_pods_that_are_ready_beside_old_ones_are_not_said_to_lack_any() -> None:
    """`1 of 1 ready`, and `3 of 2 ready`, said that nothing was waited for."""
    deployment, pods = rolled_out({}, POD, replicas=3)
    assert judge_deployment(deployment, pods).reason == "its new pods are ready, 2 more pods have to go"
    deployment, pods = rolled_out({}, POD, availableReplicas=0)
    assert judge_deployment(deployment, pods).reason == "its new pods are ready, the Deployment does not say so yet"
    deployment, pods = rolled_out({}, POD, POD, POD, replicas=3)
    assert judge_deployment(deployment, pods).reason == "its new pods are ready, 2 more pods have to go"


# --- KServe -----------------------------------------------------------------------------------------------------------

LABELS = {"zhllama.io/version": "2"}


def service(*conditions: dict[str, Any]) -> dict[str, Any]:
    status = {"observedGeneration": 1, "conditions": list(conditions), "address": {"url": "http://a.team.svc/"}}
    return {"metadata": {"generation": 7}, "spec": {"predictor": {"labels": LABELS}}, "status": status}


def rolled_out(labels: dict[str, str], *pods: dict[str, Any], **more: Any) -> tuple[dict[str, Any], Any]:
    status = {"observedGeneration": 3, "replicas": 1, "availableReplicas": 1, "updatedReplicas": len(pods)} | more
    template = {"metadata": {"labels": labels | {"app": "isvc.a-predictor"}}}
    deployment = {"metadata": {"generation": 3}, "spec": {"replicas": 1, "template": template}, "status": status}
    return deployment, pods


POD = {"metadata": {"name": "a-x"}, "status": {"conditions": [{"type": "Ready", "status": "True"}]}}
TRUE = {"type": "Ready", "status": "True"}


def test_kserves_own_generation_is_not_compared_with_its_deployments() -> None:
    progress = judge_inference_service(service(TRUE, {"type": "Stopped", "status": "False"}), [rolled_out(LABELS, POD)])
    assert (progress.reason, progress.address, progress.pods) == ("ready", "http://a.team.svc", (POD,))


def test_kserves_ready_of_the_old_pods_is_not_the_new_versions() -> None:
    progress = judge_inference_service(service(TRUE), [rolled_out({"zhllama.io/version": "1"}, POD)])
    assert not progress.pods
    refused = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": "exceeded quota: team"}
    progress = judge_inference_service(service(TRUE), [rolled_out(LABELS, conditions=[refused])])
    assert not progress.pods
    assert progress.reason == "0 of 1 new pods ready; ReplicaFailure=True (FailedCreate): exceeded quota: team"


@pytest.mark.parametrize("rollouts", [[], [rolled_out(LABELS)], [rolled_out(LABELS, POD)]])
def test_what_kserve_says_is_false_is_said_with_its_reason(rollouts: list[Any]) -> None:
    wrong = {"type": "PredictorReady", "status": "False", "reason": "Invalid", "message": "no such runtime"}
    bare = {"type": "IngressReady", "status": "False", "reason": "Predictor ingress not created"}
    progress = judge_inference_service(service(wrong, bare), rollouts)
    assert not progress.pods
    assert "PredictorReady=False (Invalid): no such runtime" in progress.reason
    assert "IngressReady=False (Predictor ingress not created)" in progress.reason


def test_why_kserve_says_that_a_model_does_not_load_is_said() -> None:
    failing = service(TRUE)
    failing["status"]["modelStatus"] = {"lastFailureInfo": {"reason": "ModelLoadFailed", "message": "no such layer"}}
    assert "ModelLoadFailed: no such layer" in judge_inference_service(failing, [rolled_out(LABELS)]).reason
