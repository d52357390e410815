"""The tests' Deployment controller says of recorded ReplicaSets what the real one said."""

from typing import Any

import pytest

from tests.components.serve.controllers import deployment_status, told
from tests.recordings import scenario, scenarios


def shape(status: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    return [(one["type"], one["status"], one["reason"], one["message"]) for one in status.get("conditions", ())]


def played(name: str) -> tuple[list[Any], list[Any], dict[str, Any], dict[str, Any]]:
    """The conditions that were said one after another, ours and the real ones, and the last status of each."""
    sets: dict[str, dict[str, Any]] = {}
    ours: dict[str, Any] = {}
    real: dict[str, Any] = {}
    deployment: dict[str, Any] = {}
    said: tuple[list[Any], list[Any]] = ([], [])
    since = 0.0
    for event in scenario(name)["events"]:
        thing, made = event.get("object") or {}, False
        if thing.get("kind") == "Deployment":
            spec = deployment.get("spec", {}) | thing["spec"]
            deployment, real = thing | {"spec": spec}, thing.get("status") or {}
        elif thing.get("kind") == "ReplicaSet":
            sets[thing["metadata"]["name"]] = thing
            if made := event["type"] == "ADDED":
                ours = ours | {"conditions": told(ours.get("conditions", []), "NewReplicaSetCreated", [*sets][-1])}
        late = event["t"] - since >= deployment.get("spec", {}).get("progressDeadlineSeconds", 1e9)
        if deployment and sets and not made:
            before = [one for one in shape(ours) if one[0] == "Progressing"]
            ours = deployment_status(deployment | {"status": ours}, [*sets.values()], late)
            since = since if before == [one for one in shape(ours) if one[0] == "Progressing"] else event["t"]
        for seen, status in zip(said, (ours, real), strict=True):
            if shape(status) and (not seen or seen[-1] != shape(status)):
                seen.append(shape(status))
    return *said, ours, real


@pytest.mark.parametrize("name", [name for name in scenarios() if name.startswith("deployment-")])
def test_a_recorded_deployment_is_told_of_as_it_was(name):
    said, wanted, ours, real = played(name)
    assert said == wanted
    assert {one: value for one, value in ours.items() if one != "conditions"} == {
        one: value for one, value in real.items() if one != "conditions"
    }
