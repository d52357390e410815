"""A small Kubernetes API server over real HTTP: objects by path in memory, and faults in front of its answers.

It does create, update, merge patch, server-side apply, scale, get, list (in pages), watch (from a resourceVersion,
with bookmarks), delete (uid, finalizers, propagation, what the object owns), pods' logs and forwarded ports, as a real
server did (tests/recordings/responses, replayed by tests/test_kubernetes_server.py); what it cannot do it answers 501.
What a controller would do is done by the test: `server.on_apply = function(object)` runs in a thread of its own after
each change of an object's spec, and moves things on with `set_status` and `set_pods`.
"""

import base64
import hashlib
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlparse

from tests import kubernetes_admission as admission
from tests import kubernetes_request as asking
from tests.kubernetes_log import LogQuery, waits
from tests.kubernetes_request import Account, Address, Refusal, not_served, refused, selected, status
from tests.recordings import answered
from tests.server_side_apply import applied, scaled

TOKEN = "a-token-of-the-tests"
GENERATIONS = ("Pod", "Deployment", "ReplicaSet", "StatefulSet", "Job", "NetworkPolicy")
"""Own kinds that count the versions of their spec; custom resources all do."""
GRACEFUL = ("Pod",)
BOOKMARK_EVERY = 60.0
REASONS = {
    400: "BadRequest", 401: "Unauthorized", 403: "Forbidden", 404: "NotFound", 409: "Conflict", 410: "Expired",
    422: "Invalid", 429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable", 504: "Timeout",
}  # fmt: skip


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
        self.told: dict[str, list[str]] = {}
        """Lines of a pod's log that requests were answered with, by pod: those whose end was sent."""
        self.fault: Callable[[str, str], int | Fault | None] = lambda method, path: None
        """What a request meets in place of its answer, or on the way to it."""
        self.accounts = {TOKEN: Account("zhllama")}
        """By token."""
        self.missing: set[str] = set()
        """Groups that this cluster does not have."""
        self.second = 1.0
        """How long a second of the server's time-outs takes."""
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
        self._gone: set[str] = set()
        """Uids of what was here: what comes later and names no other owner is collected."""
        self._forgotten = 0
        self._dry = False
        self._events: list[tuple[int, str, str, dict[str, Any], dict[str, Any] | None]] = []
        self._shown: dict[str, dict[str, Any]] = {}
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
            "users": [{"name": "fake", "user": {"token": TOKEN}}],
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

    def delete(self, path: str, policy: str = "Background") -> dict[str, Any] | None:
        """An object goes, and what it alone owns; with finalizers it only begins to: it is answered as it is then."""
        with self.changed:
            thing = self.objects[path]
            metadata = thing["metadata"]
            if policy == "Foreground":
                metadata["finalizers"] = [*metadata.get("finalizers", ()), "foregroundDeletion"]
            begun = None
            if metadata.get("finalizers") or thing["kind"] == "Namespace":
                if "deletionTimestamp" not in metadata:
                    going(thing)
                    self._emit(path, "MODIFIED", thing)
                begun = _copy(thing)
                if policy != "Foreground":
                    return begun
                metadata["finalizers"].remove("foregroundDeletion")
            uid = metadata.get("uid")
            owned = [
                other
                for other, one in self.objects.items()
                if [owner.get("uid") for owner in one["metadata"].get("ownerReferences", ())] == [uid]
            ]
            if not metadata.get("finalizers"):
                self.remove(path)
            for other in owned if policy != "Orphan" else ():
                if other in self.objects:
                    self.delete(other)
            return begun

    def remove(self, path: str) -> None:
        """An object goes, if it is there, and nothing else."""
        with self.changed:
            if path in self.objects:
                self._gone.add(self.objects[path]["metadata"].get("uid", ""))
                self._emit(path, "DELETED", self.objects.pop(path))
                self._shown.pop(path, None)

    def forget(self) -> None:
        """No watch can go on from before now: it is told 410."""
        with self.changed:
            self._forgotten = self._version

    # --- what the server does -----------------------------------------------------------------------------------------

    def _emit(self, path: str, kind: str, thing: dict[str, Any]) -> None:
        self._version += 1
        thing["metadata"]["resourceVersion"] = str(self._version)
        now = _copy(thing)
        self._events.append((self._version, path, kind, now, self._shown.get(path)))
        self._shown[path] = now
        self.changed.notify_all()

    def create(self, path: str, wanted: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """A status and an answer."""
        at = _address(path)
        with self.changed:
            space = self.objects.get(f"/api/v1/namespaces/{at.namespace}")
            if space is not None and "deletionTimestamp" in space["metadata"]:
                why = f"unable to create new content in namespace {at.namespace} because it is being terminated"
                told = f"namespace {at.namespace} is being terminated"
                cause = {"reason": "NamespaceTerminating", "message": told, "field": "metadata.namespace"}
                words = f"{at.words} is forbidden: {why}"
                return status(403, "Forbidden", words, **at.details, causes=[cause])
            if path in self.objects:
                found = at.exists("deletionTimestamp" in self.objects[path]["metadata"])
                return found.code, found.body
            made = _copy(wanted)
            self.before_create(made)
            made["metadata"] |= {
                "namespace": at.namespace or self.namespace,
                "uid": f"uid-{made['metadata']['name']}-{self._version}",
                "creationTimestamp": _now(),
            }
            if counted(at):
                made["metadata"]["generation"] = 1
            self.objects[path] = made
            self._emit(path, "ADDED", made)
            answer = _copy(made)
            owners = {owner["uid"] for owner in made["metadata"].get("ownerReferences", ())}
            if owners and owners <= self._gone:
                self.remove(path)
            elif not self._dry:
                self._created(_copy(answer))
        return 201, answer

    def _created(self, thing: dict[str, Any]) -> None:
        threading.Thread(target=self.on_create, args=(thing,), daemon=True).start()

    def apply(
        self, path: str, wanted: dict[str, Any], manager: str = "zhllama", force: bool = True
    ) -> tuple[int, dict[str, Any]]:
        """A status and an answer, as server_side_apply.applied has them."""
        at = _address(path)
        with self.changed:
            found = self.objects.get(path)
            given = wanted["metadata"]
            if found is None and given.get("uid"):
                why = (
                    f"uid mismatch: the provided object specified uid {given['uid']}, and no existing object was found"
                )
                return at.conflict(why).code, at.conflict(why).body
            if (
                found
                and given.get("resourceVersion", found["metadata"]["resourceVersion"])
                != (found["metadata"]["resourceVersion"])
            ):
                return at.stale().code, at.stale().body
            code, made = applied(found, wanted, manager, force)
            if code > 299:
                return code, made
            if found is not None:
                try:
                    admission.changed(found, made | {"metadata": made["metadata"] | _uid(given)}, at)
                except Refusal as no:
                    return no.code, no.body
            made["metadata"].setdefault("namespace", at.namespace or self.namespace)
            made["metadata"].setdefault("uid", f"uid-{self._version}")
            made["metadata"].setdefault("creationTimestamp", "2026-01-01T00:00:00Z")
            changed = found is None or found.get("spec") != made.get("spec")
            if counted(at):
                before = (found or {"metadata": {}})["metadata"].get("generation", 0)
                made["metadata"]["generation"] = before + changed
            if made != found:
                self.objects[path] = made
                self._emit(path, "MODIFIED" if found else "ADDED", made)
            answer: dict[str, Any] = _copy(made)
            if changed and not self._dry:
                threading.Thread(target=self.on_apply, args=(_copy(answer),), daemon=True).start()
        return code, answer

    def change(self, at: Address, make: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        """An object becomes what is made of it, if it may. Refusal where it may not, or is not there."""
        with self.changed:
            found = self.objects.get(at.path)
            if found is None:
                raise at.not_found()
            # a test may have put it there by hand
            found["metadata"].setdefault("resourceVersion", str(self._version))
            found["metadata"].setdefault("uid", f"uid-{at.name}-{self._version}")
            made = make(_copy(found))
            version = made["metadata"].get("resourceVersion", found["metadata"]["resourceVersion"])
            if version != found["metadata"]["resourceVersion"]:
                raise at.stale()
            for field in ("creationTimestamp", "deletionTimestamp", "generation", "namespace"):
                if field in found["metadata"]:
                    made["metadata"][field] = found["metadata"][field]
            admission.changed(found, made, at)
            made["metadata"] |= {"uid": found["metadata"]["uid"], "resourceVersion": version}
            if counted(at) and found.get("spec") != made.get("spec"):
                made["metadata"]["generation"] = made["metadata"].get("generation", 0) + 1
            if made == found:
                return made
            self.objects[at.path] = made
            self._emit(at.path, "MODIFIED", made)
            answer: dict[str, Any] = _copy(made)
            if made["metadata"].get("deletionTimestamp") and not made["metadata"].get("finalizers"):
                self.remove(at.path)
            return answer

    def scale(self, path: str, replicas: int, manager: str) -> None:
        """What an autoscaler or `kubectl scale` does: replicas, by the scale subresource."""
        with self.changed:
            made = scaled(self.objects[path], replicas, manager)
            made["metadata"]["generation"] += made["spec"] != self.objects[path]["spec"]
            self.objects[path] = made
            self._emit(path, "MODIFIED", made)

    @contextmanager
    def dry_run(self, dry: bool) -> Iterator[None]:
        """Nothing that is done meanwhile stays."""
        if not dry:
            yield
            return
        with self.changed:
            before = _copy(self.objects), dict(self._shown), self._version, len(self._events)
            self._dry = True
            try:
                yield
            finally:
                self._dry = False
                self.objects, self._shown, self._version = before[:3]
                del self._events[before[3] :]

    def listed(self, root: str, query: Mapping[str, str]) -> tuple[list[dict[str, Any]], int]:
        """Those of a collection that the selectors choose, by name, and the version of the whole."""
        at = _address(root)
        with self.changed:
            found = {path: thing for path, thing in self.objects.items() if _in(path, at)}
            chosen = [_copy(thing) for _, thing in sorted(found.items()) if selected(thing, query, at)]
            return chosen, self._version

    def page(self, at: Address, query: Mapping[str, str]) -> dict[str, Any]:
        """The answer to a list: in pages, where a limit asks for them."""
        items, version = self.listed(at.collection, query)
        asked, exact = int(query.get("resourceVersion") or 0), query.get("resourceVersionMatch") == "Exact"
        start, token = "", query.get("continue", "")
        if token:
            start, rv = _token(token)
            if rv < self._forgotten:
                code, body = status(410, "Expired", _TOO_OLD)
                raise Refusal(code, body | {"metadata": {"continue": _token_of(start, -1)}})
        if asked > version:
            self._closed_within(3.0)
            told = f"Too large resource version: {asked}, current: {version}"
            causes = [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}]
            details = {"causes": causes, "retryAfterSeconds": 1}
            raise Refusal(*status(504, "Timeout", f"Timeout: {told}", **details), {"Retry-After": "1"})
        if exact and asked < self._forgotten:
            raise refused(410, "Expired", "The resourceVersion for the provided list is too old.")
        rest = [one for one in items if one["metadata"]["name"] >= start]
        # of what a server has at hand it gives all
        limit = (int(query.get("limit") or 0) if query.get("resourceVersion") != "0" else 0) or len(rest)
        metadata: dict[str, Any] = {"continue": ""} if at.custom else {}
        metadata["resourceVersion"] = str(version)
        if len(rest) > limit:
            metadata["continue"] = _token_of(rest[limit - 1]["metadata"]["name"] + "\0", version)
            if not query.get("labelSelector") and not query.get("fieldSelector"):
                metadata["remainingItemCount"] = len(rest) - limit
        shown = rest[:limit]
        if not at.custom:
            # only custom resources say in a list what they are
            shown = [{key: value for key, value in one.items() if key not in ("kind", "apiVersion")} for one in shown]
        return {"kind": f"{at.kind}List", "apiVersion": at.api_version, "metadata": metadata, "items": shown}

    def _closed_within(self, seconds: float) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.closing, seconds * self.second)

    def events_after(self, version: int, root: str, timeout: float) -> list[tuple[int, str, dict[str, Any], Any]]:
        """Blocks until there are some, the time is over, or the server closes."""
        at = _address(root)

        def found() -> list[tuple[int, str, dict[str, Any], Any]]:
            return [(v, kind, one, was) for v, path, kind, one, was in self._events if v > version and _in(path, at)]

        with self.changed:
            self.changed.wait_for(lambda: bool(found()) or self.closing, timeout)
            return [] if self.closing else found()

    def expired(self, version: int) -> bool:
        return version < self._forgotten


_TOO_OLD = (
    "The provided continue parameter is too old to display a consistent list result. You can start a new list without "
    "the continue parameter, or use the continue token in this response to retrieve the remainder of the results. "
    "Continuing with the provided token results in an inconsistent list - objects that were created, modified, or "
    "deleted between the time the first chunk was returned and now may show up in the list."
)


def _token_of(start: str, version: int) -> str:
    told = {"v": "meta.k8s.io/v1", "rv": version, "start": start}
    return base64.urlsafe_b64encode(json.dumps(told, separators=(",", ":")).encode()).decode().rstrip("=")


def _token(text: str) -> tuple[str, int]:
    """Where a list goes on, and the version it is of."""
    try:
        told = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        return told["start"], told["rv"]
    except ValueError as error:
        first = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))[:1].decode("latin-1")
        why = f"continue key is not valid: invalid character '{first}' looking for beginning of value"
        raise refused(400, "BadRequest", f"invalid continue token: {why}") from error


def _address(path: str) -> Address:
    found = Address.of(path)
    assert found is not None, path
    return found


def _in(path: str, at: Address) -> bool:
    """Whether an object's path is in a collection; without a namespace, in that of all."""
    one = _address(path)
    same = (one.group, one.version, one.resource) == (at.group, at.version, at.resource)
    return same and at.namespace in ("", one.namespace)


def _uid(given: Mapping[str, Any]) -> dict[str, Any]:
    return {"uid": given["uid"]} if given.get("uid") else {}


def counted(at: Address) -> bool:
    """Whether an object's generation is."""
    return at.custom or at.kind in GENERATIONS


def going(thing: dict[str, Any], grace: int | None = None) -> None:
    """It begins to be deleted."""
    metadata = thing["metadata"]
    metadata["deletionTimestamp"] = _now()
    if thing["kind"] == "Namespace":
        thing |= {"spec": {"finalizers": ["kubernetes"]}, "status": {"phase": "Terminating"}}
        return
    metadata["deletionGracePeriodSeconds"] = 0
    if grace is None and thing["kind"] == "Pod" and (thing.get("spec") or {}).get("nodeName"):
        metadata["deletionGracePeriodSeconds"] = thing["spec"].get("terminationGracePeriodSeconds", 30)
    if "generation" in metadata:
        metadata["generation"] += 1


def merged(into: Any, given: Any) -> Any:
    """A JSON merge patch (RFC 7386)."""
    if not isinstance(given, dict):
        return given
    found = dict(into) if isinstance(into, dict) else {}
    for name, value in given.items():
        found[name] = merged(found.get(name), value)
    return {name: value for name, value in found.items() if value is not None or name not in given}


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _copy(thing: Any) -> Any:
    return json.loads(json.dumps(thing))


def _seen(
    kind: str, one: dict[str, Any], was: dict[str, Any] | None, query: Mapping[str, str], at: Address
) -> tuple[str, dict[str, Any]] | None:
    """A change as a watch with selectors sees it: an object comes in, and goes."""
    before = was is not None and kind != "ADDED" and selected(was, query, at)
    now = kind != "DELETED" and selected(one, query, at)
    if not before and not now:
        return None
    if before and was is not None and kind != "DELETED" and not now:
        # what leaves the selection is shown as it was in it
        return "DELETED", was | {"metadata": was["metadata"] | {"resourceVersion": one["metadata"]["resourceVersion"]}}
    return {(True, True): "MODIFIED", (False, True): "ADDED", (True, False): "DELETED"}[before, now], one


def scale_of(thing: dict[str, Any]) -> dict[str, Any]:
    labels = thing["spec"]["selector"]["matchLabels"].items()
    metadata = {k: v for k, v in thing["metadata"].items() if k not in ("labels", "annotations", "generation")}
    metadata.pop("managedFields", None)
    told = {"replicas": (thing.get("status") or {}).get("replicas", 0)}
    told["selector"] = ",".join(f"{name}={value}" for name, value in labels)
    spec = {"replicas": thing["spec"].get("replicas", 1)}
    return {"kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": metadata, "spec": spec, "status": told}


def _about_itself(path: str) -> tuple[int, Any]:
    """What is no resource."""
    if path == "/version":
        return 200, answered("info/version")["body"]
    if path in ("/readyz", "/healthz", "/livez"):
        return 200, "ok"
    if path.startswith(("/api/", "/apis/")) or path in ("/api", "/apis"):
        raise not_served("discovery")
    raise asking.PLAIN_404


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
    disable_nagle_algorithm = True  # else an answer's body waits 0.04 s for its head to be acknowledged

    def log_message(self, *_: Any) -> None:
        pass

    def _do(self) -> None:
        url = urlparse(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        watching, following = asking.true(query.get("watch")), asking.true(query.get("follow"))
        method = "WATCH" if watching else "FOLLOW" if following else str(self.command)
        with self.of.changed:
            self.of.requests.append((self.command, url.path))
            self.of.asked.append(Asked(method, url.path, query, time.monotonic()))
            self.of.changed.notify_all()
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        account = self.of.accounts.get(token) if token else asking.ANONYMOUS
        if account is None:
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
            told = fault.recorded
            lines = "".join(json.dumps(one["line"]) + "\n" for one in told.get("lines", ()))
            value = told.get("body", told.get("text", lines))
            return self._answer(told["status"], value, {**told.get("headers", {}), **fault.headers})
        if fault.status:
            why = status(fault.status, REASONS.get(fault.status, ""), "a fault that the test put here")
            return self._answer(*why, fault.headers)
        try:
            with suppress(_Cut, BrokenPipeError, ConnectionResetError):
                at = Address.of(url.path)
                if at is None:
                    return self._answer(*_about_itself(url.path))
                self._allowed(account, at, query)
                if watching:
                    return self._watch(at, query)
                if at.sub == "log":
                    return self._log(at, query, following)
                if at.sub in ("portforward", "exec", "attach"):
                    return self._upgraded(at, query)
                self._warnings: list[str] = []
                with self.of.dry_run("dryRun" in query):
                    code, answer = self._answer_of(at, query, body)
                    if query.get("dryRun") and code == 201:
                        answer["metadata"].pop("resourceVersion", None)
                told = {"Warning": ", ".join(f"299 - {json.dumps(one)}" for one in self._warnings)}
                if fault.lose == "after":
                    return self._break()
                return self._answer(code, answer, told if self._warnings else None)
        except Refusal as no:
            return self._answer(no.code, no.body, no.headers)
        except (AssertionError, KeyError, TypeError, AttributeError, ValueError) as error:
            # a test's object that nobody could have made; a lost connection would be tried again for ever
            return self._answer(*status(501, "NotImplemented", f"the API server of the tests: {error!r}"))
        if fault.cleanly:
            with suppress(OSError):
                self.wfile.write(b"0\r\n\r\n")
            return None
        return self._break()

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _do

    def _allowed(self, account: Account, at: Address, query: dict[str, str]) -> None:
        """Who asks for what, and how: before any object is looked at."""
        asking.impersonation(account, self.headers.get("Impersonate-User"))
        name = query.get("fieldSelector", "").removeprefix("metadata.name=")
        if self.command != "POST" or not at.resource.startswith("selfsubject"):
            asking.authorized(account, asking.verb_of(self.command, at, query), at, name)
        if at.group in self.of.missing:
            raise asking.PLAIN_404
        at.known()
        if at.resource == "selfsubjectaccessreviews":
            self._account = account
        asking.acceptable(self.headers.get("Accept"))
        if at.sub in ("log", "portforward", "exec", "attach"):
            return
        kind = (self.headers.get("Content-Type") or "").partition(";")[0]
        if self.command != "PATCH" or at.name:
            asking.media_type(self.command, kind, at)
        asking.options(self.command, query, kind)
        if self.command == "GET" and not at.name:
            asking.listing(query, at)

    def _object(self, at: Address, body: bytes) -> dict[str, Any]:
        """What a request brings."""
        if len(body) > admission.MOST_OF_A_REQUEST:
            told = f"Request entity too large: limit is {admission.MOST_OF_A_REQUEST}"
            raise refused(413, "RequestEntityTooLarge", told)
        try:
            given = json.loads(body)
        except ValueError as error:
            text = body.decode(errors="replace")
            if getattr(error, "pos", 0) < len(text.rstrip()) and not text.startswith("{"):
                raise not_served("to read what is no JSON") from error
            why = "couldn't get version/kind; json parse error: unexpected end of JSON input"
            told = f"the object provided is unrecognized (must be of type {at.kind}): {why} ({text or '<empty>'})"
            raise refused(400, "BadRequest", told) from error
        if not isinstance(given, dict):
            raise not_served("to read what is no object")
        return given

    def _answer_of(self, at: Address, query: dict[str, str], body: bytes) -> tuple[int, Any]:
        """A status and an answer, with whatever was asked for done."""
        if self.command == "GET":
            return 200, self._got(at) if at.name else self.of.page(at, query)
        if self.command == "DELETE":
            return 200, self._deleted(at, query, self._object(at, body) if body else {})
        if at.sub == "eviction":
            return self._evicted(at, self._object(at, body))
        if self.command == "POST":
            return self._posted(at, query, self._object(at, body))
        if not at.name:
            raise refused(400, "BadRequest", "name must be provided")
        given = self._object(at, body)
        metadata = given.setdefault("metadata", {})
        for name, known in (("name", at.name), ("namespace", at.namespace)):
            self._same(name, metadata.get(name, known), known)
        if at.sub and at.sub not in ("scale", "status"):
            raise not_served(f"the subresource {at.sub}")
        kind = self.headers["Content-Type"].partition(";")[0]
        if self.command == "PUT" or kind == "application/merge-patch+json":
            return 200, self._changed(at, query, given, self.command == "PUT")
        if at.sub:
            raise not_served(f"to apply the subresource {at.sub}")
        metadata.setdefault("name", at.name)
        admission.typed(given, at)
        admission.small_map(given, at)
        admission.small(given)
        if at.path not in self.of.objects:
            admission.guarded([*self.of.objects.values()], at.namespace)
            admission.valid(given, at)
        return self.of.apply(at.path, given, query["fieldManager"], query.get("force") == "true")

    def _same(self, what: str, given: str, known: str) -> None:
        if given == known:
            return
        if what == "namespace":
            told = "the namespace of the provided object does not match the namespace sent on the request"
            raise refused(400, "BadRequest", told)
        raise refused(
            400, "BadRequest", f"the name of the object ({given}) does not match the name on the URL ({known})"
        )

    def _got(self, at: Address) -> dict[str, Any]:
        with self.of.changed:
            found = self.of.objects.get(at.path)
            if found is None:
                raise at.not_found()
            if at.sub == "scale":
                return scale_of(found)
            if at.sub not in ("", "status"):
                raise not_served(f"the subresource {at.sub}")
            return dict(_copy(found))

    def _posted(self, at: Address, query: dict[str, str], given: dict[str, Any]) -> tuple[int, Any]:
        if at.resource == "selfsubjectaccessreviews":
            asked = given["spec"]["resourceAttributes"]
            allowed = self._account.may(asked["verb"], asked["resource"], asked.get("name", ""))
            return 201, given | {"metadata": {}, "status": {"allowed": allowed}}
        if at.kind in ("SelfSubjectReview", "Role", "RoleBinding") or at.sub:
            raise not_served(f"{at.kind}{at.sub and '/'}{at.sub}: it knows accounts by what a test says that they may")
        if not isinstance(given.get("metadata"), dict) or "name" not in given["metadata"]:
            raise not_served("to make an object without a name")
        at = at.called(given["metadata"]["name"])
        self._same("namespace", given["metadata"].get("namespace", at.namespace), at.namespace)
        self._warnings = admission.decoded(given, at, query.get("fieldValidation", ""))
        admission.small_map(given, at)
        admission.valid(given, at)
        admission.guarded([*self.of.objects.values()], at.namespace)
        if at.path not in self.of.objects:
            admission.small(given)
        return self.of.create(at.path, given)

    def _changed(self, at: Address, query: dict[str, str], given: dict[str, Any], whole: bool) -> dict[str, Any]:
        """A PUT, or a merge patch; of the whole object or of a part."""
        if at.sub == "scale":
            with self.of.changed:
                if at.path not in self.of.objects:
                    raise at.not_found()
                self.of.scale(at.path, given["spec"]["replicas"], query.get("fieldManager", "unknown"))
                return scale_of(self.of.objects[at.path])
        if whole and at.custom and "resourceVersion" not in given["metadata"] and at.path in self.of.objects:
            cause = (
                "FieldValueInvalid",
                "metadata.resourceVersion",
                "Invalid value: 0: must be specified for an update",
            )
            raise asking.invalid(at.resource, at.group, at.name, cause)

        def make(found: dict[str, Any]) -> dict[str, Any]:
            made: dict[str, Any] = merged(found, given)
            if whole:
                kept = {key: found["metadata"][key] for key in ("uid", "resourceVersion") if key in found["metadata"]}
                made = {**given, "metadata": kept | given["metadata"]}
            if at.sub == "status":
                return found | {"status": made.get("status")}
            self._warnings = admission.decoded(made, at, query.get("fieldValidation", ""))
            if made.get("spec") != found.get("spec"):
                admission.valid(made, at, found)
            return made | ({"status": found["status"]} if "status" in found else {})

        return self.of.change(at, make)

    def _deleted(self, at: Address, query: dict[str, str], given: dict[str, Any]) -> dict[str, Any]:
        """What is answered: the object, while that is still there or a pod's, and else that it has gone."""
        if not at.name:
            if at.resource == "namespaces":
                told = "the server does not allow this method on the requested resource"
                code, body = status(405, "MethodNotAllowed", told)
                raise Refusal(code, body)
            with self.of.changed:
                page = self.of.page(at, query)
                for one in page["items"]:
                    self.of.delete(at.called(one["metadata"]["name"]).path)
                return page
        asked = given.get("preconditions") or {}
        with self.of.changed:
            found = _copy(self.of.objects.get(at.path))
            if found is None:
                raise at.not_found()
            uid, version = found["metadata"].get("uid"), found["metadata"].get("resourceVersion")
            for name, wanted, there, might in (
                ("UID", asked.get("uid"), uid, "been deleted and then recreated"),
                ("ResourceVersion", asked.get("resourceVersion"), version, "been modified"),
            ):
                if wanted and wanted != there:
                    why = f"the {name} in the precondition ({wanted}) does not match the {name} in record ({there}). "
                    raise at.conflict(f"{why}The object might have {might}", as_kind=True)
            policy = query.get("propagationPolicy") or given.get("propagationPolicy") or "Background"
            begun = self.of.delete(at.path, policy)
            if begun is not None:
                return begun
            if found["kind"] in GRACEFUL:
                going(found, given.get("gracePeriodSeconds"))
                return dict(found)
            gone = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
            return gone | {"details": at.details | {"uid": uid}}

    def _evicted(self, at: Address, given: dict[str, Any]) -> tuple[int, Any]:
        with self.of.changed:
            if at.path not in self.of.objects:
                raise at.not_found()
            if self.of.of_kind("PodDisruptionBudget"):
                raise not_served("to hold an eviction to a PodDisruptionBudget")
            if "All" not in (given.get("deleteOptions") or {}).get("dryRun", ()):
                self.of.delete(at.path)
        return 201, {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}

    def _upgraded(self, at: Address, query: dict[str, str]) -> None:
        if self.headers.get("Upgrade", "").lower() != "websocket":
            raise refused(400, "BadRequest", "Upgrade request required")
        if at.path not in self.of.objects:
            raise at.not_found()
        if at.sub != "portforward":
            raise not_served(at.sub)
        self._forward(int(query["ports"]))

    def _answer(self, code: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        content = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        kind = "application/json"
        if isinstance(value, str):
            # the server's own words name their encoding, a pod's log does not
            kind = "text/plain; charset=utf-8" if code == 404 or value == "ok" else "text/plain"
        with suppress(BrokenPipeError, ConnectionResetError):
            self.send_response(code)
            if code != 204:
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
            for name, text in (headers or {}).items():
                self.send_header(name, text)
            self.end_headers()
            if code != 204:
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

    def _watch(self, at: Address, query: dict[str, str]) -> None:
        self._begin("application/json")
        since = int(query.get("resourceVersion") or 0)
        if since == 0:
            items, since = self.of.listed(at.collection, query)
            events = [("ADDED", thing) for thing in items]
        elif self.of.expired(since):
            told = f"too old resource version: {since} ({self.of._forgotten})"
            self._line("ERROR", status(410, "Expired", told)[1])
            self.wfile.write(b"0\r\n\r\n")
            return
        else:
            events = []
        whole = float(query.get("timeoutSeconds") or 60)
        begun = time.monotonic()
        marks = [BOOKMARK_EVERY * n for n in range(1, int(whole // BOOKMARK_EVERY) + 1)]
        marks = sorted({*marks, max(whole - 1.5, 0.0)}) if asking.true(query.get("allowWatchBookmarks")) else []
        while True:
            for kind, thing in events:
                self._line(kind, thing)
            until = begun + (marks[0] if marks else whole) * self.of.second
            more = self.of.events_after(since, at.collection, until - time.monotonic())
            if more:
                since = more[-1][0]
                events = [found for _, kind, one, was in more if (found := _seen(kind, one, was, query, at))]
            elif marks and not self.of.closing:
                marks.pop(0)
                version = {"resourceVersion": str(max(since, self.of._version))}
                events = [("BOOKMARK", {"kind": at.kind, "apiVersion": at.api_version, "metadata": version})]
            else:
                break
        self.wfile.write(b"0\r\n\r\n")

    def _line(self, kind: str, thing: dict[str, Any]) -> None:
        self._chunk(json.dumps({"type": kind, "object": thing}).encode() + b"\n")

    def _log(self, at: Address, query: dict[str, str], following: bool) -> None:
        asked = LogQuery.of(at, query)
        with self.of.changed:
            found = self.of.objects.get(at.path)
            if found is None:
                raise at.not_found()
            container = asked.container_of(found)
            key = f"{at.name}/{container}" if f"{at.name}/{container}" in self.of.logs else at.name
            logs = self.of.previous_logs if asked.previous else self.of.logs
            if asked.previous and key not in logs:
                why = f'previous terminated container "{container}" in pod "{at.name}" not found'
                raise refused(400, "BadRequest", why)
            if (waiting := waits(found, container)) is not None:
                if not waiting:  # a pod without a node has no log to speak of
                    return self._answer(204, "")
                why = f'container "{container}" in pod "{at.name}" is waiting to start: {waiting}'
                raise refused(400, "BadRequest", why)
            lines = logs.setdefault(key, [])
        self._begin("text/plain")
        sent = asked.first(lines)
        while True:
            with self.of.changed:
                new = lines[sent:]
                sent += len(new)
                running = logs.get(key) is lines and self._runs(at.path)
            for text in asked.shown(new):
                self._chunk(text)
                self.of.told.setdefault(at.name, []).append(text.decode())
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
