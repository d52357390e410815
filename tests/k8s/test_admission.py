"""components/admission, asked in CEL: what accounts of a namespace may make of it, and what not."""

import re
from pathlib import Path
from typing import Any

import celpy
import pytest
import yaml
from celpy.adapter import json_to_cel

from pipelines import sizes
from pipelines.manifests import render
from pipelines.manifests.serving import model_server
from tests.k8s.kustomizations import K8S, Object, build, of_kind
from tests.k8s.test_pods import templates
from zhllama.kubernetes.job_manifest import job_manifest
from zhllama.kubernetes.network_policy import network_policy
from zhllama.kubernetes.pod_settings import pod_settings
from zhllama.kubernetes.training_job import TrainingJob

FOLDER = K8S / "components" / "admission"
OURS = {"data": {"names": "zhllama-* team-s3"}}


def policies() -> dict[str, Any]:
    found = {}
    for name in ("secrets", "network-policies", "services", "pod-monitors", "reaper-jobs"):
        policy, binding = yaml.safe_load_all((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
        assert binding["spec"]["policyName"] == policy["metadata"]["name"]
        assert binding["spec"]["validationActions"] == ["Deny"]
        found[policy["metadata"]["name"]] = policy["spec"]
    return found


SPECS = policies()
_ENVIRONMENT = celpy.Environment()
# of Kubernetes' own library, which celpy does not have
_FUNCTIONS = {
    "split": lambda text, by: json_to_cel(str(text).split(str(by))),
    "substring": lambda text, begin, end: json_to_cel(str(text)[int(begin) : int(end)]),
}


def evaluated(expression: str, given: dict[str, Any]) -> Any:
    program = _ENVIRONMENT.program(_ENVIRONMENT.compile(expression), functions=_FUNCTIONS)
    return program.evaluate(given)


def refusal(name: str, **given: Any) -> str:
    """What the policy says of a request; "" where it admits it."""
    spec = SPECS[name]
    context = {key: json_to_cel(value) for key, value in given.items()}
    if not all(evaluated(one["expression"], context) for one in spec["matchConditions"]):
        return ""
    variables: dict[str, Any] = {}
    for one in spec.get("variables", ()):
        variables[one["name"]] = evaluated(one["expression"], {**context, "variables": _mapped(variables)})
    for one in spec["validations"]:
        if not evaluated(one["expression"], {**context, "variables": _mapped(variables)}):
            return str(one["message"])
    return ""


def _mapped(variables: dict[str, Any]) -> Any:
    return celpy.celtypes.MapType({celpy.celtypes.StringType(name): value for name, value in variables.items()})


# --- secrets ----------------------------------------------------------------------------------------------------------


def pod(spec: Any, kind: str = "PyTorchJob", labels: dict[str, str] | None = None, owner: str = "a") -> Object:
    owners = [{"kind": kind, "name": owner, "controller": True}]
    return {"metadata": {"name": "p", "labels": labels or {}, "ownerReferences": owners}, "spec": spec}


PLAIN: Any = {"containers": [{"name": "a", "image": "i"}]}


def with_container(**fields: Any) -> Any:
    return {"containers": [{"name": "a", "image": "i", **fields}]}


def with_volume(**source: Any) -> Any:
    return {**PLAIN, "volumes": [{"name": "tmp", "emptyDir": {}}, {"name": "v", **source}]}


NAMING = {
    "a variable": lambda name: with_container(
        env=[{"name": "A", "value": "a"}, {"name": "B", "valueFrom": {"secretKeyRef": {"name": name, "key": "k"}}}]
    ),
    "all of it": lambda name: with_container(envFrom=[{"configMapRef": {"name": "c"}}, {"secretRef": {"name": name}}]),
    "an init container": lambda name: {
        **PLAIN, "initContainers": with_container(envFrom=[{"secretRef": {"name": name}}])["containers"],
    },
    "a volume": lambda name: with_volume(secret={"secretName": name}),
    "a projection": lambda name: with_volume(projected={"sources": [{"secret": {"name": name}}]}),
    "to pull an image with": lambda name: {**PLAIN, "imagePullSecrets": [{"name": "zhllama-pull"}, {"name": name}]},
    "a driver": lambda name: with_volume(csi={"driver": "d", "nodePublishSecretRef": {"name": name}}),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["PyTorchJob", "Job", "ReplicaSet"])
@pytest.mark.parametrize("way", NAMING)
def test_a_pod_names_a_listed_secret_and_no_other(way, kind):
    for name in ("zhllama-s3", "team-s3"):
        assert refusal("zhllama-secrets", object=pod(NAMING[way](name), kind), params=OURS) == ""
    for name in ("mlpipeline-minio-artifact", "zhllama", "a-zhllama-s3", "team-s3x", "team"):
        said = refusal("zhllama-secrets", object=pod(NAMING[way](name), kind), params=OURS)
        assert "ConfigMap zhllama-secrets" in said, name
    # a step's pods are KFP's
    assert refusal("zhllama-secrets", object=pod(NAMING[way]("another"), "Workflow"), params=OURS) == ""


@pytest.mark.parametrize(
    "source", ["azureFile", "cephfs", "iscsi", "rbd", "flexVolume", "scaleIO", "storageos", "cinder"]
)
def test_a_volume_that_may_name_a_secret_elsewhere_is_refused(source):
    assert "may name a secret" in refusal("zhllama-secrets", object=pod(with_volume(**{source: {}})), params=OURS)


def test_what_openshift_gives_an_account_to_pull_with_is_admitted_with_its_own_pods():
    teams = {"data": {"names": "team-*"}}
    mine = {**PLAIN, "serviceAccountName": "zhllama-training"}
    for spec, name, admitted in (
        (mine, "zhllama-training-dockercfg-x7k2p", True),
        (mine, "builder-dockercfg-x7k2p", False),
        (PLAIN, "default-dockercfg-x7k2p", True),
    ):
        made = pod({**spec, "imagePullSecrets": [{"name": name}]})
        assert (refusal("zhllama-secrets", object=made, params=teams) == "") is admitted


def specs(job: Any) -> list[Any]:
    """Of the pods of a rendered job: what its API's operator makes pods of."""
    if job["kind"] == "PyTorchJob":
        return [one["template"]["spec"] for one in job["spec"]["pytorchReplicaSpecs"].values()]
    (patch,) = job["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    spec = node["template"]["spec"]["template"]["spec"]
    return [{**spec, "containers": [{**spec["containers"][0], **job["spec"]["trainer"]}]}]


OF_JOBS: dict[str, Any] = {
    "s3_secret": lambda name: {"s3_secret": name},
    "proxy_secret": lambda name: {"proxy_secret": name},
    "pull_secret": lambda name: {"pull_secret": name},
    "a variable of the platform's": lambda name: {
        "pods": pod_settings("--pods", {"environment": {"WANDB": {"secret": name, "key": "k"}}})
    },
}
NODES: list[dict[str, int]] = [{"nodes": 1}, {"nodes": 2}, {"nodes": 2, "min_nodes": 1, "max_nodes": 4}]


@pytest.mark.parametrize("nodes", NODES, ids=str)
@pytest.mark.parametrize("way", OF_JOBS)
def test_every_secret_of_a_job_is_looked_at_in_each_of_its_pods(way, nodes):
    for name, admitted in (("zhllama-mine", True), ("mlpipeline-minio-artifact", False)):
        job = TrainingJob(name="j", command=("python",), image="i", **OF_JOBS[way](name), **nodes)
        for api in ("pytorchjob",) if job.elastic else ("pytorchjob", "trainjob"):
            for spec in specs(job_manifest(job, api)):
                kind = "PyTorchJob" if api == "pytorchjob" else "Job"
                said = refusal("zhllama-secrets", object=pod(spec, kind), params=OURS)
                assert (said == "") is admitted
                assert admitted or "ConfigMap zhllama-secrets" in said


def test_a_lone_star_lists_nothing():
    assert refusal("zhllama-secrets", object=pod(NAMING["a volume"]("x")), params={"data": {"names": "*"}})


@pytest.mark.parametrize("account", ["zhllama-runner", "pipeline-runner", "default-editor", "zhllama-reaper"])
def test_no_job_runs_as_an_account_with_rights(account):
    spec = {**PLAIN, "serviceAccountName": account}
    set_label = {"jobset.sigs.k8s.io/jobset-name": "zhllama-reaper-1"}
    for made in (pod(spec), pod(spec, "ReplicaSet"), pod(spec, "Job"), pod(spec, "Job", set_label, "zhllama-reaper-1")):
        assert "accounts" in refusal("zhllama-secrets", object=made, params=OURS) or "account" in refusal(
            "zhllama-secrets", object=made, params=OURS
        )
    for good in ("zhllama-training", "zhllama-serving", "default", "team"):
        assert refusal("zhllama-secrets", object=pod({**PLAIN, "serviceAccountName": good}), params=OURS) == ""


CONTROLLER = "system:serviceaccount:kube-system:cronjob-controller"
OF_THE_REAPER = [{"kind": "CronJob", "name": "zhllama-reaper", "controller": True}]


@pytest.mark.parametrize(
    ("account", "owners", "admitted"),
    [
        (CONTROLLER, OF_THE_REAPER, True),
        ("system:kube-controller-manager", OF_THE_REAPER, True),
        ("system:serviceaccount:zhllama:pipeline-runner", OF_THE_REAPER, False),
        ("alice", OF_THE_REAPER, False),
        (CONTROLLER, [{"kind": "CronJob", "name": "mine", "controller": True}], False),
        (CONTROLLER, [], False),
    ],
)
def test_a_job_of_the_reapers_name_comes_from_its_cronjob_alone(account, owners, admitted):
    for named in ({"name": "zhllama-reaper-x"}, {"generateName": "zhllama-reaper-"}):
        metadata = {**named, **({"ownerReferences": owners} if owners else {})}
        request = {"operation": "CREATE", "namespace": "zhllama", "userInfo": {"username": account}}
        said = refusal("zhllama-reaper-jobs", object={"metadata": metadata}, request=request)
        assert (said == "") is admitted
    other = {"operation": "CREATE", "namespace": "zhllama", "userInfo": {"username": "alice"}}
    assert refusal("zhllama-reaper-jobs", object={"metadata": {"name": "mine"}}, request=other) == ""


OWNERS = {"PyTorchJob": "PyTorchJob", "CronJob": "Job", "Deployment": "ReplicaSet", "StatefulSet": "StatefulSet"}


def test_every_pod_of_ours_is_admitted_with_the_list_that_is_applied(cluster: list[Object]):
    listed = of_kind(cluster, "ConfigMap")["zhllama-secrets"]
    looked_at = 0
    for folder in ("overlays/cluster", "dev", "pytorchjob/7b", "serving/7b"):
        for value in build(folder):
            for name, template in templates(value):
                made = pod(template["spec"], OWNERS[value["kind"]], owner=f"{value['metadata']['name']}-1")
                assert refusal("zhllama-secrets", object=made, params=listed) == "", name
                looked_at += 1
    assert looked_at > 5


# --- network policies -------------------------------------------------------------------------------------------------


def by(account: str, operation: str, old: Object | None = None, new: Object | None = None) -> str:
    request = {"operation": operation, "namespace": "zhllama", "userInfo": {"username": account}}
    return refusal("zhllama-policies", request=request, object=new, oldObject=old)


ACCOUNT = "system:serviceaccount:zhllama:pipeline-runner"


def of_ours() -> list[Object]:
    job = render.training_job(sizes.load("7b"), "lora", model="s3://team/m", dataset="s3://team/d", store="s3://team/s")
    return [network_policy(job), model_server(sizes.load("7b")).network_policy()]


def test_an_account_makes_and_deletes_the_policies_of_jobs_and_servers():
    for policy in of_ours():
        assert by(ACCOUNT, "CREATE", new=policy) == ""
        assert by(ACCOUNT, "UPDATE", policy, policy) == ""
        assert by(ACCOUNT, "DELETE", policy) == ""


def test_no_account_of_the_namespace_touches_another_policy(cluster: list[Object]):
    opening = {"spec": {"podSelector": {}, "egress": [{}], "policyTypes": ["Egress"]}}
    every = {"spec": {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "zhllama-serving"}}}}
    others = [*of_kind(cluster, "NetworkPolicy").values(), opening, every]
    for policy in others:
        for operation, old, new in (
            ("CREATE", None, policy),
            ("UPDATE", policy, of_ours()[0]),
            ("DELETE", policy, None),
        ):
            assert "of a training job or of a served model alone" in by(ACCOUNT, operation, old, new)
        assert "alone" in by(ACCOUNT, "UPDATE", of_ours()[0], policy)
        # who applies the base, and the collector that follows a job's deletion
        for account in ("jane", "system:serviceaccount:kube-system:generic-garbage-collector"):
            assert by(account, "DELETE", policy) == ""


# --- Services and PodMonitors -----------------------------------------------------------------------------------------


def of_server(value: Object, operation: str = "CREATE", old: Object | None = None, account: str = ACCOUNT) -> str:
    request = {"operation": operation, "namespace": "zhllama", "userInfo": {"username": account}}
    new = None if operation == "DELETE" else value
    name = {"Service": "zhllama-services", "PodMonitor": "zhllama-pod-monitors"}[value["kind"]]
    return refusal(name, request=request, object=new, oldObject=value if new is None else old)


def with_fields(value: Object, **fields: Any) -> Object:
    return {**value, "spec": {**value["spec"], **fields}}


SERVER = model_server(sizes.load("7b"))
SERVICE, MONITOR = SERVER.service(), SERVER.pod_monitor()
PUBLIC = with_fields(SERVICE, type="LoadBalancer", externalIPs=["192.0.2.1"])


def test_an_account_makes_and_deletes_services_and_monitors_of_servers():
    for value in (SERVICE, with_fields(SERVICE, type="ClusterIP", clusterIP="10.0.0.1"), MONITOR):
        for operation in ("CREATE", "UPDATE", "DELETE"):
            assert of_server(value, operation, value if operation == "UPDATE" else None) == ""
    # a person has made it public: applied again it stays so, and it can be taken back
    assert of_server(PUBLIC, "UPDATE", PUBLIC) == ""
    assert of_server(PUBLIC, "DELETE") == ""


@pytest.mark.parametrize(
    "value",
    [
        with_fields(SERVICE, selector={"app": "seaweedfs"}),
        with_fields(SERVICE, selector={"app.kubernetes.io/name": "zhllama-serving"}),
        {**SERVICE, "spec": {"ports": [{"port": 80}]}},
        {**SERVICE, "spec": {"type": "ExternalName", "externalName": "evil.example"}},
        with_fields(MONITOR, selector={}),
        with_fields(MONITOR, selector={"matchExpressions": [{"key": "a", "operator": "Exists"}]}),
    ],
)
def test_no_account_of_the_namespace_touches_another_service_or_monitor(value):
    mine = SERVICE if value["kind"] == "Service" else MONITOR
    for said in (of_server(value), of_server(value, "DELETE"), of_server(mine, "UPDATE", value)):
        assert "of a served model alone" in said
    assert "of a served model alone" in of_server(value, "UPDATE", mine)
    for account in ("jane", "system:serviceaccount:kserve:kserve-controller-manager"):
        assert of_server(value, account=account) == ""


@pytest.mark.parametrize("fields", [{"type": "NodePort"}, {"type": "LoadBalancer"}, {"externalIPs": ["192.0.2.1"]}])
def test_no_account_of_the_namespace_takes_an_address_for_a_service(fields):
    for old in (None, SERVICE):
        said = of_server(with_fields(SERVICE, **fields), "UPDATE" if old else "CREATE", old)
        assert "without externalIPs" in said


@pytest.mark.parametrize(
    "fields",
    [
        {"bearerTokenSecret": {"name": "s", "key": "k"}},
        {"basicAuth": {"password": {"name": "s", "key": "k"}}},
        {"authorization": {"credentials": {"name": "s", "key": "k"}}},
        {"oauth2": {}},
        {"tlsConfig": {}},
        {"proxyConnectHeader": {}},
    ],
)
def test_no_monitor_sends_a_secret(fields):
    endpoints = [*MONITOR["spec"]["podMetricsEndpoints"], {"port": "http", **fields}]
    assert "may name a secret" in of_server(with_fields(MONITOR, podMetricsEndpoints=endpoints))
    assert "may name a secret" in of_server(with_fields(MONITOR, namespaceSelector={"any": True}))


# --- where ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlay", ["overlays/cluster", "dev"])
def test_they_are_the_clusters_and_hold_where_the_label_is(overlay):
    objects = build(overlay)
    labels = of_kind(objects, "Namespace")["zhllama"]["metadata"]["labels"]
    found = [one for one in objects if one["kind"].startswith("ValidatingAdmissionPolicy")]
    assert len(found) == 10
    for one in found:
        assert "namespace" not in one["metadata"]
        if one["kind"].endswith("Binding"):
            chosen = one["spec"]["matchResources"]["namespaceSelector"]["matchLabels"]
            assert chosen.items() <= labels.items()


def test_the_standard_that_is_enforced_has_a_version(cluster: list[Object]):
    labels = of_kind(cluster, "Namespace")["zhllama"]["metadata"]["labels"]
    assert re.fullmatch(r"v1\.\d+", labels["pod-security.kubernetes.io/enforce-version"])


def test_the_component_says_where_it_is_not_for():
    assert "NOT for" in Path(FOLDER / "kustomization.yaml").read_text(encoding="utf-8")
