"""How many pods there are is left to whom it belongs to: answers of a real API server, and deployments over a fake."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from components.serve.cluster import Cluster, as_it_was
from components.serve.rollout import conflicts, targets, with_anothers_scale, without_others
from tests.kubernetes_server import Fault, KubernetesServer
from tests.recordings import answered
from zhllama.errors import InputError, StorageFault
from zhllama.kubernetes.model_server import OURS

DEPLOYMENTS = "/apis/apps/v1/namespaces/team/deployments"
HPA = "kube-controller-manager"


def test_the_managers_that_a_real_server_names_are_read() -> None:
    found = answered("scale/managed")["body"]
    wanted = {"kind": "Deployment", "spec": {"replicas": 1, "revisionHistoryLimit": 3}}
    made, said = with_anothers_scale(wanted, found)
    assert made["spec"] == {"revisionHistoryLimit": 3}
    assert said == "replicas stays 3: it is set by autoscaler"
    ours = answered("apply/create")["body"]
    assert with_anothers_scale(wanted, ours) == (wanted, "")


@pytest.mark.parametrize(
    ("kind", "name", "version", "it"),
    [
        ("Deployment", "zh", "apps/v1", True),
        ("Deployment", "other", "apps/v1", False),
        ("StatefulSet", "zh", "apps/v1", False),
        ("Deployment", "zh", "example.com/v1", False),
    ],
)
def test_an_autoscaler_targets_what_it_names(kind: str, name: str, version: str, it: bool) -> None:
    autoscaler = {"spec": {"scaleTargetRef": {"kind": kind, "name": name, "apiVersion": version}}}
    assert targets(autoscaler, {"kind": "Deployment", "apiVersion": "apps/v1", "metadata": {"name": "zh"}}) is it


TEMPLATE = ".spec.template.spec.containers"


@pytest.mark.parametrize(
    ("field", "left"),
    [
        (f'{TEMPLATE}[name="server"].resources.limits.memory', True),
        (f'{TEMPLATE}[name="server"].ports[containerPort=8000,protocol="TCP"].name', True),
        (".spec.strategy", True),
        (".metadata.labels.example.com/owner", True),
        (".metadata.labels.example.com/own", False),
        (f'{TEMPLATE}[name="none"].resources', False),
        (f'{TEMPLATE}[name="server"].image', False),
        (f'{TEMPLATE}[name="server"].env[name="A"].value', False),
        (f'.spec.template.spec.initC{TEMPLATE[-9:]}[name="check"].args', False),
        (".spec.template.metadata.labels.zhllama.io/version", False),
        (".spec.selector", False),
    ],
)
def test_what_decides_which_model_is_served_is_ours_and_the_rest_is_who_set_it(field: str, left: bool) -> None:
    container = {
        "name": "server", "image": "i", "env": [{"name": "A", "value": "b"}],
        "resources": {"limits": {"memory": "64Gi", "cpu": "8"}},
        "ports": [{"containerPort": 8000, "protocol": "TCP", "name": "http"}],
    }  # fmt: skip
    first = {"name": "check", "args": ["--model"]}
    template = {"metadata": {"labels": {"zhllama.io/version": "1"}}, "spec": {"containers": [container]}}
    template["spec"]["initContainers"] = [first]
    wanted = {
        "metadata": {"labels": {"example.com/owner": "a"}},
        "spec": {"strategy": {"type": "Recreate"}, "template": template, "selector": {}},
    }
    before = json.dumps(wanted)
    made, (said,) = without_others(wanted, [(field, "kubectl-edit")])
    assert json.dumps(wanted) == before
    assert (json.dumps(made) != before) is left
    assert said == f"{field} stays as kubectl-edit has set it" if left else f"{field} is taken back from kubectl-edit"


def test_the_conflicts_that_a_real_server_names_are_read() -> None:
    body = answered("apply/conflict-replicas")["body"]
    assert conflicts(json.dumps(body)) == [(".spec.replicas", "autoscaler")]
    assert conflicts(json.dumps(answered("apply/with-version")["body"])) == []
    assert conflicts("<html>") == conflicts(None) == []


# --- through the API server -------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("zhllama.kubernetes.api.FIRST_WAIT", 0.0)
    with KubernetesServer() as made:
        monkeypatch.setenv("KUBECONFIG", str(made.kubeconfig(tmp_path / "kubeconfig")))
        yield made


@pytest.fixture
def cluster(server: KubernetesServer) -> Cluster:
    return Cluster()


def deployment(replicas: int, image: str = "a") -> dict[str, Any]:
    metadata = {"name": "zh", "namespace": "team", "labels": dict(OURS)}
    template = {"metadata": {"labels": dict(OURS)}, "spec": {"containers": [{"name": "server", "image": image}]}}
    spec = {"replicas": replicas, "selector": {"matchLabels": dict(OURS)}, "template": template}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": spec}


def replicas(server: KubernetesServer) -> int:
    return int(server.of_kind("Deployment")["zh"]["spec"]["replicas"])


def autoscaler(server: KubernetesServer) -> None:
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "zh"}
    thing = {"kind": "HorizontalPodAutoscaler", "metadata": {"name": "by-queue"}, "spec": {"scaleTargetRef": target}}
    server.put("/apis/autoscaling/v2/namespaces/team/horizontalpodautoscalers/by-queue", thing)


@pytest.mark.parametrize("manager", [HPA, "kubectl"])
def test_replicas_that_another_has_set_stay_and_the_rest_is_applied(
    server: KubernetesServer, cluster: Cluster, manager: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    cluster.apply(deployment(1))
    server.scale(f"{DEPLOYMENTS}/zh", 10, manager)
    cluster.apply(deployment(1, "b"))
    assert replicas(server) == 10
    assert server.of_kind("Deployment")["zh"]["spec"]["template"]["spec"]["containers"][0]["image"] == "b"
    assert f"Deployment team/zh: replicas stays 10: it is set by {manager}" in caplog.messages


def test_replicas_that_are_ours_alone_are_set_again(server: KubernetesServer, cluster: Cluster) -> None:
    cluster.apply(deployment(1))
    cluster.apply(deployment(3))
    assert replicas(server) == 3


def test_an_autoscaler_that_has_not_scaled_yet_finds_the_replicas_as_they_were(
    server: KubernetesServer, cluster: Cluster
) -> None:
    cluster.apply(deployment(4))
    autoscaler(server)
    cluster.apply(deployment(1, "b"))
    # left out, they would have fallen back to one; sent as wanted, they would be one too
    assert replicas(server) == 4


def test_a_first_deployment_below_an_autoscaler_says_no_replicas(server: KubernetesServer, cluster: Cluster) -> None:
    autoscaler(server)
    cluster.apply(deployment(4))
    (entry,) = server.of_kind("Deployment")["zh"]["metadata"]["managedFields"]
    assert "f:replicas" not in entry["fieldsV1"]["f:spec"]


@pytest.mark.parametrize("there", [True, False], ids=["again", "first"])
def test_a_manager_that_scales_between_the_look_and_the_apply_is_not_overridden(
    server: KubernetesServer, cluster: Cluster, there: bool
) -> None:
    if there:
        cluster.apply(deployment(1))
    looked = iter([False])

    def race(method: str, path: str) -> None:
        if method == "PATCH" and path.endswith("/zh") and not next(looked, True):
            if not there:
                server.apply(path, deployment(1), "kubectl")
            server.scale(path, 7, HPA)

    server.fault = race
    cluster.apply(deployment(2, "b"))
    assert replicas(server) == 7
    assert server.of_kind("Deployment")["zh"]["spec"]["template"]["spec"]["containers"][0]["image"] == "b"


def test_taking_back_leaves_what_an_autoscaler_has_said_meanwhile(server: KubernetesServer, cluster: Cluster) -> None:
    cluster.apply(deployment(1))
    server.scale(f"{DEPLOYMENTS}/zh", 5, HPA)
    before = as_it_was(server.of_kind("Deployment")["zh"])
    cluster.apply(deployment(1, "b"))
    server.scale(f"{DEPLOYMENTS}/zh", 8, HPA)
    cluster.apply(before)
    assert replicas(server) == 8
    assert server.of_kind("Deployment")["zh"]["spec"]["template"]["spec"]["containers"][0]["image"] == "a"


def test_a_model_that_another_has_scaled_to_nothing_is_not_deployed_over(
    server: KubernetesServer, cluster: Cluster
) -> None:
    cluster.apply(deployment(1))
    server.scale(f"{DEPLOYMENTS}/zh", 0, "kubectl")
    before = server.of_kind("Deployment")
    said = r"team/zh is scaled to 0 by kubectl: .*kubectl scale deployment zh --replicas 1"
    with pytest.raises(InputError, match=said), cluster.whole_or_not_at_all([deployment(1, "b")], 1):
        pytest.fail("nothing is tried")
    assert server.of_kind("Deployment") == before


def test_what_another_manager_has_set_stays_and_what_is_served_is_taken_back(
    server: KubernetesServer, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    wanted = deployment(1)
    wanted["spec"]["revisionHistoryLimit"] = 3
    wanted["spec"]["template"]["metadata"]["labels"]["zhllama.io/version"] = "ours"
    cluster.apply(wanted)
    theirs = {"template": {"metadata": {"labels": {"zhllama.io/version": "theirs"}}}, "revisionHistoryLimit": 9}
    server.apply(f"{DEPLOYMENTS}/zh", wanted | {"spec": theirs}, "argocd")
    cluster.apply(wanted)
    spec = server.of_kind("Deployment")["zh"]["spec"]
    assert spec["revisionHistoryLimit"] == 9
    assert spec["template"]["metadata"]["labels"]["zhllama.io/version"] == "ours"
    assert "Deployment team/zh: .spec.revisionHistoryLimit stays as argocd has set it" in caplog.messages
    label = ".spec.template.metadata.labels.zhllama.io/version"
    assert f"Deployment team/zh: {label} is taken back from argocd" in caplog.messages
    # and so it is the next time
    cluster.apply(wanted)
    assert server.of_kind("Deployment")["zh"]["spec"] == spec


def test_what_is_ours_and_has_drifted_is_taken_back(server: KubernetesServer, cluster: Cluster) -> None:
    cluster.apply(deployment(2, "a"))
    with server.changed:
        server.objects[f"{DEPLOYMENTS}/zh"]["spec"]["replicas"] = 7
    cluster.apply(deployment(2, "a"))
    assert replicas(server) == 2


QUOTA = {
    "kind": "Status", "code": 403, "reason": "Forbidden",
    "message": 'deployments.apps "zh" is forbidden: exceeded quota: team, requested: count/deployments.apps=1, used: '
    "count/deployments.apps=2, limited: count/deployments.apps=2",
}  # fmt: skip


def test_a_quota_without_room_is_waited_for_and_said(
    server: KubernetesServer, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("components.serve.cluster.LOOK_EVERY", 0.01)
    answers = iter([Fault(recorded={"status": 403, "body": QUOTA})] * 4)
    server.fault = lambda method, path: next(answers, None) if method == "PATCH" else None
    cluster.apply(deployment(1), 60)
    assert replicas(server) == 1
    (said,) = [line for line in caplog.messages if "exceeded quota" in line]
    assert said.startswith('Deployment team/zh waits: 403 deployments.apps "zh" is forbidden: exceeded quota: team')
    server.fault = lambda method, path: Fault(recorded={"status": 403, "body": QUOTA}) if method == "PATCH" else None
    with pytest.raises(InputError, match=r"exceeded quota: .*; free some of the quota"):
        cluster.apply(deployment(1), 0.02)


def test_what_is_on_its_way_out_is_not_deployed_over(server: KubernetesServer, cluster: Cluster) -> None:
    """It takes what is applied, and goes nevertheless."""
    cluster.apply(deployment(1))
    with server.changed:
        metadata = server.objects[f"{DEPLOYMENTS}/zh"]["metadata"]
        metadata |= {"deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": ["foregroundDeletion"]}
    said = r"team/zh is being deleted \(foregroundDeletion keeps it\)"
    with pytest.raises(StorageFault, match=said), cluster.whole_or_not_at_all([deployment(1, "b")], 1):
        pytest.fail("nothing is applied")


def inference_service(least: int, most: int) -> dict[str, Any]:
    metadata = {"name": "zh", "namespace": "team", "labels": dict(OURS)}
    predictor = {"minReplicas": least, "maxReplicas": most, "containers": [{"name": "kserve-container"}]}
    return {
        "apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService", "metadata": metadata,
        "spec": {"predictor": predictor},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("theirs", "stand"),
    [({"maxReplicas": 6}, (1, 6)), ({"minReplicas": 2, "maxReplicas": 6}, (2, 6)), ({}, (3, 3))],
    ids=["most", "both", "none"],
)
def test_kserves_bounds_that_another_has_set_stay_and_fit_together(
    server: KubernetesServer, cluster: Cluster, theirs: dict[str, int], stand: tuple[int, int]
) -> None:
    cluster.apply(inference_service(1, 1))
    path = "/apis/serving.kserve.io/v1beta1/namespaces/team/inferenceservices/zh"
    if theirs:
        partial = inference_service(1, 1) | {"spec": {"predictor": theirs}}
        server.apply(path, partial, "argocd")
    cluster.apply(inference_service(3, 3))
    predictor = server.of_kind("InferenceService")["zh"]["spec"]["predictor"]
    # one bound alone of ours could come to lie on the wrong side of theirs
    assert (predictor["minReplicas"], predictor["maxReplicas"]) == stand


def test_an_account_that_may_not_look_for_autoscalers_is_told_which_role(
    server: KubernetesServer, cluster: Cluster
) -> None:
    server.fault = lambda method, path: 403 if "horizontalpodautoscalers" in path else None
    with pytest.raises(InputError, match="Role zhllama-deployer of this release"):
        cluster.apply(deployment(1))
    assert not server.of_kind("Deployment")
