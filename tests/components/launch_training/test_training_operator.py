"""The tests' training operator does with a job what the recorded one did, given the same pods' happenings."""

import copy
import json
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

import pytest

from tests.components.launch_training.fake_cluster import FakeCluster
from tests.components.launch_training.operators import nodes_of
from tests.components.launch_training.replay import recorded_job
from tests.components.launch_training.training_operator import PREFIX, NotPlayed, TrainingOperator
from tests.kubernetes_request import Refusal, status
from tests.recordings import scenario, scenarios

NOT_PLAYED = {
    "elastic-hpa": "an autoscaler for an elastic job with metrics",
}
"""What the stand-in says that it cannot do, by recording."""
NO_CONTROLLER = ("batch-deadline", "batch-failed", "batch-pss", "batch-success", "batch-ttl")
"""Batch Jobs: nothing of ours makes any, so the tests have no controller of them. Deployments have one elsewhere
(tests/components/serve/test_controllers.py)."""
RACES = (
    ("FailedDeletePod", 'Error deleting: pytorchjobs.kubeflow.org "j" not found'),
    ("FailedCreateService", 'Error creating: services "j-worker-1" already exists'),
    # of several replicas either may be the first
    ("FailedCreatePod", 'Error creating: pods "j-worker-0" is forbidden: violates PodSecurity'),
    ("ExitedWithCode", "Pod: rec-s-spec-changed.j-worker-0 exited with code 0"),
)
"""Said by an operator that saw the cluster a moment late, or by chance; reasons, and how the messages begin."""
LATE = {"oom-child": (1.4, 4.1), "spec-changed": (33.2, 41.4)}
"""When the recorded operator, on a busy machine, looked at nothing, in seconds."""


JOBS = [name for name in scenarios() if name not in NO_CONTROLLER and not name.startswith("deployment-")]


class Played:
    """A recording's happenings, and what the stand-in made of them beside what the real one did."""

    def __init__(self, name: str) -> None:
        self.name, self.now, self.statuses, self.made = name, 0.0, ([], []), ([], [])
        self.events: set[tuple[str, str, str]] = set()
        recorded = [one for one in scenario(name)["events"] if one["type"] != "ERROR"]
        seen = [one for one in recorded if "kind" in one.get("object", ())]
        began = max(map(_began, seen))
        self.jobs = [one["object"] for one in seen if one["type"] == "ADDED" and one["object"]["kind"] == "PyTorchJob"]
        self.job = self.jobs[0]["metadata"]["name"]
        self.added = {one["object"]["metadata"]["name"]: one["t"] for one in seen if _begins(one)}
        said = [one["object"]["message"].partition(": ")[2] for one in seen if _refuses(one["object"])]
        self.refused = [one for one in said if not one.endswith("already exists")]
        with FakeCluster(f"rec-s-{name}") as self.server:
            self.operator = TrainingOperator(self.server, lambda: began + timedelta(seconds=self.now), self._going)
            self.server.before_create, self.server.set_status = self._admit, self._told
            for event in recorded:
                self.now = event["t"]
                if self.operator.refused or (self.operator.wakes and self.operator.wakes <= self.operator.clock()):
                    self.operator.reconcile(self.job)
                if event["type"] == "ACTION":
                    self._act(event)
                else:
                    self._happen(event["type"], event["object"])

    def _admit(self, thing: dict[str, Any]) -> None:
        """It is refused as it was, until it was there."""
        kind, name = thing["kind"], thing["metadata"]["name"]
        said = [one for one in self.refused if f'"{name}"' in one and one.lower().startswith(kind.lower())]
        if said and self.added.get(name if kind == "Pod" else "", 1e9) > self.now:
            raise Refusal(*status(403, "Forbidden", said[0]))
        if kind in ("Pod", "Service"):
            self.made[0].append(_made(thing))

    def _told(self, kind: str, name: str, told: dict[str, Any]) -> None:
        _next(self.statuses[0], _shape(told))
        self.server.objects[self.operator.path("pytorchjobs", name)]["status"] = told

    def _reconcile(self) -> None:
        begin, end = LATE.get(self.name, (0, 0))
        if not begin < self.now < end:
            self.operator.reconcile(self.job)

    def _going(self, path: str) -> None:
        self.server.objects[path]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"

    def _act(self, event: dict[str, Any]) -> None:
        method, path = (event.get("request") or " ").split(" ", 1)
        if method == "POST" and path.endswith("/pytorchjobs") and event["http_status"] == 201:
            job = copy.deepcopy(self.jobs.pop(0)) | {"status": {}}
            job["metadata"]["namespace"] = self.server.namespace
            self.server.put(self.operator.path("pytorchjobs", self.job), job)
            return self._reconcile()
        if method == "DELETE" and path.endswith(self.server.namespace):
            going = {"name": self.server.namespace, "deletionTimestamp": "2026-01-01T00:00:00Z"}
            self.server.put(path, {"apiVersion": "v1", "kind": "Namespace", "metadata": going})
        thing = self.server.objects.get(path.partition("?")[0])
        if thing is None:
            return None
        if method == "PATCH":
            _merge(thing, event["body"])
            self._reconcile()
        elif method == "DELETE" and thing["kind"] == "Service":
            self.server.delete(path)
            self._reconcile()
        return None

    def _happen(self, kind: str, thing: dict[str, Any]) -> None:
        metadata = thing["metadata"]
        path = self.operator.path(f"{thing['kind'].lower()}s", metadata["name"])
        there = self.server.objects.get(path)
        if thing["kind"] == "Event":
            if (thing.get("source") or {}).get("component") == "pytorchjob-controller":
                self.events.add((thing["type"], thing["reason"], thing["message"]))
            return
        if thing["kind"] == "PyTorchJob":
            if thing.get("status"):
                _next(self.statuses[1], _shape(thing["status"]))
            if kind == "DELETED" and there:
                self.server.remove(path)
                self._collect(there["metadata"]["uid"])
            elif kind == "MODIFIED" and there:
                there["metadata"] |= {one: metadata[one] for one in ("deletionTimestamp",) if one in metadata}
        elif thing["kind"] == "Pod":
            if kind == "ADDED" and PREFIX + "job-name" in metadata.get("labels", {}):
                self.made[1].append(_made(thing))
                assert there, f"{metadata['name']} is there, {self.now}"
                there["metadata"]["uid"] = metadata["uid"]
            elif kind == "ADDED":
                self.server.put(path, copy.deepcopy(thing))
            elif kind == "DELETED":
                self.server.remove(path)
            elif there:
                there["status"] = copy.deepcopy(thing["status"])
                there["metadata"] |= {one: metadata[one] for one in ("deletionTimestamp",) if one in metadata}
        elif thing["kind"] == "Service" and kind == "ADDED" and self._job_of(thing):
            self.made[1].append(_made(thing))
            return
        self._reconcile()

    def _job_of(self, thing: dict[str, Any]) -> bool:
        """Whether its job is there: the real operator made a Service for one that had just gone."""
        job = self.server.objects.get(self.operator.path("pytorchjobs", self.job))
        return bool(job and job["metadata"]["uid"] == thing["metadata"]["ownerReferences"][0]["uid"])

    def _collect(self, uid: str) -> None:
        """What the job owned goes."""
        for path, one in [*self.server.objects.items()]:
            if uid in [owner["uid"] for owner in one["metadata"].get("ownerReferences", ())]:
                (self._going if one["kind"] == "Pod" else self.server.remove)(path)


def _began(event: dict[str, Any]) -> datetime:
    """When the recording did, at least: what is seen was a moment before."""
    thing = event["object"]
    told = thing.get("eventTime") or thing["metadata"].get("creationTimestamp") or "2026-01-01T00:00:00Z"
    return datetime.fromisoformat(told) - timedelta(seconds=event["t"])


def _begins(event: dict[str, Any]) -> bool:
    return event["type"] == "ADDED" and event["object"]["kind"] == "Pod"


def _refuses(thing: dict[str, Any]) -> bool:
    return thing["kind"] == "Event" and str(thing.get("reason")).startswith("FailedCreate")


def _merge(thing: dict[str, Any], patch: dict[str, Any]) -> None:
    for name, value in patch.items():
        if isinstance(value, dict):
            _merge(thing.setdefault(name, {}), value)
        else:
            thing[name] = value


def _shape(told: dict[str, Any]) -> tuple[Any, ...]:
    return tuple((one["type"], one["status"], one["reason"], one["message"]) for one in told.get("conditions", ()))


def _next(seen: list[Any], one: Any) -> None:
    """Each but once; and what takes turns, once."""
    if not seen or seen[-1] != one:
        seen.append(one)
    while len(seen) > 3 and seen[-4:-2] == seen[-2:]:
        del seen[-2:]


def _made(thing: dict[str, Any]) -> str:
    """What the operator says of a pod or Service."""
    metadata, spec = thing["metadata"], thing["spec"]
    told = {"name": metadata["name"], "labels": metadata["labels"], "owner": metadata["ownerReferences"]}
    keys = ("clusterIP", "selector", "ports", "restartPolicy", "initContainers")
    told |= {key: spec[key] for key in keys if key in spec}
    told["containers"] = [
        {key: one.get(key) for key in ("name", "image", "command", "env", "ports")}
        for one in spec.get("containers", ())
    ]
    return json.dumps(told, sort_keys=True)


def told(events: Iterable[tuple[str, str, str]]) -> set[tuple[str, str, str]]:
    return {one for one in events if not any(one[1] == why and one[2].startswith(begin) for why, begin in RACES)}


@pytest.mark.parametrize("name", JOBS)
def test_a_recorded_job_is_played(name):
    if name in NOT_PLAYED:
        with pytest.raises(NotPlayed, match=NOT_PLAYED[name]):
            Played(name)
        return
    played = Played(name)
    assert played.statuses[0] == played.statuses[1]
    assert sorted(played.made[0]) == sorted(played.made[1])
    assert told(played.operator.events) == told(played.events)
    if played.statuses[0]:
        # the first status comes when every pod and Service has been made
        first = next(at for at, one in enumerate(played.operator.did) if one.startswith("status"))
        suspended = "Suspended" in played.operator.did[first]
        assert first == (0 if suspended else 2 * nodes_of(recorded_job(name)))
