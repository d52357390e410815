"""The API server of the tests is held against a real one: each recorded exchange is made again, in the order of the
recording, and the answers are compared: status, headers, body, and the lines of streams.

A recorded object has more fields than ours, which fills in no defaults: ours are all among them, and alike.
"""

import copy
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import urllib3

from tests.kubernetes_request import Account
from tests.kubernetes_server import TOKEN, KubernetesServer
from tests.recordings import exchanges

NOT_SERVED = {
    "quota/": "no quota is counted",
    "limitrange/": "no LimitRange is applied",
    "policy/": "no policy is evaluated",
    "webhook/": "no webhook is called",
    "unprocessable/core": "the server's words for faults are not known, but for a wrong type in a custom resource",
    "unprocessable/webhook": "likewise, of the operator's webhook",
    "immutable/pytorchjob-master-replicas": "likewise",
    "rbac/role-escalation-with-rights": "Roles are not read: a test says what an account may",
    "rbac/bind-escalation": "likewise",
    "rbac/whoami": "accounts have a name and nothing else",
    "media/protobuf-on-crd": "JSON alone is spoken",
    "media/table": "likewise",
    "media/metadata-only": "likewise",
    "update/image-by-other": "no strategic merge patch",
    "apply/conflict-two-managers": "lists are not merged by key, so nobody owns a part of one",
    "immutable/statefulset-": "which fields may change is known of the kinds alone that the project changes",
    "immutable/job-": "likewise",
    "immutable/pod-": "likewise",
    "immutable/configmap-": "likewise",
    "immutable/secret-type": "likewise",
    "immutable/service-": "likewise",
    "immutable/pvc-": "likewise",
    "immutable/role-ref": "likewise",
    "watch/initial-events": "the recording server's storage could not do it either",
    "evict/budget": "no disruption budget is counted",
    "info/groups-kubeflow": "no discovery",
    "info/resources-kubeflow": "no discovery",
}
"""Exchanges, by the beginning of their ids, that our server says it cannot do, and why."""
RECORDED = exchanges()
GONE = "gone"
CLIENTS = {
    "rbac/": "nobody",
    "auth/": "no such token",
    "auth/no-token": "",
    "auth/before": GONE,
    "auth/account-just": GONE,
}


def body_of(name: str) -> dict[str, Any]:
    sent = RECORDED[name]["request"]["body"]
    return copy.deepcopy(json.loads(sent) if isinstance(sent, str) else sent)


class Cluster:
    """The server, with what lay in the recorded cluster and what others did there between the exchanges."""

    def __init__(self, server: KubernetesServer) -> None:
        self.server = server
        server.accounts["nobody"] = Account("system:serviceaccount:rec-rbac:default", self._may)
        server.accounts[GONE] = Account("system:serviceaccount:rec-rbac:gone", lambda *_: False)
        self.before = {
            "quota/must-specify": lambda: self.put("rec-quota", "ResourceQuota", "team", like="quota/status"),
            "limitrange/defaults": lambda: self.put("rec-limit", "LimitRange", "team"),
            "policy/deny": lambda: self.put("rec-vap", "ValidatingAdmissionPolicyBinding", "need-team"),
            "policy/warn": lambda: self.put("rec-x", "ValidatingAdmissionPolicyBinding", "need-team"),
            "webhook/no-endpoints": self._hooked,
            "namespace/delete": self._terminating,
            "auth/account-deleted": lambda: self.server.accounts.pop(GONE),
            "rbac/get": self._in_rbac,
            "rbac/role-escalation-with-rights": lambda: self._rights("all"),
            "rbac/apply-creates-without-create": lambda: self._rights("none"),
            "rbac/resource-name-list": lambda: self._rights("one"),
            "rbac/self-review": lambda: self._rights("none"),
            "rbac/self-review-yes": lambda: self._rights("all"),
            "rbac/impersonate": lambda: self._rights("none"),
            "unknown/apply-core": lambda: self.put("rec-x", "ConfigMap", "settings", {"data": {}}),
            "create/configmap": lambda: self.server.remove(path_of("rec-x", "ConfigMap", "settings")),
            "conflict/stale": lambda: self.put("rec-x", "ConfigMap", "settings", {"data": {"b": "2"}}),
            "delete/pytorchjob-foreground": lambda: self.make("create/pytorchjob"),
            "delete/finalizer": self._held,
            "delete/collection": self._set,
            "delete/pod": lambda: self.pod("waiting", UNSCHEDULED, ("server",)),
            "apply/conflict-two-managers": self._edited,
            "apply/selector": lambda: self._edited(False),
            "immutable/deployment-selector": self._fixed,
            "list/page": self._pages,
            "list/continue-old": self.server.forget,
            "watch/by-name": lambda: self._quick(1.0),
            "watch/label-leaves": self._labels,
            "log/just-created": self._pods,
            "log/follow": self._runs,
            "evict/budget": lambda: self.put("rec-x", "PodDisruptionBudget", "kept"),
            "evict/dry-run": lambda: self.server.remove(path_of("rec-x", "PodDisruptionBudget", "kept")),
        }
        self.while_read: dict[str, list[Callable[[], object]]] = {
            "watch/by-name": [lambda: self.server.remove(path_of("rec-x", "ConfigMap", "l1"))],
            "log/follow": [lambda: None, *[lambda n=n: self._line(n) for n in range(9, 13)]],
            "log/follow-deleted": [*[lambda n=n: self._line(n) for n in range(13, 18)], self._run_ends],
        }
        """What is done after each line of a stream."""
        self.rights = "none"
        self.server.second = 0.01
        self.server.missing = {"monitoring.coreos.com"}

    # --- what lay there

    def put(self, space: str, kind: str, name: str, more: dict[str, Any] | None = None, like: str = "") -> None:
        """An object; as the answer to an exchange, or of fields that a test needs."""
        thing = (
            copy.deepcopy(RECORDED[like]["response"]["body"]) if like else {"metadata": {"name": name}, **(more or {})}
        )
        api_version = {"PyTorchJob": "kubeflow.org/v1", "TrainJob": "trainer.kubeflow.org/v1alpha1"}.get(kind, "v1")
        thing |= {"apiVersion": thing.get("apiVersion", api_version), "kind": kind}
        thing["metadata"] |= {"namespace": space, "creationTimestamp": "2026-11-29T00:00:00Z"} if space else {}
        thing["metadata"].setdefault("uid", f"uid-of-{name}")
        if kind in ("PyTorchJob", "TrainJob", "Pod", "Deployment"):
            thing["metadata"].setdefault("generation", 1)
        self.server.put(path_of(space, kind, name), thing)

    def make(self, name: str, like: Callable[[dict[str, Any]], None] = lambda thing: None) -> None:
        """An object that an exchange makes, made once more."""
        thing = body_of(name)
        like(thing)
        path = RECORDED[name]["request"]["path"].partition("?")[0]
        code, _ = self.server.create(f"{path}/{thing['metadata']['name']}", thing)
        assert code == 201

    def pod(self, name: str, status: dict[str, Any], containers: tuple[str, ...] = ("main",), first: str = "") -> None:
        spec: dict[str, Any] = {"containers": [{"name": one} for one in containers]}
        if first:
            spec["initContainers"] = [{"name": first}]
        if "conditions" not in status:
            spec |= {"nodeName": "node-1", "terminationGracePeriodSeconds": 1}
        labels = {} if name == "waiting" else {"labels": {"app": name}}
        self.put("rec-x", "Pod", name, {"metadata": {"name": name} | labels, "spec": spec, "status": status})

    def _may(self, verb: str, resource: str, name: str) -> bool:
        return self.rights == "all" or (self.rights == "one" and name == "llama-lora")

    def _rights(self, which: str) -> None:
        self.rights = which

    def _quick(self, second: float) -> None:
        self.server.second = second

    def _hooked(self) -> None:
        self.server.remove(path_of("", "ValidatingAdmissionPolicyBinding", "need-team"))
        self.put("", "ValidatingWebhookConfiguration", "away")

    def _terminating(self) -> None:
        self.server.remove(path_of("", "ValidatingWebhookConfiguration", "away"))
        self.put(
            "",
            "Namespace",
            "rec-term",
            {"metadata": {"name": "rec-term", "labels": {"kubernetes.io/metadata.name": "rec-term"}}},
        )
        self.server.objects[path_of("", "Namespace", "rec-term")]["metadata"]["creationTimestamp"] = (
            "2026-11-29T00:00:00Z"
        )
        self.put("rec-term", "ConfigMap", "settings", like="object/finalizer-held")

    def _in_rbac(self) -> None:
        self.put("rec-rbac", "PyTorchJob", "llama-lora", body_of("create/pytorchjob"))

    def _held(self) -> None:
        def hold(thing: dict[str, Any]) -> None:
            thing["metadata"] |= {"name": "held", "finalizers": ["zhllama.io/hold"]}

        self.make("create/pytorchjob", hold)

    def _set(self) -> None:
        for name in ("c1", "c2"):
            self.put(
                "rec-x",
                "ConfigMap",
                name,
                {"metadata": {"name": name, "labels": {"set": "a"}}, "data": {"key.yaml": "a: 1\n"}},
            )

    def _edited(self, by_other: bool = True) -> None:
        """Another manager owns a container's image."""
        thing = self.server.objects["/apis/apps/v1/namespaces/rec-x/deployments/server"]
        managers = thing["metadata"]["managedFields"]
        if not by_other:
            managers.pop()
            return
        image = {"f:containers": {'k:{"name":"server"}': {"f:image": {}}}}
        fields = {"f:spec": {"f:template": {"f:spec": image}}}
        managers.append({"manager": "kubectl-edit", "operation": "Update", "apiVersion": "apps/v1", "fieldsV1": fields})

    def _fixed(self) -> None:
        def imm(kind: str, name: str, api_version: str, more: dict[str, Any]) -> None:
            self.put("rec-imm", kind, name, {"apiVersion": api_version, **more, "metadata": {"name": name}})

        labels = {"app": "llama"}
        template = {"metadata": {"labels": labels}, "spec": {"containers": []}}
        imm("Deployment", "server", "apps/v1", {"spec": {"selector": {"matchLabels": labels}, "template": template}})
        imm("StatefulSet", "store", "apps/v1", {"spec": {"serviceName": "store", "volumeClaimTemplates": [{}]}})
        imm("Job", "once", "batch/v1", {"spec": {"completions": 1}})
        imm("Pod", "server", "v1", {"spec": {"containers": []}})
        imm("ConfigMap", "settings", "v1", {"data": {}, "immutable": True})
        imm("Secret", "zhllama-s3", "v1", {"type": "Opaque"})
        imm("Service", "server", "v1", {"spec": {"clusterIP": "198.51.100.1"}})
        imm("PersistentVolumeClaim", "cache", "v1", {"spec": {"accessModes": ["ReadWriteOnce"]}})
        imm("RoleBinding", "zhllama-runner", "rbac.authorization.k8s.io/v1", {"roleRef": {}})
        job = body_of("create/pytorchjob")
        master = job["spec"]["pytorchReplicaSpecs"]["Master"]
        job["spec"]["pytorchReplicaSpecs"]["Worker"] = copy.deepcopy(master)
        imm("PyTorchJob", "llama-lora", "kubeflow.org/v1", {"spec": job["spec"], "status": {}})
        train = {"runtimeRef": {"name": "torch-distributed"}, "trainer": {"numNodes": 2}, "suspend": False}
        imm("TrainJob", "llama-lora", "trainer.kubeflow.org/v1alpha1", {"spec": train})

    def _pages(self) -> None:
        for path in [one for one in self.server.objects if "/rec-x/configmaps/" in one]:
            self.server.remove(path)
        for name in ("kube-root-ca.crt", "l0", "l1", "l2", "l3", "l4"):
            more = {"metadata": {"name": name}, "data": {"a": "b"}}
            if name[0] == "k":
                more = {"metadata": {"name": name, "annotations": {}}, "data": {}}
            self.put("rec-x", "ConfigMap", name, more)

    def _labels(self) -> None:
        """l2 gets a label and loses it, after version 7014."""
        self._quick(0.01)
        self.server._version = 7014
        for labels in ({"labels": {"w": "1"}}, {}):
            thing = copy.deepcopy(self.server.objects[path_of("rec-x", "ConfigMap", "l2")])
            thing["metadata"] = {key: value for key, value in thing["metadata"].items() if key != "labels"} | labels
            self.server.put(path_of("rec-x", "ConfigMap", "l2"), thing)

    def _pods(self) -> None:
        ended = {
            "phase": "Succeeded",
            "containerStatuses": [{"name": "main", "state": {"terminated": {"exitCode": 0}}}],
        }
        self.pod("runs", waiting("ContainerCreating"))
        self.pod("ended", ended)
        self.pod(
            "restarts", {"phase": "Running", "containerStatuses": [{"name": "main", "lastState": {"terminated": {}}}]}
        )
        self.pod("nowhere", UNSCHEDULED)
        self.pod("no-image", waiting("ErrImageNeverPull"))
        self.pod("secretless", waiting("CreateContainerConfigError"))
        self.pod("init", waiting("PodInitializing"), first="first")
        self.pod("two", RUNNING, ("main", "side"))
        self.pod("kept", RUNNING)
        self.server.logs = {
            "ended": [f"2026-11-29T01:44:11.56{n}Z {word}" for n, word in ((2, "one\n"), (3, "two\n"), (4, "three"))],
            "restarts": ["2026-11-29T01:44:11Z again\n"],
            "init/first": ["2026-11-29T01:44:11Z waiting\n"],
            "two/side": ["2026-11-29T01:44:11Z side\n"],
        }
        self.server.previous_logs = {"restarts": [RECORDED["log/previous"]["response"]["text"]]}

    def _runs(self) -> None:
        self.pod("runs", RUNNING)
        self.server.logs["runs"] = []
        for number in (6, 7, 8):
            self._line(number)

    def _line(self, number: int) -> None:
        self.server.write_log("runs", f"line {number}")

    def _run_ends(self) -> None:
        self.server.remove(path_of("rec-x", "Pod", "runs"))


def waiting(reason: str) -> dict[str, Any]:
    return {"phase": "Pending", "containerStatuses": [{"name": "main", "state": {"waiting": {"reason": reason}}}]}


RUNNING = {"phase": "Running"}
UNSCHEDULED = {"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False"}]}


def path_of(space: str, kind: str, name: str) -> str:
    from tests.kubernetes_request import GROUPS

    (found,) = [(group, plural) for group, kinds in GROUPS.items() for plural, one in kinds.items() if one == kind]
    in_space = f"/namespaces/{space}" if space else ""
    if kind == "ValidatingAdmissionPolicyBinding":
        in_space = ""
    return f"/{'apis' if '/' in found[0] else 'api'}/{found[0]}{in_space}/{found[1]}/{name}"


# --- asking -----------------------------------------------------------------------------------------------------------


class Client:
    """Makes the recorded requests, with uids, versions and tokens of lists as ours are."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.ours: dict[str, str] = {}
        self.http = urllib3.PoolManager()

    def ask(self, name: str) -> dict[str, Any]:
        self.cluster.before.get(name, lambda: None)()
        request = RECORDED[name]["request"]
        token = next((CLIENTS[one] for one in sorted(CLIENTS, reverse=True) if name.startswith(one)), TOKEN)
        headers = {**request.get("headers", {}), **({"Authorization": f"Bearer {token}"} if token else {})}
        if "content_type" in request:
            headers["Content-Type"] = request["content_type"]
        headers.setdefault("Accept", "*/*")
        told = self.http.request(
            request["method"],
            f"http://127.0.0.1:{self.cluster.server.port}{self._as_ours(request['path'])}",
            headers=headers, body=self._body(request.get("body")), preload_content=False, retries=False, timeout=20,
        )  # fmt: skip
        lines = self._read(told, name)
        answer = {"status": told.status, "headers": told.headers, "lines": lines, "text": "".join(lines)}
        with_body = told.headers.get("Content-Type") == "application/json" and "lines" not in RECORDED[name]["response"]
        answer["body"] = json.loads(answer["text"]) if with_body and answer["text"] else None
        self._learn(RECORDED[name]["response"].get("body"), answer["body"])
        return answer

    def _read(self, told: Any, name: str) -> list[str]:
        lines, then = [], iter(self.cluster.while_read.get(name, ()))
        asked, wanted = name in self.cluster.while_read, len(RECORDED[name]["response"].get("lines", ()))
        for line in told if asked else told.read().decode().splitlines(keepends=True):
            lines.append(line.decode() if asked else line)
            next(then, lambda: None)()
            if asked and len(lines) == wanted and name != "log/follow-deleted":
                break
        told.close() if asked else told.release_conn()
        return lines

    def _body(self, sent: Any) -> bytes | None:
        if sent is None:
            return None
        if isinstance(sent, str) and (size := re.fullmatch(r"\((\d+) bytes\)", sent)):
            thing = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "big"}, "data": {"a": "x"}}
            if size[1] == "2001537":
                thing = body_of("create/pytorchjob")
                thing["metadata"]["name"] = "big"
                thing["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]["args"] = ["x"]
            return json.dumps(thing).replace('"x"', f'"{"x" * (int(size[1]) - len(json.dumps(thing)) + 1)}"').encode()
        return (self._as_ours(sent) if isinstance(sent, str) else self._as_ours(json.dumps(sent))).encode()

    def _as_ours(self, text: str) -> str:
        for theirs, ours in self.ours.items():
            text = text.replace(theirs, ours)
        return text

    def _learn(self, theirs: Any, ours: Any) -> None:
        if isinstance(theirs, dict) and isinstance(ours, dict):
            one, other = theirs.get("metadata") or {}, ours.get("metadata") or {}
            for key in ("uid", "resourceVersion", "continue"):
                if key == "resourceVersion" and "spec" not in theirs and "data" not in theirs:
                    continue
                if one.get(key) and other.get(key):
                    known = f'"resourceVersion": "{one[key]}"' if key == "resourceVersion" else one[key]
                    self.ours[known] = f'"resourceVersion": "{other[key]}"' if key == "resourceVersion" else other[key]


@pytest.fixture(scope="module")
def replayed():
    """The answers to all recorded requests."""
    with KubernetesServer("rec-x") as server:
        client = Client(Cluster(server))
        yield {name: client.ask(name) for name in RECORDED}


# --- comparing --------------------------------------------------------------------------------------------------------

NUMBER = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f-]{21}|uid-[\w.-]+|(?<=\()\d+(?=\))|(?<=current: )\d+")
TIME = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z")


def told(value: Any) -> Any:
    """Without what differs from one cluster to the next."""
    found = json.loads(TIME.sub("TIME", NUMBER.sub("N", json.dumps(value))))
    causes = (found.get("details") or {}).get("causes", ())
    if len(causes) > 1:  # in any order
        causes.sort(key=lambda one: one.get("field", one["message"]))
        found["message"] = sorted(re.split(r"\[|, |\]", found["message"]))
    return found


def alike(ours: Any, theirs: Any, place: str = "") -> list[str]:
    """What an object of ours has, and the recorded one has not so; and of its metadata, which fields it lacks."""
    if place.endswith((".status", ".uid", ".resourceVersion", ".managedFields", ".continue", "Timestamp", ".ca.crt")):
        return []
    if isinstance(ours, dict) and isinstance(theirs, dict):
        if place.endswith(".metadata") and "name" in theirs:
            lacking = set(theirs) - set(ours) - {"annotations", "managedFields"}
            if lacking:
                return [f"{place} lacks {lacking}"]
        more = [f"{place}.{key} is ours alone" for key in set(ours) - set(theirs) if key != "managedFields"]
        return more + [
            one for key in set(ours) & set(theirs) for one in alike(ours[key], theirs[key], f"{place}.{key}")
        ]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [one for n, pair in enumerate(zip(ours, theirs, strict=True)) for one in alike(*pair, f"{place}[{n}]")]
    return [] if ours == theirs else [f"{place}: {ours!r}, recorded {theirs!r}"]


def not_served(name: str) -> bool:
    return any(name.startswith(one) for one in NOT_SERVED)


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_exchange_is_answered_as_a_real_server_answered_it(replayed, name):
    ours, theirs = replayed[name], RECORDED[name]["response"]
    if ours["status"] == 501:
        assert not_served(name), ours["text"]
        assert "cannot do this" in ours["body"]["message"] if ours["body"] else ours["text"]
        return
    assert ours["status"] == theirs["status"], ours["text"][:500]
    assert ours["headers"].get("Content-Type", theirs["content_type"]) == theirs["content_type"]
    for header in ("warning", "retry-after"):
        assert ours["headers"].get(header) == (theirs.get("headers") or {}).get(header)
    if "lines" in theirs:
        compare_streams(ours["lines"], [one["line"] for one in theirs["lines"]])
    elif "body" not in theirs:
        if "text" in theirs:
            assert TIME.sub("TIME", ours["text"]) == TIME.sub("TIME", theirs["text"])
        assert set(ours["body"] or ()) <= set(theirs.get("body_keys", ()))
    elif theirs["body"].get("kind") == "Status":
        assert told(ours["body"]) == told(theirs["body"])
    else:
        assert alike(ours["body"], theirs["body"]) == []
        assert list(map(name_of, ours["body"].get("items", ()))) == list(map(name_of, theirs["body"].get("items", ())))


def name_of(thing: dict[str, Any]) -> str:
    return str(thing["metadata"]["name"])


def compare_streams(ours: list[str], theirs: list[Any]) -> None:
    """The lines of a log, or the events of a watch."""
    if theirs and isinstance(theirs[0], str):
        assert [TIME.sub("TIME", one) for one in ours] == [TIME.sub("TIME", one) for one in theirs]
        return
    events = [json.loads(one) for one in ours]
    assert [one.get("type") for one in events] == [one.get("type") for one in theirs]
    for our, their in zip(events, theirs, strict=True):
        if their.get("type") in (None, "ERROR"):
            assert told(our) == told(their)
        else:
            assert alike(our["object"], their["object"]) == []


def test_what_is_listed_as_not_served_is_not(replayed):
    refused = {name for name, answer in replayed.items() if answer["status"] == 501}
    assert refused == {name for name in RECORDED if not_served(name)} - {"quota/status"}
    assert {one for one in NOT_SERVED if not any(name.startswith(one) for name in refused)} == set()
