"""Four identities, and nobody has more rights than the design says."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.k8s.kustomizations import ROOT, Object, build, of_kind

NAMESPACES = {"overlays/cluster": "zhllama", "overlays/profile": "your-profile", "overlays/kfp-standalone": "kubeflow"}


def rights(role: Object) -> dict[str, set[str]]:
    """`group/resource` → verbs."""
    found: dict[str, set[str]] = {}
    for rule in role["rules"]:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                found.setdefault(f"{group}/{resource}", set()).update(rule["verbs"])
    return found


def subjects(objects: list[Object], binding: str) -> set[str]:
    return {subject["name"] for subject in of_kind(objects, "RoleBinding")[binding]["subjects"]}


@pytest.fixture(params=sorted(NAMESPACES))
def overlay(request: pytest.FixtureRequest) -> tuple[str, list[Object]]:
    return NAMESPACES[request.param], build(request.param)


def test_no_role_touches_secrets_or_takes_everything(overlay):
    for name, role in of_kind(overlay[1], "Role").items():
        for right, verbs in rights(role).items():
            assert "secrets" not in right, name
            assert "*" not in right, name
            assert "*" not in verbs, name


def test_there_are_no_rights_beyond_the_namespace(overlay):
    namespace, objects = overlay
    assert not of_kind(objects, "ClusterRole")
    assert not of_kind(objects, "ClusterRoleBinding")
    assert {value["metadata"].get("namespace", namespace) for value in objects} == {namespace}


def test_bindings_name_roles_that_are_there_and_accounts_of_this_namespace(overlay):
    namespace, objects = overlay
    roles = of_kind(objects, "Role")
    for binding in of_kind(objects, "RoleBinding").values():
        assert binding["roleRef"]["name"] in roles
        assert {subject["namespace"] for subject in binding["subjects"]} == {namespace}


def test_the_runner_may_do_what_the_launcher_does_and_no_more(overlay):
    job = {"create", "get", "list", "watch", "patch", "delete"}
    read = {"get", "list", "watch"}
    assert rights(of_kind(overlay[1], "Role")["zhllama-runner"]) == {
        "kubeflow.org/pytorchjobs": job,
        "trainer.kubeflow.org/trainjobs": job,
        "/pods": read,
        "/pods/log": read,
        "/events": read,
        "argoproj.io/workflows": {"get"},
        "networking.k8s.io/networkpolicies": {"create"},
    }


RESOURCES = {
    "pod": {"/pods"},
    "pod_log": {"/pods/log"},
    "event": {"/events"},
    "network_policy": {"networking.k8s.io/networkpolicies"},
    "custom_object": {"kubeflow.org/pytorchjobs", "trainer.kubeflow.org/trainjobs"},
    "deployment": {"apps/deployments"},
    "replica_set": {"apps/replicasets"},
    "horizontal_pod_autoscaler": {"autoscaling/horizontalpodautoscalers"},
    "pod_portforward": {"/pods/portforward"},
}
"""What a method of the Kubernetes client is about; a training job may be of either kind."""
VERBS = {"read": "get", "get": "get", "list": "list", "create": "create", "delete": "delete", "patch": "patch"}


def asked_for(*files: Path) -> set[tuple[str, str]]:
    """(verb, resource) of each method of the Kubernetes client that these modules name."""
    found = set()
    for path in files:
        for verb, resource in re.findall(r"\.([a-z]+)_namespaced_([a-z_]+)\b", path.read_text()):
            found |= {(VERBS[verb], one) for one in RESOURCES[resource]}
    return found


def test_the_launcher_and_the_reaper_have_the_rights_that_they_make_use_of(cluster: list[Object]):
    roles = of_kind(cluster, "Role")
    launcher = asked_for(*(ROOT / "components" / "launch_training").glob("*.py"))
    reaper = asked_for(ROOT / "zhllama" / "kubernetes" / "reaper.py")
    assert ("create", "networking.k8s.io/networkpolicies") in launcher
    assert ("delete", "kubeflow.org/pytorchjobs") in reaper
    # the training operator alone has to be woken, and has no TrainJobs
    reaper -= {("patch", "trainer.kubeflow.org/trainjobs")}
    for asked, role in ((launcher, "zhllama-runner"), (reaper, "zhllama-reaper")):
        granted = {(verb, right) for right, verbs in rights(roles[role]).items() for verb in verbs}
        assert asked <= granted, role


def test_who_deploys_has_the_rights_that_a_deployment_makes_use_of(cluster: list[Object]):
    roles = of_kind(cluster, "Role")
    # custom objects are watched there by a kind of which only the Role knows the name
    files = (ROOT / "components" / "serve").glob("*.py")
    asked = {(verb, one) for verb, one in asked_for(*files) if one not in RESOURCES["custom_object"]}
    assert ("list", "apps/replicasets") in asked
    granted = {
        (verb, right)
        for role in ("zhllama-deployer", "zhllama-runner")
        for right, verbs in rights(roles[role]).items()
        for verb in verbs
    }
    assert asked <= granted


def test_the_reaper_lists_and_deletes_jobs_and_reads_workflows(overlay):
    _, objects = overlay
    assert subjects(objects, "zhllama-reaper") == {"zhllama-reaper"}
    assert rights(of_kind(objects, "Role")["zhllama-reaper"]) == {
        "kubeflow.org/pytorchjobs": {"list", "delete", "patch"},
        "trainer.kubeflow.org/trainjobs": {"list", "delete"},
        "argoproj.io/workflows": {"get", "list"},
    }


def test_to_deploy_is_a_right_of_its_own_and_not_in_the_base(overlay):
    applied = {"create", "get", "patch", "delete"}
    assert rights(of_kind(overlay[1], "Role")["zhllama-deployer"]) == {
        "apps/deployments": applied | {"list", "watch"},
        "apps/replicasets": {"list"},
        "autoscaling/horizontalpodautoscalers": {"list"},
        "/services": applied,
        "/pods/portforward": {"create", "get"},
        "networking.k8s.io/networkpolicies": applied,
        "monitoring.coreos.com/podmonitors": applied,
        "serving.kserve.io/inferenceservices": applied | {"watch"},
    }
    assert "zhllama-deployer" not in of_kind(build("base"), "Role")


def test_training_and_serving_have_no_rights_and_no_token(overlay):
    _, objects = overlay
    bound = {name for binding in of_kind(objects, "RoleBinding") for name in subjects(objects, binding)}
    accounts = of_kind(objects, "ServiceAccount")
    for name in ("zhllama-training", "zhllama-serving"):
        assert name not in bound
        assert accounts[name]["automountServiceAccountToken"] is False


@pytest.mark.parametrize(
    ("name", "accounts"),
    [
        ("overlays/cluster", {"zhllama-runner", "pipeline-runner", "default-editor"}),
        ("overlays/profile", {"zhllama-runner", "default-editor"}),
        ("overlays/kfp-standalone", {"zhllama-runner", "pipeline-runner"}),
    ],
)
def test_kfps_account_gets_the_runners_rights(name, accounts):
    objects = build(name)
    for binding in ("zhllama-runner", "zhllama-deployer"):
        assert subjects(objects, binding) == accounts


def test_our_own_namespace_enforces_the_restricted_standard_and_anothers_is_left_alone(
    cluster: list[Object], profile: list[Object]
):
    labels: dict[str, Any] = of_kind(cluster, "Namespace")["zhllama"]["metadata"]["labels"]
    assert {labels[f"pod-security.kubernetes.io/{mode}"] for mode in ("enforce", "audit", "warn")} == {"restricted"}
    assert not of_kind(profile, "Namespace")
