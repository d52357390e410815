"""A small Kubernetes API server: PyTorchJobs and pods in memory, with list, watch and logs, over real HTTP.

What an operator would do is done by the test: `cluster.on_create = function(job)`, which runs in a thread of its own
and moves the job on with `set_condition` and `set_pod`. Faults can be put in front of answers.
"""

import json
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlparse

from tests.kubernetes_server import ApiHandler, ApiServer, selected

JOBS = "/apis/kubeflow.org/v1/namespaces/{}/pytorchjobs"
PODS = "/api/v1/namespaces/{}/pods"


class FakeCluster(ApiServer):
    """PyTorchJobs and their pods, each by name."""

    def __init__(self) -> None:
        super().__init__(_Handler, "team")
        self.jobs: dict[str, dict[str, Any]] = {}
        self.pods: dict[str, dict[str, Any]] = {}
        self.logs: dict[str, str] = {}
        self.faults: list[int] = []
        """Status codes that the next answers have instead of their own."""
        self.on_create: Callable[[dict[str, Any]], None] = lambda job: None

    # --- what an operator does ----------------------------------------------------------------------------------------

    def set_condition(self, name: str, kind: str, reason: str = "", message: str = "") -> None:
        """The job's newest condition becomes `kind`; Succeeded and Failed end Running, as in the operator."""
        with self.changed:
            job = self.jobs[name]
            conditions = job.setdefault("status", {}).setdefault("conditions", [])
            for condition in conditions:
                if condition["type"] in ("Running", "Suspended", "Restarting") and condition["type"] != kind:
                    condition["status"] = "False"
            conditions.append({"type": kind, "status": "True", "reason": reason, "message": message})
            self._emit(f"jobs/{name}", "MODIFIED", job)

    def set_pod(
        self, job: str, phase: str, exit_code: int | None = None, message: str = "", last: bool = False
    ) -> None:
        """The job's master pod; with `exit_code` its container ended (with `last`: and was started again)."""
        name = f"{job}-master-0"
        status: dict[str, Any] = {"name": "pytorch", "state": {"running": {}}, "lastState": {}}
        if exit_code is not None:
            end = {"terminated": {"exitCode": exit_code, "message": message, "reason": "Error"}}
            status["lastState" if last else "state"] = end
        labels = {"training.kubeflow.org/job-name": job, "training.kubeflow.org/replica-type": "master"}
        with self.changed:
            kind = "MODIFIED" if name in self.pods else "ADDED"
            self.pods[name] = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name, "namespace": self.namespace, "labels": labels},
                "status": {"phase": phase, "containerStatuses": [status]},
            }
            self._emit(f"pods/{name}", kind, self.pods[name])

    def delete(self, name: str) -> None:
        with self.changed:
            self._emit(f"jobs/{name}", "DELETED", self.jobs.pop(name))
            for pod in [pod for pod in self.pods if pod.startswith(f"{name}-master")]:
                self._emit(f"pods/{pod}", "DELETED", self.pods.pop(pod))

    def created(self, job: dict[str, Any], namespace: str) -> None:
        job["metadata"].update({"namespace": namespace, "uid": f"uid-{job['metadata']['name']}"})
        with self.changed:
            self.jobs[job["metadata"]["name"]] = job
            self._emit(f"jobs/{job['metadata']['name']}", "ADDED", job)
        self.set_condition(job["metadata"]["name"], "Created")
        threading.Thread(target=self.on_create, args=(json.loads(json.dumps(job)),), daemon=True).start()

    def listed(self, collection: str, query: dict[str, str]) -> tuple[list[dict[str, Any]], int]:
        with self.changed:
            things = list((self.jobs if collection == "jobs" else self.pods).values())
            return [json.loads(json.dumps(thing)) for thing in things if selected(thing, query)], self._version


class _Handler(ApiHandler):
    of: FakeCluster

    def _do(self) -> None:
        cluster = self.of
        url = urlparse(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        watching = query.get("watch") in ("true", "True")
        with cluster.changed:
            cluster.requests.append((self.command, url.path))
            fault = cluster.faults.pop(0) if cluster.faults and not watching else None
            cluster.changed.notify_all()
        if fault is not None:
            return self._answer(fault, {"message": "a fault that the test put here"})
        parts = url.path.strip("/").split("/")
        namespace = parts[parts.index("namespaces") + 1]
        for collection, form in (("jobs", JOBS), ("pods", PODS)):
            root = form.format(namespace)
            if url.path == root:
                if self.command == "POST":
                    return self._create(body, namespace)
                if watching:
                    return self._watch(collection, query)
                items, version = cluster.listed(collection, query)
                return self._answer(200, {"items": items, "metadata": {"resourceVersion": str(version)}})
            if url.path.startswith(f"{root}/"):
                return self._one(collection, url.path[len(root) + 1 :].split("/"))
        return self._answer(404, {"message": f"{url.path} is not served here"})

    do_GET = do_POST = do_DELETE = _do

    def _create(self, body: dict[str, Any], namespace: str) -> None:
        if body["metadata"]["name"] in self.of.jobs:
            return self._answer(409, {"message": "it is there already"})
        self.of.created(body, namespace)
        return self._answer(201, body)

    def _one(self, collection: str, path: list[str]) -> None:
        cluster = self.of
        things = cluster.jobs if collection == "jobs" else cluster.pods
        if path[0] not in things:
            return self._answer(404, {"message": f"{path[0]} not found"})
        if self.command == "DELETE":
            cluster.delete(path[0])
            return self._answer(200, {"status": "Success"})
        if path[1:] == ["log"]:
            return self._answer_with(200, "text/plain", cluster.logs.get(path[0], "").encode())
        return self._answer(200, things[path[0]])

    def _watch(self, collection: str, query: dict[str, str]) -> None:
        self._begin_watch()
        version = int(query.get("resourceVersion") or 0)
        while events := self.of.events_after(version, collection, timeout=60):
            for version, kind, thing in events:  # noqa: B007 - the last one is where the next wait begins
                if selected(thing, query):
                    self._send_event(kind, thing)
        self._end_watch()
