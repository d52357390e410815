"""The training operator, as its recorded jobs show it (tests/recordings/scenarios): what it makes of a PyTorchJob, its
pods and Services at a moment, and what it writes. It looks when something happens: it has no timer but a ttl's.

`TrainingOperator(server).reconcile(name)` after each change. What it cannot do it says: NotPlayed.
"""

import copy
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from tests.kubernetes_request import Refusal
from tests.kubernetes_server import KubernetesServer

CONTROLLER = "pytorchjob-controller"
PREFIX = "training.kubeflow.org/"
PORT = 23456
WAIT = "err=1;for i in $(seq 100); do if /bin/nslookup {}; then err=0 && break; fi;echo waiting for master; sleep 2; done; exit $err"  # noqa: E501
INIT = {
    "name": "init-pytorch",
    "image": "alpine:3.10",
    "imagePullPolicy": "IfNotPresent",
    "resources": {"limits": {"cpu": "100m", "memory": "20Mi"}, "requests": {"cpu": "50m", "memory": "10Mi"}},
    # the stock operator's has none
    "securityContext": {
        "capabilities": {"drop": ["ALL"]},
        "runAsUser": 65532,
        "runAsNonRoot": True,
        "allowPrivilegeEscalation": False,
        "seccompProfile": {"type": "RuntimeDefault"},
    },
}
OVER = ("Succeeded", "Failed")
TELLS = {
    "Created": "PyTorchJob {0} is created.",
    "Running": "PyTorchJob {0} is running.",
    "Restarting": "PyTorchJob {0} is restarting because 1 Master replica(s) failed.",
    "Suspended": "PyTorchJob {0} is suspended.",
    "Resumed": "PyTorchJob {0} is resumed.",
    "Succeeded": "PyTorchJob {0} is successfully completed.",
    "Failed": "Job {0} has failed because it has reached the specified backoff limit",
}


class NotPlayed(Exception):
    """What this stand-in for the operator does not know to do."""


def with_condition(
    conditions: list[dict[str, Any]], kind: str, reason: str, message: str, now: str, true: bool = True
) -> list[dict[str, Any]]:
    """The conditions after one more: it goes to the end. Running and Restarting take each other's place; an end leaves
    Running False, and nothing changes after it."""
    if any(one["type"] in OVER and one["status"] == "True" for one in conditions):
        return conditions
    status = "True" if true else "False"
    before = next((one for one in conditions if one["type"] == kind), None)
    if before and (before["status"], before["reason"]) == (status, reason):
        return conditions
    gone = {kind, {"Running": "Restarting", "Restarting": "Running"}.get(kind)}
    kept = [one for one in conditions if one["type"] not in gone]
    if kind in OVER:
        kept = [one | {"status": "False"} if one["type"] == "Running" else one for one in kept]
    told = {"type": kind, "status": status, "reason": reason, "message": message}
    return [*kept, told | {"lastTransitionTime": now, "lastUpdateTime": now}]


def labels_of(job: dict[str, Any], role: str, index: int) -> dict[str, str]:
    """Of a pod's Service; the pod has those of its template as well."""
    names = {"job-name": job["metadata"]["name"], "operator-name": CONTROLLER, "replica-type": role.lower()}
    return {PREFIX + name: value for name, value in (names | {"replica-index": str(index)}).items()}


def owned(job: dict[str, Any], kind: str, role: str, index: int) -> dict[str, Any]:
    metadata = job["metadata"]
    owner = {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "name": metadata["name"], "uid": metadata["uid"]}
    made = {
        "name": f"{metadata['name']}-{role.lower()}-{index}",
        "namespace": metadata["namespace"],
        "labels": labels_of(job, role, index),
        "ownerReferences": [owner | {"controller": True, "blockOwnerDeletion": True}],
    }
    return {"apiVersion": "v1", "kind": kind, "metadata": made}


def environment(job: dict[str, Any], role: str, index: int) -> list[dict[str, str]]:
    """What it adds to a training's variables."""
    spec, name = job["spec"], job["metadata"]["name"]
    roles, elastic = spec["pytorchReplicaSpecs"], spec.get("elasticPolicy")
    nodes, each = sum(one.get("replicas") or 1 for one in roles.values()), str(spec.get("nprocPerNode") or "auto")
    found = {"PYTHONUNBUFFERED": "1"}
    if "Master" in roles:
        port, host = str(PORT), f"{name}-master-0"
        found |= {"MASTER_PORT": port, "PET_MASTER_PORT": port, "MASTER_ADDR": host, "PET_MASTER_ADDR": host}
        rank = str(index if role == "Master" else index + 1)
        found |= {"WORLD_SIZE": str(nodes * (int(each) if each.isdigit() else 1)), "RANK": rank, "PET_NODE_RANK": rank}
    found["PET_NPROC_PER_NODE"] = each
    if elastic is None:
        found["PET_NNODES"] = str(nodes)
    else:
        found["PET_RDZV_ENDPOINT"] = f"{name}-worker-0:{PORT}"
        found["PET_RDZV_BACKEND"] = elastic.get("rdzvBackend", "c10d")
        found["PET_NNODES"] = f"{elastic.get('minReplicas', nodes)}:{elastic.get('maxReplicas', nodes)}"
        for variable, key in (("PET_MAX_RESTARTS", "maxRestarts"), ("PET_RDZV_ID", "rdzvId")):
            found |= {variable: str(elastic[key])} if key in elastic else {}
    return [{"name": one, "value": value} for one, value in found.items()]


def pod_of(job: dict[str, Any], role: str, index: int) -> dict[str, Any]:
    roles = job["spec"]["pytorchReplicaSpecs"]
    template = copy.deepcopy(roles[role]["template"])
    made = owned(job, "Pod", role, index)
    made["metadata"]["labels"] |= template.get("metadata", {}).get("labels", {})
    if role == "Master" or ("Master" not in roles and index == 0):
        made["metadata"]["labels"][f"{PREFIX}job-role"] = "master"
    if found := template.get("metadata", {}).get("annotations"):
        made["metadata"]["annotations"] = found
    policy = roles[role].get("restartPolicy", "OnFailure")
    spec = template["spec"] | {"restartPolicy": "Never" if policy == "ExitCode" else policy}
    for container in spec["containers"]:
        container["env"] = [*container.get("env", ()), *environment(job, role, index)]
        if container["name"] == "pytorch":
            port = {"name": "pytorchjob-port", "containerPort": PORT, "protocol": "TCP"}
            container["ports"] = [*container.get("ports", ()), port]
    if role == "Worker" and "Master" in roles:
        wait = WAIT.format(f"{job['metadata']['name']}-master-0")
        spec["initContainers"] = [*spec.get("initContainers", ()), INIT | {"command": ["sh", "-c", wait]}]
    return made | {"spec": spec, "status": {"phase": "Pending"}}


def service_of(job: dict[str, Any], role: str, index: int) -> dict[str, Any]:
    ports = [{"name": "pytorchjob-port", "protocol": "TCP", "port": PORT, "targetPort": PORT}]
    spec = {"clusterIP": "None", "selector": labels_of(job, role, index), "ports": ports}
    return owned(job, "Service", role, index) | {"spec": spec}


class TrainingOperator:
    """deletes: how a pod goes; that of a real cluster stays until its kubelet has ended it."""

    def __init__(
        self,
        server: KubernetesServer,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        deletes: Callable[[str], Any] | None = None,
    ) -> None:
        self.server, self.clock = server, clock
        self.deletes = deletes or server.delete
        self.did: list[str] = []
        """What it did, in its order."""
        self.events: dict[tuple[str, str, str], int] = {}
        """What it told of the job: type, reason, message → how often."""
        self.wakes: datetime | None = None
        """When it looks again by itself."""
        self.refused = False
        """Whether something that it wanted to make was refused: it tries again, at ever longer distances."""

    def path(self, kind: str, name: str) -> str:
        root = "/apis/kubeflow.org/v1" if kind == "pytorchjobs" else "/api/v1"
        return f"{root}/namespaces/{self.server.namespace}/{kind}/{name}"

    def reconcile(self, name: str) -> None:
        with self.server.changed:
            while self._look(name):
                pass

    def _look(self, name: str) -> bool:
        """Whether the job's status is another."""
        job = self.server.objects.get(self.path("pytorchjobs", name))
        if job is None or job["metadata"].get("deletionTimestamp"):
            return False
        spec, policy = job["spec"], job["spec"].get("runPolicy") or {}
        if not spec["pytorchReplicaSpecs"] or policy.get("managedBy", f"kubeflow.org/{CONTROLLER}")[:8] != "kubeflow":
            return False
        if (spec.get("elasticPolicy") or {}).get("metrics"):
            raise NotPlayed("an autoscaler for an elastic job with metrics")
        self.job, self.name, self.policy = job, name, policy
        self.status = copy.deepcopy(job.get("status") or {})
        self._condition("Created")
        before = copy.deepcopy(job.get("status") or {})
        self.refused = False
        try:
            self._judge()
        except Refusal:
            # nothing is written until every pod and Service has been made
            self.refused = True
            return False
        if self.path("pytorchjobs", name) not in self.server.objects or self.status == before:
            return False
        self.did.append("status " + " ".join(one["type"] for one in self.status["conditions"]))
        self.server.set_status("PyTorchJob", name, self.status)
        return True

    def _judge(self) -> None:
        pods = self._mine("Pod")
        if self._is(*OVER):
            self._clean(pods)
            if self._is("Succeeded"):
                for one in self.status["replicaStatuses"].values():
                    if active := one.pop("active", 0):
                        one["succeeded"] = one.get("succeeded", 0) + active
            return self._expire()
        if self.policy.get("suspend"):
            self._clean(pods)
            for one in self.status.get("replicaStatuses", {}).values():
                one.pop("active", None)
            if self._is("Running"):
                self._condition("Running", "Suspended", true=False)
            self._condition("Suspended")
            return self._tell("Normal", "Suspended", TELLS["Suspended"])
        if self._is("Suspended"):
            self._condition("Suspended", "Resumed", true=False)
            self.status["startTime"] = self._now()
            self._tell("Normal", "Resumed", TELLS["Resumed"])
        self._abnormal(pods)
        if why := self._exceeds(pods):
            return self._end("Failed", f"Job {{0}} has failed because it {why}", pods)
        counts = {
            role: self._reconcile_role(role, one) for role, one in self.job["spec"]["pytorchReplicaSpecs"].items()
        }
        return self._update(counts)

    # --- what it makes ------------------------------------------------------------------------------------------------

    def _mine(self, kind: str) -> list[dict[str, Any]]:
        uid = self.job["metadata"]["uid"]
        return [
            one
            for one in self.server.objects.values()
            if one["kind"] == kind and [owner["uid"] for owner in one["metadata"].get("ownerReferences", ())] == [uid]
        ]

    def _reconcile_role(self, role: str, spec: dict[str, Any]) -> dict[str, int]:
        """Its pods and Services are made, or made anew; how many of its pods run, succeeded, failed."""
        counts, wanted = {"active": 0, "succeeded": 0, "failed": 0}, spec.get("replicas") or 1
        for kind, make in (("Pod", pod_of), ("Service", service_of)):
            there = {
                int(one["metadata"]["labels"][f"{PREFIX}replica-index"]): one
                for one in self._mine(kind)
                if one["metadata"]["labels"][f"{PREFIX}replica-type"] == role.lower()
            }
            for index in sorted({*range(wanted), *there}):
                if index not in there:
                    self._create(kind, make(self.job, role, index))
                    continue
                if index >= wanted:
                    self._delete(kind, there[index])
                if kind == "Pod":
                    self._count(counts, role, spec.get("restartPolicy", "OnFailure"), there[index])
        return counts

    def _create(self, kind: str, thing: dict[str, Any]) -> None:
        name = thing["metadata"]["name"]
        try:
            code, answer = self.server.create(self.path(f"{kind.lower()}s", name), thing)
            if code != 201:
                raise Refusal(code, answer)
        except Refusal as no:
            self._tell("Warning", f"FailedCreate{kind}", f"Error creating: {no.body['message']}")
            raise
        self.did.append(f"{kind} {name}")
        self._tell("Normal", f"SuccessfulCreate{kind}", f"Created {kind.lower()}: {name}")

    def _delete(self, kind: str, thing: dict[str, Any]) -> None:
        name = thing["metadata"]["name"]
        path = self.path(f"{kind.lower()}s", name)
        if path not in self.server.objects or thing["metadata"].get("deletionTimestamp"):
            return
        (self.deletes if kind == "Pod" else self.server.delete)(path)
        self.did.append(f"deleted {kind} {name}")
        self._tell("Normal", f"SuccessfulDelete{kind}", f"Deleted {kind.lower()}: {name}")

    def _clean(self, pods: list[dict[str, Any]]) -> None:
        clean = "All" if self.policy.get("suspend") else self.policy.get("cleanPodPolicy", "None")
        for pod in pods:
            if clean == "All" or (clean == "Running" and pod["status"].get("phase") in ("Running", "Pending")):
                self._delete("Pod", pod)
                self._delete(
                    "Service", owned(self.job, "Service", "", 0) | {"metadata": {"name": pod["metadata"]["name"]}}
                )

    def _expire(self) -> None:
        ttl = self.policy.get("ttlSecondsAfterFinished")
        # a job that ended by an exit code has no such time, and stays
        if ttl is None or "completionTime" not in self.status:
            return
        self.wakes = datetime.fromisoformat(self.status["completionTime"]) + timedelta(seconds=ttl)
        if self.wakes <= self.clock():
            self.wakes = None
            self.did.append("deleted PyTorchJob")
            self._tell("Normal", "SuccessfulDeletePod", "Deleted job: {0}")
            self.server.remove(self.path("pytorchjobs", self.name))

    # --- what it makes of its pods ------------------------------------------------------------------------------------

    def _count(self, counts: dict[str, int], role: str, policy: str, pod: dict[str, Any]) -> None:
        status, code = pod["status"], None
        for one in status.get("containerStatuses") or ():
            ended = (one.get("state") or {}).get("terminated")
            if one["name"] == "pytorch" and ended:
                code = ended["exitCode"]
                where = f"{pod['metadata']['namespace']}.{pod['metadata']['name']}"
                self._tell("Normal", "ExitedWithCode", f"Pod: {where} exited with code {code}")
        if status.get("phase") == "Failed":
            if policy in ("OnFailure", "Always") or (policy == "ExitCode" and (code or 0) > 127):
                self._delete("Pod", pod)
                text = f"job {{0}} is restarting because {role} replica(s) failed."
                self._tell("Warning", "Restarting", text)
                self._condition("Restarting", text=text)
            elif policy == "ExitCode":
                text = f'job "{{0}}" is failing because "{role}" replica(s) failed.'
                self._tell("Warning", "Failed", text)
                self._condition("Failed", text=text)
        # a pod that is on its way out has failed
        active = "failed" if pod["metadata"].get("deletionTimestamp") else "active"
        kind = {"Running": active, "Succeeded": "succeeded", "Failed": "failed"}.get(status.get("phase", ""))
        if kind:
            counts[kind] += 1

    def _update(self, counts: dict[str, dict[str, int]]) -> None:
        spec = self.job["spec"]
        self.status.setdefault("startTime", self._now())
        selector = f"{PREFIX}job-name={self.name},{PREFIX}operator-name={CONTROLLER},{PREFIX}replica-type="
        self.status["replicaStatuses"] = {
            role: {kind: n for kind, n in one.items() if n} | {"selector": f"{selector}{role.lower()}"}
            for role, one in counts.items()
        }
        first = "Master" if "Master" in counts else "Worker"
        # without a Master its messages name the namespace too
        name = self.name if first == "Master" else f"{self.job['metadata']['namespace']}/{self.name}"
        for role, one in counts.items():
            replicas = spec["pytorchReplicaSpecs"][role].get("replicas") or 1
            if role == first:
                leader = spec.get("elasticPolicy") and self._phase(f"{self.name}-worker-0") == "Succeeded"
                if one["succeeded"] >= replicas or leader:
                    if first == "Master" and one["active"]:
                        self._condition("Running")
                    is_ = "is " if first == "Master" else ""
                    return self._end("Succeeded", f"PyTorchJob {name} {is_}successfully completed.")
                if one["active"]:
                    self._condition("Running", text=f"PyTorchJob {name} is running.")
            if one["failed"] and replicas > one["succeeded"] and replicas > one["active"]:
                text = f"because {one['failed']} {role} replica(s) failed."
                if spec["pytorchReplicaSpecs"][role].get("restartPolicy", "OnFailure") == "Never":
                    self._end("Failed", f"PyTorchJob {{0}} is failed {text}")
                else:
                    self._tell("Warning", "Restarting", f"PyTorchJob {{0}} is restarting {text}")
                    self._condition("Restarting", text=f"PyTorchJob {{0}} is restarting {text}")
        return None

    def _phase(self, pod: str) -> str:
        found = self.server.objects.get(self.path("pods", pod)) or {"status": {}}
        return str(found["status"].get("phase", ""))

    def _exceeds(self, pods: list[dict[str, Any]]) -> str:
        roles, limit = self.job["spec"]["pytorchReplicaSpecs"], self.policy.get("backoffLimit")
        restarts = sum(
            one.get("restartCount", 0)
            for pod in pods
            for one in (*pod["status"].get("initContainerStatuses", ()), *pod["status"].get("containerStatuses", ()))
            if pod["status"].get("phase") == "Running"
            and roles[pod["metadata"]["labels"][f"{PREFIX}replica-type"].capitalize()].get("restartPolicy", "OnFailure")
            in ("OnFailure", "Always")
        )
        if limit is not None and restarts >= max(limit, 1):
            return "has reached the specified backoff limit"
        deadline, began = self.policy.get("activeDeadlineSeconds"), self.status.get("startTime")
        if deadline and began and self.clock() - datetime.fromisoformat(began) >= timedelta(seconds=deadline):
            return "was active longer than specified deadline"
        return ""

    def _abnormal(self, pods: list[dict[str, Any]]) -> None:
        """Events of pods become the job's."""
        for pod in pods:
            status, name = pod["status"], pod["metadata"]["name"]
            if status.get("phase") in OVER or pod["metadata"].get("deletionTimestamp"):
                continue
            for one in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())):
                state = one.get("state") or {}
                ended, waits = state.get("terminated") or {}, state.get("waiting") or {}
                begin = f"Error pod {name} container {one['name']}"
                if code := ended.get("exitCode"):
                    words = f"exitCode: {code} terminated message: {ended.get('message', '')}"
                    self._tell("Warning", ended["reason"], f"{begin} {words}")
                if message := waits.get("message"):
                    self._tell("Warning", waits["reason"], f"{begin} waiting message: {message}")
            if status.get("containerStatuses"):
                continue
            for one in status.get("conditions", ()):
                if one["type"] == "PodScheduled" and one["status"] == "False" and one.get("message"):
                    self._tell("Warning", one["reason"], f"Error pod {name} condition message: {one['message']}")

    # --- what it writes -----------------------------------------------------------------------------------------------

    def _now(self) -> str:
        return self.clock().strftime("%Y-%m-%dT%H:%M:%SZ")

    def _is(self, *kinds: str) -> bool:
        return any(one["type"] in kinds and one["status"] == "True" for one in self.status.get("conditions", ()))

    def _condition(self, kind: str, reason: str = "", text: str = "", true: bool = True) -> None:
        reason = reason or kind
        message = (text or TELLS[reason]).format(self.name)
        before = self.status.get("conditions", [])
        if kind == "Created" and before:
            return
        self.status["conditions"] = with_condition(before, kind, f"PyTorchJob{reason}", message, self._now(), true)

    def _end(self, kind: str, text: str, pods: list[dict[str, Any]] | None = None) -> None:
        self._tell("Normal", kind, text)
        self.status.setdefault("completionTime", self._now())
        self._condition(kind, text=text)
        self._clean(pods or [])

    def _tell(self, level: str, reason: str, text: str) -> None:
        reason = f"PyTorchJob{reason}" if reason in TELLS else reason
        message = text.format(self.name) if "{0}" in text else text
        key = (level, reason, message)
        count = self.events.get(key, 0) + 1
        event = f"{self.name}.{len(self.events) if count == 1 else list(self.events).index(key):016x}"
        path, metadata = self.path("events", event), {"name": event, "namespace": self.server.namespace}
        about = {"kind": "PyTorchJob", "name": self.name, "uid": self.job["metadata"]["uid"]}
        thing = {"apiVersion": "v1", "kind": "Event", "metadata": metadata, "source": {"component": CONTROLLER}}
        told = {"type": level, "reason": reason, "message": message, "involvedObject": about, "count": count}
        if count > 1:
            self.server.put(path, thing | told)
        elif self.server.create(path, thing | told)[0] != 201:
            return
        self.events[key] = count
