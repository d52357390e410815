"""Rules of the server beyond the recorded objects (those are in ../test_admission.py), by kind."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.manifests.check.check import check
from tests import recordings

GOOD = {name.split("/")[0]: entry["object"] for name, entry in recordings.verdicts().items() if name.endswith("/good")}
GOOD["configmap"] = {**GOOD["configmap"], "data": {"a": "b"}}
TEMPLATE = "spec.template.spec"
JOB = {"completionMode": "Indexed", "completions": 3, "backoffLimitPerIndex": 1}


def refusals(kind: str, changes: dict[str, Any], folder: Path) -> list[str]:
    """What `--level admission` says of the good object of a kind, with other values at places (`spec.ports.0.name`)."""
    value = json.loads(json.dumps(GOOD[kind]))
    for place, new in changes.items():
        at = value
        *way, last = [int(step) if step.isdecimal() else step.replace("~", ".") for step in place.split(".")]
        for step in way:
            at = at.setdefault(step, {}) if isinstance(at, dict) else at[step]
        if new is ...:
            del at[last]
        else:
            at[last] = new
    (folder / "object.yaml").write_text(json.dumps(value))
    return [finding.message for finding in check([folder], recordings.crds()) if finding.counts_at("admission")]


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("pod", {"spec.containers.0.image": " a:1"}, "begins or ends with a space"),
        ("pod", {"spec.volumes.0": {"name": "tmp", "image": {}}}, "reference: is needed"),
        ("pod", {"spec.volumes.0.emptyDir.sizeLimit": "1GB"}, "is no quantity"),
        ("pod", {"spec.containers.0.ports.0.hostPort": 70000}, "between 0 and 65535"),
        ("pod", {"spec.hostUsers": False, "spec.hostPID": True}, "hostUsers: false"),
        ("pod", {"spec.tolerations": [{"key": "a", "value": "b c"}]}, "tolerations[0].value"),
        ("pod", {"spec.dnsConfig": {"nameservers": ["10.0.0"]}}, "nameservers"),
        ("pod", {"metadata.finalizers": ["mine"]}, "needs a domain"),
        ("pod", {"metadata.annotations.container~apparmor~security~beta~kubernetes~io/x": "unconfined"},
         "no container"),
        ("pod", {"metadata.creationTimestamp": "yesterday"}, "must be a time"),
        ("pod", {"spec.containers.0.resources.requests.cpu": True}, "is no quantity"),
        ("pod", {"spec.terminationGracePeriodSeconds": 2**63}, "out of range"),
        ("pod", {"spec.volumes.0": {"name": "tmp", "downwardAPI": {"items": [
            {"path": "a", "fieldRef": {"fieldPath": "status.podIP"}}]}}}, "only in a variable"),
        ("pod", {"spec.volumes.0": {"name": "tmp", "projected": {"sources": [
            {"secret": {"name": "a", "items": [{"key": "a", "path": "x"}]}},
            {"configMap": {"name": "a", "items": [{"key": "a", "path": "x"}]}}]}}}, "stands there already"),
        ("pod", {"spec.resources": {"limits": {"cpu": "1"}}}, "less than its containers say"),
        ("pod", {"spec.restartPolicy": "Never", "spec.containers.0.resizePolicy": [
            {"resourceName": "cpu", "restartPolicy": "RestartContainer"}]}, "must be NotRequired"),
        ("deployment", {"spec.selector.matchExpressions": [{"key": "a", "operator": "Is"}]}, "must be one of In"),
        ("deployment", {"spec.selector.matchExpressions": [{"key": "a", "operator": "Exists"}]}, "does not match"),
        ("deployment", {"spec.selector": {}}, "is empty"),
        ("deployment", {"spec.replicas": 2**31}, "out of range"),
        ("deployment", {"apiVersion": "apps/v1beta2"}, "there is no Deployment in apps/v1beta2"),
        ("statefulset", {"spec.template.metadata.labels.a": "b c"}, "b c"),
        ("statefulset", {"spec.updateStrategy": {"type": "OnDelete", "rollingUpdate": {}}}, "not OnDelete"),
        ("statefulset", {"spec.template.spec.restartPolicy": "Never"}, "must be Always"),
        ("job", {"spec.backoffLimitPerIndex": 1}, "needs completionMode Indexed"),
        ("job", {**{f"spec.{name}": value for name, value in JOB.items()}, f"{TEMPLATE}.restartPolicy": "OnFailure"},
         "must be Never with backoffLimitPerIndex"),
        ("job", {"spec.completionMode": "Indexed", "metadata.name": "a.b"}, "host's name"),
        ("job", {"spec.managedBy": "me"}, "must be a domain"),
        ("job", {"spec.podFailurePolicy": {"rules": [{"action": "FailJob"}]}}, "onExitCodes and onPodConditions"),
        ("cronjob", {"spec.schedule": "0 0 * * 7"}, "day of the week"),
        ("cronjob", {"spec.timeZone": ""}, "is empty"),
        ("service", {"spec.type": "ExternalName", "spec.externalName": "A.example.com"}, "externalName"),
        ("service", {"spec.ports.0.nodePort": 30080}, "with type ClusterIP"),
        ("service", {"spec.type": "NodePort", "spec.ports.0.nodePort": 80}, "between 30000 and 32767"),
        ("service", {"spec.ipFamilies": ["IPv4", "IPv4"]}, "names one twice"),
        ("service", {"spec.clusterIP": "10.96.0.300"}, "must be an IP address"),
        ("service", {"spec.sessionAffinity": "Client"}, "ClientIP"),
        ("service", {"spec.loadBalancerSourceRanges": ["10.0.0.0/8"]}, "is for type LoadBalancer"),
        ("ingress", {"spec.rules.0.http.paths.0.path": "a"}, "must begin with /"),
        ("ingress", {"spec.rules.0.host": "10.0.0.1"}, "must be a name"),
        ("ingress", {"spec.rules.0.http.paths.0.backend": {}}, "needs one backend"),
        ("networkpolicy", {"spec.policyTypes": ["Out"]}, "'Out'"),
        ("networkpolicy", {"spec.ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/9"]}}]}]},
         "is not within"),
        ("hpa", {"spec.metrics.0.resource.target": {"type": "Value", "value": "1"}}, "needs averageValue"),
        ("hpa", {"spec.behavior": {"scaleUp": {"policies": [{"type": "Pods", "value": 0, "periodSeconds": 1}]}}},
         "value"),
        ("hpa", {"spec.scaleTargetRef.apiVersion": "v1"}, "group and its version"),
        ("pdb", {"spec.minAvailable": "150%"}, "at most 100%"),
        ("pdb", {"spec.minAvailable": "1"}, "must be a number"),
        ("configmap", {"binaryData": {"a": "YQ=="}}, "is in binaryData too"),
        ("configmap", {"data.a": "a" * (2**20 + 1)}, "and may have 1048576"),
        ("secret", {"type": "kubernetes.io/basic-auth", "stringData": {"a": "b"}}, "username"),
        ("secret", {"type": "kubernetes.io/dockerconfigjson", "stringData": {".dockerconfigjson": "[]"}}, "in JSON"),
        ("role", {"rules": [{"verbs": ["get"], "resources": ["pods"]}]}, "apiGroups: is needed"),
        ("rolebinding", {"roleRef.name": "a/b"}, "roleRef.name"),
        ("resourcequota", {"spec.scopes": ["BestEffort"]}, "within the scopes"),
        ("resourcequota", {"spec.scopes": ["Terminating", "NotTerminating"]}, "exclude each other"),
        ("limitrange", {"spec.limits.0.type": "pod"}, "must be one of Pod"),
        ("pvc", {"spec.accessModes": ["ReadWriteOncePod", "ReadWriteOnce"]}, "stands alone"),
        ("pvc", {"spec.resources.requests.storage": "0"}, "more than 0"),
        ("localqueue", {"metadata.annotations": {"a b": "c"}}, "annotations"),
        ("resourceflavor", {"spec.tolerations": [{"operator": "Exists", "value": "a"}]}, "value must be empty"),
        ("clusterqueue", {"spec.preemption": {"reclaimWithinCohort": "Sometimes"}}, "Sometimes"),
        ("trainjob", {"spec.trainer.numNodes": "two"}, "two"),
        ("trainjob", {"metadata.name": "1a"}, "RFC 1035"),
        ("pytorchjob", {"spec.nprocPerNode": 8, "spec.unknown": 1}, "'unknown' was unexpected"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)  # fmt: skip
def test_it_is_refused(kind: str, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert refusals(kind, {}, tmp_path) == []
    assert said in "\n".join(refusals(kind, changes, tmp_path))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("pod", {"spec.containers.0.env.0.valueFrom": {"fieldRef": {"fieldPath": "metadata.annotations['A.io/b']"}},
                 "spec.containers.0.env.0.value": ...}),
        ("pod", {"spec.volumes.0": {"name": "tmp", "projected": {"sources": [
            {"secret": {"name": "a", "items": [{"key": "a", "path": "token"}]}},
            {"serviceAccountToken": {"path": "token"}}, {}]}}}),
        ("pod", {"spec.resources": {"limits": {"cpu": "4"}, "requests": {"cpu": "1"}}}),
        ("pod", {"spec.priorityClassName": "system-cluster-critical"}),
        ("pod", {"status": {"conditions": [{}]}}),
        ("pod", {"metadata.ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": "a", "uid": "1"}]}),
        ("pod", {"spec.volumes.0": {"name": "tmp", "configMap": {"name": "a", "items": [
            {"key": "a", "path": "x"}, {"key": "b", "path": "x"}]}}}),
        ("pod", {"spec.volumes.0": {"name": "tmp", "csi": {"driver": "CSI.example.com"}}}),
        ("pod", {"spec.containers.0.lifecycle": {"preStop": {"sleep": {"seconds": 0}}}}),
        ("deployment", {"spec.strategy": {"rollingUpdate": {"maxSurge": 0}}}),
        ("deployment", {"spec.template.spec.dnsConfig": {"searches": ["a_b.", "."]}}),
        ("statefulset", {"spec.template.spec.containers.0.volumeMounts.0.name": "data"}),
        ("statefulset", {"spec.template.spec.containers.0.imagePullPolicy": "Sometimes"}),
        ("job", {**{f"spec.{name}": value for name, value in JOB.items()}, f"{TEMPLATE}.restartPolicy": "Never"}),
        ("cronjob", {"spec.schedule": "@every 30m"}),
        ("service", {"spec.clusterIP": "None", "spec.ports": ...}),
        ("service", {"spec.type": "ExternalName", "spec.externalName": "a.example.com.", "spec.ports": ...}),
        ("ingress", {"spec.rules.0.host": "*.example.com"}),
        ("networkpolicy", {"spec.podSelector": ...}),
        ("hpa", {"spec.minReplicas": ...}),
        ("secret", {"data": {"a": "YQ" * 2**18}, "stringData": ...}),
        ("pvc", {"spec.storageClassName": ""}),
        ("rolebinding", {"subjects": [{"kind": "User", "name": "A B", "apiGroup": ""}]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_it_is_taken(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    assert refusals(kind, changes, tmp_path) == []
