"""A recorded job, played to a launcher that follows one: an API server shows the recording's events one after another.

The launcher lists, reads, watches and asks for logs over HTTP, as ever; each event is shown when it has looked at the
one before. Its clock is the recording's.
"""

import io
import json
import re
import threading
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tests.components.launch_training.fake_cluster import ROOTS, FakeCluster
from tests.components.launch_training.operators import train
from tests.recordings import scenario
from zhllama.kubernetes.job_kinds import PYTORCHJOB
from zhllama.kubernetes.pod_state import containers

A_WEEK = 7 * 24 * 3600.0
GIVEN_UP = "wrong input|too late: it (?:waited|ran)"
OVER = f"succeeded|failed|too late|gone|{GIVEN_UP}"


@dataclass
class Clock:
    """In place of the launcher's module `time`."""

    at: float = 0.0

    def monotonic(self) -> float:
        return self.at


def recorded_job(name: str) -> dict[str, Any]:
    """As it was created."""
    objects: list[dict[str, Any]] = [event.get("object") or {} for event in scenario(name)["events"]]
    return next(thing for thing in objects if thing.get("kind") == "PyTorchJob")


def options_of(name: str) -> dict[str, Any]:
    """What a launcher is told to make a job like the recorded one."""
    spec = recorded_job(name)["spec"]
    elastic = spec.get("elasticPolicy")
    return {
        "nodes": sum(one["replicas"] for one in spec["pytorchReplicaSpecs"].values()) or 1,
        "deadline_seconds": spec["runPolicy"]["activeDeadlineSeconds"],
        "training": ("--deepspeed", "none"),
        **({"min_nodes": elastic["minReplicas"], "max_nodes": elastic["maxReplicas"]} if elastic else {}),
    }


class Played:
    """`cluster.on_create = Played(…, names)`: the first job takes the first recording's course, and so on. heard: where
    the launcher's standard error goes; said: what it has logged so far."""

    def __init__(self, cluster: FakeCluster, clock: Clock, heard: io.StringIO, said: Any, *names: str) -> None:
        self.cluster, self.clock, self.heard, self.said = cluster, clock, heard, said
        self._names = iter(names)
        self._looks: list[str] = []
        self._pods: dict[str, dict[str, Any]] = {}
        self.ran: list[str] = []
        """The line that each container's log holds."""
        self.error: BaseException | None = None
        self._threads: list[threading.Thread] = []
        self._left = False
        cluster.fault, cluster.operates = self._asked, False

    def _asked(self, method: str, path: str) -> None:
        if method == "GET" and path.startswith(ROOTS["PyTorchJob"]):
            self._looks.append(path)
            if self._over("succeeded"):
                # whether the job has ended as well is not a matter of which thread is quicker
                self._wait()

    def _wait(self) -> None:
        for one in [*self._threads]:
            one.join(20)

    def leave(self) -> None:
        """The launcher has ended: nothing more is shown, and nothing of this outlives its test."""
        self._left = True
        self._wait()

    def __call__(self, job: dict[str, Any]) -> None:
        self._threads.append(threading.current_thread())
        try:
            self._play(job, next(self._names))
        except BaseException as error:
            self.error = error
            self.cluster.delete_job(job["metadata"]["name"])
            raise

    def _play(self, job: dict[str, Any], name: str) -> None:
        begin = self.clock.at
        for event in scenario(name)["events"]:
            thing = event.get("object") or {}
            if thing.get("kind") not in ("PyTorchJob", "Pod", "Event"):
                continue
            if not self._there(job) or self._over(GIVEN_UP):
                # the launcher has deleted it, and what it owns, or is about to
                return
            self.clock.at = begin + event["t"]
            self._show(event["type"], as_of(thing, job, name), job)
            if thing["kind"] != "Event" or thing["type"] == "Warning":
                self._until_looked(job["metadata"]["name"])
        # nothing more happens, for ever
        self.clock.at += A_WEEK
        self._until_looked(job["metadata"]["name"])

    def _show(self, kind: str, thing: dict[str, Any], job: dict[str, Any]) -> None:
        path = f"{ROOTS[thing['kind']]}/{thing['metadata']['name']}"
        if kind == "DELETED":
            self.cluster.remove(path)
            return
        if thing["kind"] == "PyTorchJob":
            with self.cluster.changed:
                if not self._there(job):
                    return
                thing["metadata"] = job["metadata"] | {
                    name: value
                    for name, value in thing["metadata"].items()
                    if name in ("deletionTimestamp", "finalizers")
                }
                self.cluster.put(path, thing | {"spec": job["spec"]})
            return
        if thing["kind"] == "Pod":
            if kind != "ADDED":
                # a recording has an object whole when it is first seen, and then what changes
                thing = self._pods[path] | thing | {"metadata": self._pods[path]["metadata"] | thing["metadata"]}
            self._pods[path] = thing
            labels = thing["metadata"].setdefault("labels", {})
            if role := labels.get("training.kubeflow.org/replica-type"):
                # the operator makes pods of the job's own template
                labels |= job["spec"]["pytorchReplicaSpecs"][role.capitalize()]["template"]["metadata"]["labels"]
                self._train(thing, job)
        self.cluster.put(path, thing)
        if thing["kind"] == "Pod" and role:
            self._speak(thing)

    def _train(self, pod: dict[str, Any], job: dict[str, Any]) -> None:
        """A training leaves its result, and then its first node ends with 0."""
        ended = [(one.get("state") or {}).get("terminated") or {} for one in containers(pod, "containerStatuses")]
        if PYTORCHJOB.is_first(pod) and any(end.get("exitCode") == 0 for end in ended):
            train(job)

    def _speak(self, pod: dict[str, Any]) -> None:
        """A container says one line when it begins."""
        name = pod["metadata"]["name"]
        for one in containers(pod, "containerStatuses"):
            state = one.get("state") or {}
            ended = state.get("terminated") or {}
            begun = "running" in state or (ended and ended["reason"] not in ("StartError", "ContainerCannotRun"))
            line = f"{one.get('containerID', '')[-6:]} begins, {one.get('restartCount')} before it"
            # the launcher hears those whose phase says that they have begun
            if not begun or f"{name} | {line}" in self.ran or pod["status"]["phase"] == "Pending" or self._over():
                continue
            self.ran.append(f"{name} | {line}")
            if one["restartCount"]:
                self.cluster.restart_log(name)
            else:
                self.cluster.logs.pop(name, None)
                self.cluster.previous_logs.pop(name, None)
            self.cluster.write_log(name, line)
            self.cluster.until(lambda: self.ran[-1] in self.heard.getvalue() or self._over(), 20)

    def _there(self, job: dict[str, Any]) -> bool:
        return f"{ROOTS['PyTorchJob']}/{job['metadata']['name']}" in self.cluster.objects

    def _over(self, how: str = OVER) -> bool:
        """Whether the launcher has made up its mind about the newest job."""
        if self._left:
            return True
        jobs = [line for line in self.said() if "training job" in line]
        return bool(jobs and re.search(rf"-a\d+: ({how})|-a\d+ deleted$", jobs[-1]))

    def _until_looked(self, name: str) -> None:
        """Until the launcher has begun a look, and ended it: last it asks whether others do its work."""
        seen, path = len(self._looks), f"{ROOTS['PyTorchJob']}/{name}"
        self.cluster.until(lambda: self._over() or (path, ROOTS["PyTorchJob"]) in pairwise(self._looks[seen:]), 20)


def as_of(thing: dict[str, Any], job: dict[str, Any], name: str) -> dict[str, Any]:
    """A recorded object as if it were about our job, and not about one named j in a namespace of its own."""
    text = json.dumps(thing).replace(f"rec-s-{name}", "team")
    text = text.replace(recorded_job(name)["metadata"]["uid"], job["metadata"]["uid"])
    found: dict[str, Any] = json.loads(re.sub(r"(?<![\w-])j(?![\w])", job["metadata"]["name"], text))
    return found
