"""What the Deployment controller, the kubelet and KServe make of what is applied, for the tests' API server."""

import hashlib
import json
from typing import Any

from tests.kubernetes_server import KubernetesServer

READY = {"phase": "Running", "podIP": "127.0.0.1", "conditions": [{"type": "Ready", "status": "True"}]}


def owner(thing: dict[str, Any]) -> list[dict[str, Any]]:
    metadata = thing["metadata"]
    return [{"kind": thing["kind"], "name": metadata["name"], "uid": metadata["uid"], "controller": True}]


def pods_path(server: KubernetesServer, name: str) -> str:
    return f"/api/v1/namespaces/{server.namespace}/pods/{name}"


def replica_set(server: KubernetesServer, deployment: dict[str, Any]) -> dict[str, Any]:
    """The ReplicaSet of the Deployment's template: made, or found again, with the highest revision."""
    template = deployment["spec"]["template"]
    name = deployment["metadata"]["name"]
    digest = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:10]
    path = f"/apis/apps/v1/namespaces/{server.namespace}/replicasets/{name}-{digest}"
    with server.changed:
        sets = list(server.of_kind("ReplicaSet").values())
        revisions = [int(one["metadata"]["annotations"]["deployment.kubernetes.io/revision"]) for one in sets]
        found = server.objects.get(path)
        if found is not None and int(found["metadata"]["annotations"]["deployment.kubernetes.io/revision"]) == max(
            revisions
        ):
            return found
        labels = {**template["metadata"]["labels"], "pod-template-hash": digest}
        made = {
            "apiVersion": "apps/v1",
            "kind": "ReplicaSet",
            "metadata": {
                "name": f"{name}-{digest}",
                "namespace": server.namespace,
                "uid": f"uid-of-{name}-{digest}",
                "labels": labels,
                "annotations": {"deployment.kubernetes.io/revision": str(max(revisions, default=0) + 1)},
                "ownerReferences": owner(deployment),
            },
        }
        server.put(path, made)
        return made


def pod(server: KubernetesServer, of: dict[str, Any], status: dict[str, Any], suffix: str = "a") -> dict[str, Any]:
    """A pod of a ReplicaSet, in place of the one with that suffix."""
    name = f"{of['metadata']['name']}-{suffix}"
    metadata = {
        "name": name,
        "namespace": server.namespace,
        "uid": f"uid-of-{name}",
        "labels": of["metadata"]["labels"],
        "ownerReferences": owner(of),
    }
    made = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "status": status}
    server.put(pods_path(server, name), made)
    return made


def deployment_of(server: KubernetesServer, thing: dict[str, Any]) -> dict[str, Any]:
    """The Deployment itself, or the one that KServe makes of an InferenceService."""
    if thing["kind"] == "Deployment":
        return thing
    predictor = thing["spec"]["predictor"]
    name = f"{thing['metadata']['name']}-predictor"
    app = {"app": f"isvc.{name}"}
    template = {
        "metadata": {"labels": predictor["labels"] | app, "annotations": predictor["annotations"]},
        "spec": {"containers": predictor["containers"]},
    }
    metadata = {"name": name, "namespace": server.namespace, "uid": f"uid-{name}", "ownerReferences": owner(thing)}
    path = f"/apis/apps/v1/namespaces/{server.namespace}/deployments/{name}"
    with server.changed:
        before = server.objects.get(path)
        generation = 1
        if before is not None:
            changed = before["spec"]["template"] != template
            generation = before["metadata"]["generation"] + changed
        made = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": metadata | {"generation": generation},
            "spec": {"replicas": 1, "selector": {"matchLabels": app}, "template": template},
        }
        server.put(path, made)
    return made


COUNTS = ("replicas", "readyReplicas", "availableReplicas")
SAYS = {
    "NewReplicaSetCreated": ("Progressing", "True", 'Created new replica set "{}"'),
    "ReplicaSetUpdated": ("Progressing", "True", 'ReplicaSet "{}" is progressing.'),
    "NewReplicaSetAvailable": ("Progressing", "True", 'ReplicaSet "{}" has successfully progressed.'),
    "ProgressDeadlineExceeded": ("Progressing", "False", 'ReplicaSet "{}" has timed out progressing.'),
    "MinimumReplicasAvailable": ("Available", "True", "Deployment has minimum availability."),
    "MinimumReplicasUnavailable": ("Available", "False", "Deployment does not have minimum availability."),
}


def told(conditions: list[dict[str, Any]], reason: str, name: str) -> list[dict[str, Any]]:
    """The conditions after the controller has said that: what is said anew goes to the end."""
    kind, status, message = SAYS[reason]
    made = {"type": kind, "status": status, "reason": reason, "message": message.format(name)}
    return conditions if made in conditions else [*(one for one in conditions if one["type"] != kind), made]


def deployment_status(deployment: dict[str, Any], sets: list[dict[str, Any]], late: bool = False) -> dict[str, Any]:
    """What the Deployment controller says of its ReplicaSets, the newest last. late: it has made no progress for
    longer than it may. Held against recorded Deployments by test_controllers.py."""
    wanted, before, newest = deployment["spec"].get("replicas", 1), deployment.get("status") or {}, sets[-1]
    counts = {name: sum(one["status"].get(name, 0) for one in sets) for name in COUNTS}
    counts["updatedReplicas"] = newest["status"].get("replicas", 0)
    asked = sum(one["spec"]["replicas"] for one in sets)
    counts["unavailableReplicas"] = max(0, asked - counts["availableReplicas"])
    name, conditions = newest["metadata"]["name"], before.get("conditions", [])
    enough = counts["availableReplicas"] >= wanted
    conditions = told(conditions, f"MinimumReplicas{'Available' if enough else 'Unavailable'}", name)
    refused = [one for each in sets for one in each["status"].get("conditions", ()) if one["type"] == "ReplicaFailure"]
    if refused and not any(one["type"] == "ReplicaFailure" for one in conditions):
        conditions = [*conditions, {key: refused[0][key] for key in ("type", "status", "reason", "message")}]
    elif not refused:
        conditions = [one for one in conditions if one["type"] != "ReplicaFailure"]
    if {counts["replicas"], counts["updatedReplicas"], counts["availableReplicas"]} == {wanted}:
        conditions = told(conditions, "NewReplicaSetAvailable", name)
    elif late:
        conditions = told(conditions, "ProgressDeadlineExceeded", name)
    elif any(counts[one] > before.get(one, 0) for one in ("updatedReplicas", "readyReplicas", "availableReplicas")):
        conditions = told(conditions, "ReplicaSetUpdated", name)
    said = {one: count for one, count in counts.items() if count}
    return {"observedGeneration": deployment["metadata"]["generation"], **said, "conditions": conditions}


def stands(server: KubernetesServer, thing: dict[str, Any], address: str = "") -> None:
    """All goes well: the new pods are ready, the old ones gone. `address`: what KServe says."""
    deployment = deployment_of(server, thing)
    newest = replica_set(server, deployment)
    replicas = deployment["spec"].get("replicas", 1)
    names = {pod(server, newest, READY, chr(ord("a") + one))["metadata"]["name"] for one in range(replicas)}
    for name in set(server.of_kind("Pod")) - names:
        server.delete(pods_path(server, name))
    filled = newest | {"spec": {"replicas": replicas}, "status": dict.fromkeys(COUNTS, replicas)}
    status = deployment_status(deployment, [filled])
    server.set_status("Deployment", deployment["metadata"]["name"], status)
    if thing["kind"] == "InferenceService":
        # KServe writes its Deployment's observedGeneration there, in the Standard mode
        said = {
            "observedGeneration": deployment["metadata"]["generation"],
            "conditions": [{"type": "Ready", "status": "True"}, {"type": "Stopped", "status": "False"}],
            "address": {"url": address or f"http://zhllama-predictor.{server.namespace}.svc.cluster.local"},
        }
        server.set_status("InferenceService", thing["metadata"]["name"], said)
