"""A small Kubernetes API server over real HTTP: objects by path in memory, server-side apply, list, watch and faults.

What a controller would do is done by the test: `server.on_apply = function(object)` runs in a thread of its own after
each change of an object's spec, and moves things on with `set_status` and `set_pods`.
"""

import base64
import hashlib
import json
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlparse

LISTS = ("pods", "deployments", "inferenceservices", "pytorchjobs", "trainjobs", "workflows")


class ApiServer:
    """One that lives: `with KubernetesServer() as server:`; `server.kubeconfig(path)` writes what a client needs."""

    def __init__(self, handler: "type[ApiHandler]", namespace: str) -> None:
        self.namespace = namespace
        self.requests: list[tuple[str, str]] = []
        self.changed = threading.Condition()
        self._version = 0
        self._events: list[tuple[int, str, str, dict[str, Any]]] = []
        self._closing = False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), {"of": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self.changed:
            self._closing = True
            self.changed.notify_all()
        self._server.shutdown()
        self._server.server_close()

    def kubeconfig(self, path: Path) -> Path:
        value = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "fake",
            "clusters": [{"name": "fake", "cluster": {"server": f"http://127.0.0.1:{self._server.server_port}"}}],
            "users": [{"name": "fake", "user": {"token": "a-token-of-the-tests"}}],
            "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake", "namespace": self.namespace}}],
        }
        path.write_text(json.dumps(value))
        return path

    def _emit(self, path: str, kind: str, thing: dict[str, Any]) -> None:
        self._version += 1
        thing["metadata"]["resourceVersion"] = str(self._version)
        self._events.append((self._version, path, kind, json.loads(json.dumps(thing))))
        self.changed.notify_all()

    def events_after(self, version: int, root: str, timeout: float) -> list[tuple[int, str, dict[str, Any]]]:
        """Blocks until there are some, the time is over, or the server closes."""

        def found() -> list[tuple[int, str, dict[str, Any]]]:
            return [
                (v, kind, one) for v, path, kind, one in self._events if v > version and path.startswith(f"{root}/")
            ]

        with self.changed:
            self.changed.wait_for(lambda: bool(found()) or self._closing, timeout)
            return [] if self._closing else found()


class ApiHandler(BaseHTTPRequestHandler):
    """The answers of an API server."""

    of: ApiServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _begin_watch(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _send_event(self, kind: str, thing: dict[str, Any]) -> None:
        line = json.dumps({"type": kind, "object": thing}).encode() + b"\n"
        self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")

    def _end_watch(self) -> None:
        self.wfile.write(b"0\r\n\r\n")

    def _answer(self, status: int, value: Any) -> None:
        self._answer_with(status, "application/json", json.dumps(value).encode())

    def _answer_with(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def selected(thing: dict[str, Any], query: dict[str, str]) -> bool:
    """Whether an object is one of those that a request's label and field selectors choose."""
    labels = thing["metadata"].get("labels", {})
    for term in filter(None, query.get("labelSelector", "").split(",")):
        name, _, value = term.partition("=")
        if labels.get(name) != value:
            return False
    field = query.get("fieldSelector", "")
    return not field or thing["metadata"]["name"] == field.removeprefix("metadata.name=")


class KubernetesServer(ApiServer):
    """Every kind of object."""

    def __init__(self, namespace: str = "team") -> None:
        super().__init__(_Handler, namespace)
        self.objects: dict[str, dict[str, Any]] = {}
        """By the path that one is read at."""
        self.fault: Callable[[str, str], int | None] = lambda method, path: None
        """A status for a request, in place of its answer."""
        self.on_apply: Callable[[dict[str, Any]], None] = lambda thing: None
        self.forward_to: tuple[str, int] = ("127.0.0.1", 0)
        """Where a pod's forwarded port leads."""

    # --- what a test and its controllers do ---------------------------------------------------------------------------

    def of_kind(self, kind: str) -> dict[str, dict[str, Any]]:
        """Name → object, as they are now."""
        with self.changed:
            found = json.loads(json.dumps([thing for thing in self.objects.values() if thing["kind"] == kind]))
        return {thing["metadata"]["name"]: thing for thing in found}

    def set_status(self, kind: str, name: str, status: dict[str, Any]) -> None:
        with self.changed:
            for path, thing in self.objects.items():
                if thing["kind"] == kind and thing["metadata"]["name"] == name:
                    thing["status"] = status
                    self._emit(path, "MODIFIED", thing)
                    return

    def set_pods(self, labels: dict[str, str], status: dict[str, Any], name: str = "pod-1") -> None:
        """One pod, in place of all with that name."""
        path = f"/api/v1/namespaces/{self.namespace}/pods/{name}"
        metadata = {"name": name, "namespace": self.namespace, "labels": labels}
        with self.changed:
            kind = "MODIFIED" if path in self.objects else "ADDED"
            self.objects[path] = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "status": status}
            self._emit(path, kind, self.objects[path])

    def delete(self, path: str) -> None:
        with self.changed:
            self._emit(path, "DELETED", self.objects.pop(path))

    # --- what the server does -----------------------------------------------------------------------------------------

    def apply(self, path: str, wanted: dict[str, Any]) -> dict[str, Any]:
        with self.changed:
            found = self.objects.get(path)
            made = json.loads(json.dumps(wanted))
            old = found or {"metadata": {"generation": 0, "uid": f"uid-{self._version}"}, "spec": None}
            changed = old["spec"] != made["spec"]
            made["metadata"] |= {
                "uid": old["metadata"]["uid"],
                "generation": old["metadata"]["generation"] + changed,
                "managedFields": [{"manager": "zhllama"}],
                "creationTimestamp": "2026-01-01T00:00:00Z",
            }
            if "status" in old:
                made["status"] = old["status"]
            self.objects[path] = made
            self._emit(path, "MODIFIED" if found else "ADDED", made)
            answer: dict[str, Any] = json.loads(json.dumps(made))
        if changed:
            threading.Thread(target=self.on_apply, args=(json.loads(json.dumps(answer)),), daemon=True).start()
        return answer

    def listed(self, root: str, query: dict[str, str]) -> tuple[list[dict[str, Any]], int]:
        with self.changed:
            found = [thing for path, thing in self.objects.items() if path.rpartition("/")[0] == root]
            return [json.loads(json.dumps(thing)) for thing in found if selected(thing, query)], self._version


class _Handler(ApiHandler):
    of: KubernetesServer

    def _do(self) -> None:
        url = urlparse(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        with self.of.changed:
            self.of.requests.append((self.command, url.path))
        if self.headers.get("Authorization") != "Bearer a-token-of-the-tests":
            return self._answer(401, {"message": "no token"})
        if (fault := self.of.fault(self.command, url.path)) is not None:
            return self._answer(fault, {"message": "a fault that the test put here"})
        if url.path.endswith("/portforward"):
            return self._forward(int(query["ports"]))
        if self.command == "PATCH":
            if self.headers["Content-Type"] != "application/apply-patch+yaml" or not query.get("fieldManager"):
                return self._answer(415, {"message": "only server-side apply is served here"})
            return self._answer(200, self.of.apply(url.path, body))
        if query.get("watch") in ("true", "True"):
            return self._watch(url.path, query)
        if url.path.rpartition("/")[2] in LISTS:
            items, version = self.of.listed(url.path, query)
            return self._answer(200, {"items": items, "metadata": {"resourceVersion": str(version)}})
        with self.of.changed:
            found = self.of.objects.get(url.path)
        if found is None:
            return self._answer(404, {"message": f"{url.path} not found"})
        if self.command == "DELETE":
            self.of.delete(url.path)
        return self._answer(200, found)

    do_GET = do_PATCH = do_DELETE = _do

    def _watch(self, root: str, query: dict[str, str]) -> None:
        self._begin_watch()
        version = int(query.get("resourceVersion") or 0)
        # one round: a watch that is asked again from where it was goes on
        for _, kind, thing in self.of.events_after(version, root, float(query.get("timeoutSeconds", 60))):
            if selected(thing, query):
                self._send_event(kind, thing)
        self._end_watch()

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
