"""k8s/: every kustomization builds, every object fits its schema, and nobody gets more rights than the design says."""

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.check.check import check as check_files

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
CRDS = ROOT.parent / "shared" / "crds"
KUSTOMIZATIONS = sorted(
    path.parent
    for path in K8S.rglob("kustomization.yaml")
    if yaml.safe_load(path.read_text())["kind"] == "Kustomization"
)
FILES = sorted(path for path in K8S.rglob("*.yaml") if path.name != "kustomization.yaml")
ids = lambda path: str(path.relative_to(K8S))  # noqa: E731


def build(folder: Path) -> list[dict[str, Any]]:
    """What `kubectl apply -k` would apply."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("NOT CHECKED: kubectl is not here, so k8s/ is not built")
    built = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert "Warning" not in built.stderr, built.stderr
    return list(yaml.safe_load_all(built.stdout))


def check(value: dict[str, Any]) -> list[str]:
    """What `zhllama check` finds wrong in an object; skips the test, loudly, where a definition is not at hand."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "object.yaml"
        path.write_text(yaml.safe_dump(value))
        found = check_files([path], CRDS if CRDS.is_dir() else None)
    if any(finding.rule == "no-schema" for finding in found):
        pytest.skip(
            f"NOT CHECKED: {value['kind']}: no definitions of custom resources beside this repository (../shared/crds)"
        )
    return [str(finding) for finding in found if finding.level == "error"]


# --- every object -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=ids)
def test_a_kustomization_builds_and_each_object_has_a_name_once(folder):
    built = build(folder)
    names = [(value["kind"], value["metadata"].get("namespace"), value["metadata"]["name"]) for value in built]
    assert len(names) == len(set(names)) > 0


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_every_object_fits_its_schema_to_the_letter(path):
    # Prometheus's definitions are seldom at hand: the test ends there, so the others come first
    for value in sorted(yaml.safe_load_all(path.read_text()), key=lambda value: value["kind"] == "PodMonitor"):
        assert check(value) == []


def test_the_check_finds_what_is_wrong():
    (policy, *_) = yaml.safe_load_all((K8S / "base" / "network-policies.yaml").read_text())
    policy["spec"]["podSelektor"] = {}
    assert "[schema]" in check(policy)[0]
    queue = yaml.safe_load((K8S / "components" / "kueue" / "local-queue.yaml").read_text())
    queue["spec"]["clusterQeue"] = "x"
    assert "[schema]" in check(queue)[0]


@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=ids)
def test_no_secret_is_applied(folder):
    assert not [value for value in build(folder) if value["kind"] == "Secret"]


# --- identities -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> list[dict[str, Any]]:
    return build(K8S / "overlays" / "cluster")


def of_kind(objects: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    return {value["metadata"]["name"]: value for value in objects if value["kind"] == kind}


def rights(role: dict[str, Any]) -> dict[str, set[str]]:
    """`group/resource` → verbs."""
    found: dict[str, set[str]] = {}
    for rule in role["rules"]:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                found.setdefault(f"{group}/{resource}", set()).update(rule["verbs"])
    return found


def test_no_role_touches_secrets_or_takes_everything(cluster):
    for name, role in of_kind(cluster, "Role").items():
        for right, verbs in rights(role).items():
            assert "secrets" not in right, name
            assert "*" not in right, name
            assert "*" not in verbs, name


def test_there_are_no_rights_beyond_the_namespace(cluster):
    assert not of_kind(cluster, "ClusterRole")
    assert not of_kind(cluster, "ClusterRoleBinding")


def test_the_runner_may_do_what_the_launcher_does_and_no_more(cluster):
    job = {"create", "get", "list", "watch", "patch", "delete"}
    read = {"get", "list", "watch"}
    assert rights(of_kind(cluster, "Role")["zhllama-runner"]) == {
        "kubeflow.org/pytorchjobs": job,
        "trainer.kubeflow.org/trainjobs": job,
        "/pods": read,
        "/pods/log": read,
        "/events": read,
        "argoproj.io/workflows": {"get"},
        "networking.k8s.io/networkpolicies": {"create", "get", "delete"},
    }


def test_the_reaper_lists_and_deletes_jobs_and_reads_workflows(cluster):
    assert rights(of_kind(cluster, "Role")["zhllama-reaper"]) == {
        "kubeflow.org/pytorchjobs": {"list", "delete"},
        "trainer.kubeflow.org/trainjobs": {"list", "delete"},
        "argoproj.io/workflows": {"get", "list"},
    }


def test_to_deploy_is_a_right_of_its_own_and_not_in_the_base(cluster):
    assert set(rights(of_kind(cluster, "Role")["zhllama-deployer"])) == {
        "apps/deployments",
        "/services",
        "/pods/portforward",
        "networking.k8s.io/networkpolicies",
        "monitoring.coreos.com/podmonitors",
        "serving.kserve.io/inferenceservices",
    }
    assert "zhllama-deployer" not in of_kind(build(K8S / "base"), "Role")


def test_training_and_serving_have_no_rights_and_no_token(cluster):
    bound = {subject["name"] for binding in of_kind(cluster, "RoleBinding").values() for subject in binding["subjects"]}
    accounts = of_kind(cluster, "ServiceAccount")
    for name in ("zhllama-training", "zhllama-serving"):
        assert name not in bound
        assert accounts[name]["automountServiceAccountToken"] is False


def test_bindings_name_roles_that_are_there_and_accounts_of_this_namespace(cluster):
    roles = of_kind(cluster, "Role")
    for binding in of_kind(cluster, "RoleBinding").values():
        assert binding["roleRef"]["name"] in roles
        assert {subject["namespace"] for subject in binding["subjects"]} == {"zhllama"}


def test_kfps_own_accounts_get_the_runners_rights(cluster):
    subjects = {subject["name"] for subject in of_kind(cluster, "RoleBinding")["zhllama-runner"]["subjects"]}
    assert subjects == {"zhllama-runner", "pipeline-runner", "default-editor"}


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_the_namespace_enforces_the_restricted_standard(cluster):
    labels = of_kind(cluster, "Namespace")["zhllama"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_training_pods_reach_names_s3_and_each_other_and_nothing_else(cluster):
    policies = of_kind(cluster, "NetworkPolicy")
    chosen = {"matchExpressions": [{"key": "zhllama.io/stage", "operator": "Exists"}]}
    assert all(policy["spec"]["podSelector"] == chosen for policy in policies.values())
    assert set(policies["zhllama-training-deny"]["spec"]) == {"podSelector", "policyTypes"}
    assert policies["zhllama-training-deny"]["spec"]["policyTypes"] == ["Ingress", "Egress"]
    ports = {
        (port["protocol"], port["port"])
        for rule in policies["zhllama-training-dns-and-s3"]["spec"]["egress"]
        for port in rule["ports"]
    }
    assert ports == {("UDP", 53), ("TCP", 53), ("TCP", 443), ("TCP", 8333), ("TCP", 9000)}
    peers = policies["zhllama-training-peers"]["spec"]
    assert peers["ingress"] == [{"from": [{"podSelector": chosen}]}]
    assert peers["egress"] == [{"to": [{"podSelector": chosen}]}]


def test_the_example_secret_has_the_keys_that_pods_take():
    from components.shared.training_job import S3_KEYS, S3_OPTIONAL_KEYS

    secret = yaml.safe_load((K8S / "base" / "s3-secret.example.yaml").read_text())
    assert secret["metadata"]["name"] == "zhllama-s3"
    assert set(S3_KEYS) <= set(secret["stringData"]) <= {*S3_KEYS, *S3_OPTIONAL_KEYS}
