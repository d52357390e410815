"""A small Kubernetes API server over real HTTP: objects by path in memory, and faults in front of its answers.

It does create (409, 422), server-side apply (201, 200, 409), get, list, watch (from a resourceVersion, 410), delete
(uid, finalizers, what the object owns), pods' logs (follow, sinceTime, previous) and forwarded ports. What a controller
would do is done by the test: `server.on_apply = function(object)` runs in a thread of its own after each change of an
object's spec, and moves things on with `set_status` and `set_pods`.
"""

import base64
import hashlib
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlparse

from tests.server_side_apply import applied, scaled, status

LISTS = (
    "pods", "events", "deployments", "inferenceservices", "pytorchjobs", "trainjobs", "workflows", "networkpolicies",
    "replicasets", "horizontalpodautoscalers",
)  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """What happens to a request. Without any field it is answered as ever."""

    status: int = 0
    """It is answered with this, and nothing is done."""
    recorded: Mapping[str, Any] = field(default_factory=dict)
    """Likewise, with what a real server answered (tests/recordings `answered`)."""
    headers: Mapping[str, str] = field(default_factory=dict)
    hold: threading.Event | None = None
    """It waits for the event (or the server's end) before it is done."""
    lose: str = ""
    """`before`: the connection ends before anything is done; `after`: it is done, and the answer is lost."""
    cut: int = -1
    """A stream (watch, log) breaks after so many bytes."""
    cleanly: bool = False
    """The cut stream looks as if it had come to its end: a proxy's doing."""


@dataclass(frozen=True)
class Asked:
    """A request as it arrived; `method` is WATCH for a watch, FOLLOW for a log that is followed."""

    method: str
    path: str
    query: Mapping[str, str]
    at: float
    """time.monotonic(), which all processes of a machine share."""


class KubernetesServer:
    """One that lives: `with KubernetesServer() as server:`; `server.kubeconfig(path)` writes what a client needs."""

    def __init__(self, namespace: str = "team") -> None:
        self.namespace = namespace
        self.objects: dict[str, dict[str, Any]] = {}
        """By the path that one is read at."""
        self.requests: list[tuple[str, str]] = []
        self.asked: list[Asked] = []
        self.logs: dict[str, list[str]] = {}
        """A pod's log, `stamp text` by line; the last one may lack its line break."""
        self.previous_logs: dict[str, list[str]] = {}
        """Those of the container that ran before in the pod."""
        self.fault: Callable[[str, str], int | Fault | None] = lambda method, path: None
        """What a request meets in place of its answer, or on the way to it."""
        self.refusal: Callable[[dict[str, Any]], str] = lambda thing: ""
        """Why an object cannot be created (422), "" where it can."""
        self.on_apply: Callable[[dict[str, Any]], None] = lambda thing: None
        self.on_create: Callable[[dict[str, Any]], None] = lambda thing: None
        """Likewise, after an object was created."""
        self.before_create: Callable[[dict[str, Any]], None] = lambda thing: None
        """Sees an object, under the lock, just before it is there."""
        self.forward_to: tuple[str, int] = ("127.0.0.1", 0)
        """Where a pod's forwarded port leads."""
        self.changed = threading.Condition()
        self.closing = False
        self._version = 0
        self._forgotten = 0
        self._events: list[tuple[int, str, str, dict[str, Any]]] = []
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"of": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        self._server.shutdown()
        self._server.server_close()

    @property
    def port(self) -> int:
        return int(self._server.server_port)

    def kubeconfig(self, path: Path) -> Path:
        value = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "fake",
            "clusters": [{"name": "fake", "cluster": {"server": f"http://127.0.0.1:{self.port}"}}],
            "users": [{"name": "fake", "user": {"token": "a-token-of-the-tests"}}],
            "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake", "namespace": self.namespace}}],
        }
        path.write_text(json.dumps(value), encoding="utf-8")
        return path

    # --- what a test and its controllers do ---------------------------------------------------------------------------

    def of_kind(self, kind: str) -> dict[str, dict[str, Any]]:
        """Name → object, as they are now."""
        with self.changed:
            found = _copy([thing for thing in self.objects.values() if thing["kind"] == kind])
        return {thing["metadata"]["name"]: thing for thing in found}

    def until(self, holds: Callable[[], Any], seconds: float = 120.0) -> None:
        """Waits until that holds, looking at every change and request, and now and then."""
        deadline = time.monotonic() + seconds
        with self.changed:
            while not holds():
                assert time.monotonic() < deadline, "what was waited for did not come"
                self.changed.wait(0.05)

    def put(self, path: str, thing: dict[str, Any]) -> None:
        """An object in place of the one at that path, as a controller leaves it."""
        with self.changed:
            self._emit(path, "MODIFIED" if path in self.objects else "ADDED", thing)
            self.objects[path] = thing

    def set_status(self, kind: str, name: str, status: dict[str, Any]) -> None:
        with self.changed:
            for path, thing in self.objects.items():
                if thing["kind"] == kind and thing["metadata"]["name"] == name:
                    thing["status"] = status
                    self._emit(path, "MODIFIED", thing)
                    return

    def set_pods(self, labels: dict[str, str], status: dict[str, Any], name: str = "pod-1") -> None:
        """One pod, in place of all with that name."""
        metadata = {"name": name, "namespace": self.namespace, "labels": labels}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "status": status}
        self.put(f"/api/v1/namespaces/{self.namespace}/pods/{name}", pod)

    def write_log(self, pod: str, *lines: str) -> None:
        """Lines at the end of a pod's log, stamped as the kubelet does."""
        with self.changed:
            for line in lines:
                now = time.time_ns()
                stamp = datetime.fromtimestamp(now // 10**9, UTC).strftime("%Y-%m-%dT%H:%M:%S")
                self.logs.setdefault(pod, []).append(f"{stamp}.{now % 10**9:09d}Z {line}\n")
            self.changed.notify_all()

    def restart_log(self, pod: str) -> None:
        """The pod's container ended, and another began: its log is the previous one."""
        with self.changed:
            self.previous_logs[pod] = self.logs.pop(pod, [])
            self.changed.notify_all()

    def delete(self, path: str) -> None:
        """An object goes, and what it alone owns; with finalizers it only begins to."""
        with self.changed:
            thing = self.objects[path]
            if thing["metadata"].get("finalizers"):
                thing["metadata"].setdefault("deletionTimestamp", _now())
                self._emit(path, "MODIFIED", thing)
                return
            self.remove(path)
            uid = thing["metadata"].get("uid")
            owned = [
                other
                for other, one in self.objects.items()
                if [owner.get("uid") for owner in one["metadata"].get("ownerReferences", ())] == [uid]
            ]
            for other in owned:
                if other in self.objects:
                    self.delete(other)

    def remove(self, path: str) -> None:
        """An object goes, if it is there, and nothing else."""
        with self.changed:
            if path in self.objects:
                self._emit(path, "DELETED", self.objects.pop(path))

    def forget(self) -> None:
        """No watch can go on from before now: it is told 410."""
        with self.changed:
            self._forgotten = self._version

    # --- what the server does -----------------------------------------------------------------------------------------

    def _emit(self, path: str, kind: str, thing: dict[str, Any]) -> None:
        self._version += 1
        thing["metadata"]["resourceVersion"] = str(self._version)
        self._events.append((self._version, path, kind, _copy(thing)))
        self.changed.notify_all()

    def create(self, path: str, wanted: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """A status and an answer."""
        why = self.refusal(wanted)
        if why:
            return status(422, "Invalid", why)
        with self.changed:
            if path in self.objects:
                goes = "object is being deleted: " * ("deletionTimestamp" in self.objects[path]["metadata"])
                words, details = _named(path)
                return status(409, "AlreadyExists", f"{goes}{words} already exists", **details)
            made = _copy(wanted)
            self.before_create(made)
            made["metadata"] |= {
                "namespace": self.namespace,
                "uid": f"uid-{made['metadata']['name']}-{self._version}",
                "generation": 1,
                "creationTimestamp": _now(),
            }
            self.objects[path] = made
            self._emit(path, "ADDED", made)
            answer = _copy(made)
        self._created(_copy(answer))
        return 201, answer

    def _created(self, thing: dict[str, Any]) -> None:
        threading.Thread(target=self.on_create, args=(thing,), daemon=True).start()

    def apply(
        self, path: str, wanted: dict[str, Any], manager: str = "zhllama", force: bool = True
    ) -> tuple[int, dict[str, Any]]:
        """A status and an answer, as server_side_apply.applied has them."""
        with self.changed:
            found = self.objects.get(path)
            code, made = applied(found, wanted, manager, force)
            if code > 299:
                return code, made
            made["metadata"].setdefault("namespace", self.namespace)
            made["metadata"].setdefault("uid", f"uid-{self._version}")
            made["metadata"].setdefault("creationTimestamp", "2026-01-01T00:00:00Z")
            changed = found is None or found["spec"] != made["spec"]
            made["metadata"]["generation"] = (found or {"metadata": {}})["metadata"].get("generation", 0) + changed
            if made != found:
                self.objects[path] = made
                self._emit(path, "MODIFIED" if found else "ADDED", made)
            answer: dict[str, Any] = _copy(made)
        if changed:
            threading.Thread(target=self.on_apply, args=(_copy(answer),), daemon=True).start()
        return code, answer

    def merge(self, path: str, patch: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """A JSON merge patch (RFC 7386)."""

        def merged(into: Any, given: Any) -> Any:
            if not isinstance(given, dict):
                return given
            found = dict(into) if isinstance(into, dict) else {}
            for name, value in given.items():
                found[name] = merged(found.get(name), value)
            return {name: value for name, value in found.items() if value is not None or name not in given}

        with self.changed:
            found = self.objects.get(path)
            if found is None:
                return _not_found(path)
            self.objects[path] = made = merged(_copy(found), patch)
            self._emit(path, "MODIFIED", made)
            return 200, _copy(made)

    def scale(self, path: str, replicas: int, manager: str) -> None:
        """What an autoscaler or `kubectl scale` does: replicas, by the scale subresource."""
        with self.changed:
            made = scaled(self.objects[path], replicas, manager)
            made["metadata"]["generation"] += made["spec"] != self.objects[path]["spec"]
            self.objects[path] = made
            self._emit(path, "MODIFIED", made)

    def listed(self, root: str, query: Mapping[str, str]) -> tuple[list[dict[str, Any]], int]:
        with self.changed:
            found = [thing for path, thing in self.objects.items() if path.rpartition("/")[0] == root]
            return [_copy(thing) for thing in found if selected(thing, query)], self._version

    def events_after(self, version: int, root: str, timeout: float) -> list[tuple[int, str, dict[str, Any]]]:
        """Blocks until there are some, the time is over, or the server closes."""

        def found() -> list[tuple[int, str, dict[str, Any]]]:
            return [
                (v, kind, one) for v, path, kind, one in self._events if v > version and path.startswith(f"{root}/")
            ]

        with self.changed:
            self.changed.wait_for(lambda: bool(found()) or self.closing, timeout)
            return [] if self.closing else found()

    def expired(self, version: int) -> bool:
        return version < self._forgotten


def _named(path: str) -> tuple[str, dict[str, str]]:
    """What is at a path, as an API server's answers name it: in words, and in their details."""
    *_, plural, name = path.split("/")
    group = path.split("/")[2] if path.startswith("/apis/") else ""
    details = {"name": name, "kind": plural} | ({"group": group} if group else {})
    return f'{plural}{group and f".{group}"} "{name}"', details


def _not_found(path: str) -> tuple[int, dict[str, Any]]:
    words, details = _named(path)
    return status(404, "NotFound", f"{words} not found", **details)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _copy(thing: Any) -> Any:
    return json.loads(json.dumps(thing))


def selected(thing: dict[str, Any], query: Mapping[str, str]) -> bool:
    """Whether an object is one of those that a request's label and field selectors choose."""
    labels = thing["metadata"].get("labels", {})
    for term in filter(None, query.get("labelSelector", "").split(",")):
        name, _, value = term.partition("=")
        if labels.get(name) != value:
            return False
    for term in filter(None, query.get("fieldSelector", "").split(",")):
        place, _, value = term.partition("=")
        found: Any = thing
        for step in place.split("."):
            found = found.get(step, {})
        if found != value:
            return False
    return True


def _waits(pod: dict[str, Any], container: str) -> str | None:
    """Why a container has not started yet, "" where its pod has no node; None once it has started."""
    told = pod.get("status") or {}
    if any(one["type"] == "PodScheduled" and one["status"] == "False" for one in told.get("conditions") or ()):
        return ""
    for one in told.get("containerStatuses") or ():
        if one.get("name") == container and not one.get("lastState"):
            waiting: dict[str, str] | None = (one.get("state") or {}).get("waiting")
            return None if waiting is None else waiting.get("reason", "")
    return None


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is killed breaks its connections."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Cut(Exception):
    """A stream has come to the byte at which it breaks."""


class _Handler(BaseHTTPRequestHandler):
    of: KubernetesServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _do(self) -> None:
        url = urlparse(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        watching = query.get("watch") in ("true", "True")
        following = query.get("follow") in ("true", "True")
        method = "WATCH" if watching else "FOLLOW" if following else str(self.command)
        with self.of.changed:
            self.of.requests.append((self.command, url.path))
            self.of.asked.append(Asked(method, url.path, query, time.monotonic()))
            self.of.changed.notify_all()
        if self.headers.get("Authorization") != "Bearer a-token-of-the-tests":
            return self._answer(*status(401, "Unauthorized", "Unauthorized"))
        fault = self.of.fault(method, url.path) or Fault()
        if isinstance(fault, int):
            fault = Fault(status=fault)
        self._left = fault.cut
        if fault.hold is not None:
            while not fault.hold.wait(0.02) and not self.of.closing:
                pass
        if fault.lose == "before" or self.of.closing:
            return self._break()
        if fault.recorded:
            value = fault.recorded.get("body", fault.recorded.get("text"))
            return self._answer(fault.recorded["status"], value, fault.headers)
        if fault.status:
            return self._answer(fault.status, {"message": "a fault that the test put here"}, fault.headers)
        if url.path.endswith("/portforward"):
            pod = url.path.removesuffix("/portforward")
            if pod not in self.of.objects:
                return self._answer(*_not_found(pod))
            return self._forward(int(query["ports"]))
        with suppress(_Cut, BrokenPipeError, ConnectionResetError):
            if watching:
                return self._watch(url.path, query)
            if url.path.endswith("/log"):
                return self._log(url.path, query, following)
            code, answer = self._answer_of(url.path, query, body)
            return self._break() if fault.lose == "after" else self._answer(code, answer)
        if fault.cleanly:
            with suppress(OSError):
                self.wfile.write(b"0\r\n\r\n")
            return None
        return self._break()

    do_GET = do_POST = do_PATCH = do_DELETE = _do

    def _answer_of(self, path: str, query: dict[str, str], body: dict[str, Any]) -> tuple[int, Any]:
        """A status and an answer, with whatever was asked for done."""
        if self.command == "POST":
            if "metadata" not in body:
                # the client was killed while it wrote
                return 400, {"message": "not an object"}
            return self.of.create(f"{path}/{body['metadata']['name']}", body)
        if self.command == "PATCH":
            if self.headers["Content-Type"] == "application/merge-patch+json":
                return self.of.merge(path, body)
            if self.headers["Content-Type"] != "application/apply-patch+yaml" or not query.get("fieldManager"):
                return 415, {"message": "only server-side apply and merge patches are served here"}
            return self.of.apply(path, body, query["fieldManager"], query.get("force") == "true")
        if path.rpartition("/")[2] in LISTS:
            items, version = self.of.listed(path, query)
            return 200, {"items": items, "metadata": {"resourceVersion": str(version)}}
        with self.of.changed:
            found = _copy(self.of.objects.get(path))
            if found is None:
                return _not_found(path)
            if self.command != "DELETE":
                return 200, found
            return self._delete(path, found, (body.get("preconditions") or {}).get("uid"))

    def _delete(self, path: str, found: dict[str, Any], wanted: str | None) -> tuple[int, Any]:
        """Answers with the object, while that is still there or a pod's, and else says that it has gone."""
        _, details = _named(path)
        uid = found["metadata"].get("uid")
        if wanted and wanted != uid:
            kind, group = found["kind"], f".{details['group']}" if "group" in details else ""
            why = f"the UID in the precondition ({wanted}) does not match the UID in record ({uid}). The object might"
            return status(
                409,
                "Conflict",
                f'Operation cannot be fulfilled on {kind}{group} "{details["name"]}": {why} have been deleted '
                "and then recreated",
                **details | {"kind": kind},
            )
        self.of.delete(path)
        if path in self.of.objects or found["kind"] == "Pod":
            return 200, _copy(self.of.objects.get(path, found))
        gone = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
        return 200, gone | {"details": details | {"uid": uid}}

    def _answer(self, code: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        content = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        with suppress(BrokenPipeError, ConnectionResetError):
            self.send_response(code)
            self.send_header("Content-Type", "text/plain" if isinstance(value, str) else "application/json")
            self.send_header("Content-Length", str(len(content)))
            for name, text in (headers or {}).items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(content)

    def _break(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    # --- streams ------------------------------------------------------------------------------------------------------

    def _begin(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, content: bytes) -> None:
        """A piece of a stream, up to the byte at which it is to break."""
        if self._left >= 0:
            content, over = content[: self._left], len(content) > self._left
            self._left -= len(content)
        else:
            over = False
        if content:
            self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")
        if over:
            raise _Cut

    def _watch(self, root: str, query: dict[str, str]) -> None:
        self._begin("application/json")
        since = int(query.get("resourceVersion") or 0)
        if since == 0:
            items, since = self.of.listed(root, query)
            events = [("ADDED", thing) for thing in items]
        elif self.of.expired(since):
            gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
            self._chunk(json.dumps({"type": "ERROR", "object": gone}).encode() + b"\n")
            self.wfile.write(b"0\r\n\r\n")
            return
        else:
            events = []
        end = time.monotonic() + float(query.get("timeoutSeconds", 60))
        while True:
            for kind, thing in events:
                if selected(thing, query):
                    self._chunk(json.dumps({"type": kind, "object": thing}).encode() + b"\n")
            more = self.of.events_after(since, root, end - time.monotonic())
            if not more:
                break
            since, events = more[-1][0], [(kind, thing) for _, kind, thing in more]
        self.wfile.write(b"0\r\n\r\n")

    def _log(self, path: str, query: dict[str, str], following: bool) -> None:
        pod = path.split("/")[-2]
        logs = self.of.previous_logs if query.get("previous") in ("true", "True") else self.of.logs
        with self.of.changed:
            found = self.of.objects.get(path.removesuffix("/log"))
            if found is None:
                return self._answer(*_not_found(path.removesuffix("/log")))
            container = query.get("container", "main")
            if logs is self.of.previous_logs and pod not in logs:
                why = f'previous terminated container "{container}" in pod "{pod}" not found'
                return self._answer(*status(400, "BadRequest", why))
            if (waits := _waits(found, container)) is not None:
                why = f'container "{container}" in pod "{pod}" is waiting to start: {waits}'
                # a pod without a node has no log to speak of
                return self._answer(*status(400, "BadRequest", why)) if waits else self._answer(204, "")
            lines = logs.setdefault(pod, [])
        since = query.get("sinceTime", "").removesuffix("Z")
        self._begin("text/plain")
        sent = 0
        while True:
            with self.of.changed:
                new = lines[sent:]
                sent += len(new)
                running = logs.get(pod) is lines and self._runs(path.removesuffix("/log"))
            for line in new:
                # seconds: what the API server passes on of a time
                if line[: len(since)] >= since:
                    self._chunk(line.encode())
            if new:
                continue
            if not following or not running or self.of.closing:
                break
            with self.of.changed:
                if len(lines) == sent:
                    self.of.changed.wait(0.5)
        self.wfile.write(b"0\r\n\r\n")
        return None

    def _runs(self, path: str) -> bool:
        """Whether the pod's first container does."""
        status = self.of.objects.get(path, {}).get("status", {})
        containers = status.get("containerStatuses") or [{}]
        return status.get("phase") == "Running" and "terminated" not in (containers[0].get("state") or {})

    # --- a forwarded port ---------------------------------------------------------------------------------------------

    def _forward(self, port: int) -> None:
        """A connection to `of.forward_to`, over a WebSocket in the channels of v4.channel.k8s.io: 0 data, 1 errors."""
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode())
        self.send_header("Sec-WebSocket-Protocol", "v4.channel.k8s.io")
        self.end_headers()
        self.close_connection = True
        for channel in (0, 1):
            self._send_frame(bytes([channel]) + port.to_bytes(2, "little"))
        with socket.create_connection(self.of.forward_to) as far:
            threading.Thread(target=self._back, args=(far,), daemon=True).start()
            with suppress(OSError):
                while (content := self._frame()) is not None:
                    if content[:1] == b"\0":
                        far.sendall(content[1:])

    def _back(self, far: socket.socket) -> None:
        with suppress(OSError):
            while content := far.recv(60_000):
                self._send_frame(b"\0" + content)
            self.connection.shutdown(socket.SHUT_RDWR)

    def _send_frame(self, content: bytes) -> None:
        length = bytes([len(content)]) if len(content) < 126 else b"\x7e" + len(content).to_bytes(2, "big")
        self.connection.sendall(b"\x82" + length + content)

    def _frame(self) -> bytes | None:
        """The content of the next frame that holds some; None at the end."""
        while len(head := self.rfile.read(2)) == 2:
            size = head[1] & 127
            if size > 125:
                size = int.from_bytes(self.rfile.read(2 if size == 126 else 8), "big")
            mask = self.rfile.read(4)
            content = bytes(byte ^ mask[at % 4] for at, byte in enumerate(self.rfile.read(size)))
            if head[0] & 15 == 8:
                return None
            if head[0] & 15 in (0, 1, 2):
                return content
        return None
