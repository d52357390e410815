"""A small Kubernetes API server: PyTorchJobs and pods in memory, with list, watch and logs, over real HTTP.

What an operator would do is done by the test: `cluster.on_create = function(job)`, which runs in a thread of its own
and moves the job on with `set_condition` and `set_pod`. Faults can be put in front of answers.
"""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

JOBS = "/apis/kubeflow.org/v1/namespaces/{}/pytorchjobs"
PODS = "/api/v1/namespaces/{}/pods"


class FakeCluster:
    """`with FakeCluster() as cluster:`; `cluster.kubeconfig(path)` writes what a client needs."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.pods: dict[str, dict[str, Any]] = {}
        self.logs: dict[str, str] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[int] = []
        """Status codes that the next answers have instead of their own."""
        self.on_create: Callable[[dict[str, Any]], None] = lambda job: None
        self.changed = threading.Condition()
        self._version = 0
        self._events: list[tuple[int, str, str, dict[str, Any]]] = []
        self._closing = False
        cluster = self

        class Handler(_Handler):
            server_cluster = cluster

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> "FakeCluster":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self.changed:
            self._closing = True
            self.changed.notify_all()
        self._server.shutdown()
        self._server.server_close()

    def kubeconfig(self, path: Path, namespace: str = "team") -> Path:
        value = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "fake",
            "clusters": [{"name": "fake", "cluster": {"server": f"http://127.0.0.1:{self._server.server_port}"}}],
            "users": [{"name": "fake", "user": {}}],
            "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake", "namespace": namespace}}],
        }
        path.write_text(json.dumps(value))
        return path

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
            self._emit("jobs", "MODIFIED", job)

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
                "metadata": {"name": name, "namespace": "team", "labels": labels},
                "status": {"phase": phase, "containerStatuses": [status]},
            }
            self._emit("pods", kind, self.pods[name])

    def delete(self, name: str) -> None:
        with self.changed:
            self._emit("jobs", "DELETED", self.jobs.pop(name))
            for pod in [pod for pod in self.pods if pod.startswith(f"{name}-master")]:
                self._emit("pods", "DELETED", self.pods.pop(pod))

    def _emit(self, collection: str, kind: str, thing: dict[str, Any]) -> None:
        self._version += 1
        thing["metadata"]["resourceVersion"] = str(self._version)
        self._events.append((self._version, collection, kind, json.loads(json.dumps(thing))))
        self.changed.notify_all()

    def created(self, job: dict[str, Any], namespace: str) -> None:
        job["metadata"].update({"namespace": namespace, "uid": f"uid-{job['metadata']['name']}"})
        with self.changed:
            self.jobs[job["metadata"]["name"]] = job
            self._emit("jobs", "ADDED", job)
        self.set_condition(job["metadata"]["name"], "Created")
        threading.Thread(target=self.on_create, args=(json.loads(json.dumps(job)),), daemon=True).start()

    def events_after(self, version: int, collection: str, timeout: float) -> list[tuple[int, str, dict[str, Any]]]:
        """Blocks until there are some, the time is over, or the server closes."""

        def found() -> list[tuple[int, str, dict[str, Any]]]:
            return [(v, kind, thing) for v, where, kind, thing in self._events if v > version and where == collection]

        with self.changed:
            self.changed.wait_for(lambda: found() or self._closing, timeout)
            return [] if self._closing else found()

    def listed(self, collection: str, query: dict[str, str]) -> tuple[list[dict[str, Any]], int]:
        with self.changed:
            things = list((self.jobs if collection == "jobs" else self.pods).values())
            return [json.loads(json.dumps(thing)) for thing in things if _selected(thing, query)], self._version


def _selected(thing: dict[str, Any], query: dict[str, str]) -> bool:
    labels = thing["metadata"].get("labels", {})
    for term in filter(None, query.get("labelSelector", "").split(",")):
        name, _, value = term.partition("=")
        if labels.get(name) != value:
            return False
    field = query.get("fieldSelector", "")
    return not field or thing["metadata"]["name"] == field.removeprefix("metadata.name=")


class _Handler(BaseHTTPRequestHandler):
    server_cluster: FakeCluster
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _do(self) -> None:
        cluster = self.server_cluster
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
        if body["metadata"]["name"] in self.server_cluster.jobs:
            return self._answer(409, {"message": "it is there already"})
        self.server_cluster.created(body, namespace)
        return self._answer(201, body)

    def _one(self, collection: str, path: list[str]) -> None:
        cluster = self.server_cluster
        things = cluster.jobs if collection == "jobs" else cluster.pods
        if path[0] not in things:
            return self._answer(404, {"message": f"{path[0]} not found"})
        if self.command == "DELETE":
            cluster.delete(path[0])
            return self._answer(200, {"status": "Success"})
        if path[1:] == ["log"]:
            return self._raw(200, "text/plain", cluster.logs.get(path[0], "").encode())
        return self._answer(200, things[path[0]])

    def _watch(self, collection: str, query: dict[str, str]) -> None:
        cluster = self.server_cluster
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        version = int(query.get("resourceVersion") or 0)
        while events := cluster.events_after(version, collection, timeout=60):
            for version, kind, thing in events:  # noqa: B007 - the last one is where the next wait begins
                if _selected(thing, query):
                    line = json.dumps({"type": kind, "object": thing}).encode() + b"\n"
                    self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
                    self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")

    def _answer(self, status: int, value: Any) -> None:
        self._raw(status, "application/json", json.dumps(value).encode())

    def _raw(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
