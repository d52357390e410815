"""A job's pods reach each other, names and S3, and nothing else; whose job it is makes no difference."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.manifests.check.check import check
from tests.network import End, allowed
from zhllama.errors import InputError
from zhllama.kubernetes.job_manifest import pytorchjob, trainjob
from zhllama.kubernetes.network_policy import S3Network, network_policy
from zhllama.kubernetes.training_job import TrainingJob

OWNER = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "w", "uid": "u", "controller": False}
OUTSIDE = End(address="203.0.113.9")


def job(name: str = "run-lora-a1", **more: Any) -> TrainingJob:
    return TrainingJob(name=name, command=("true",), namespace="zhllama", labels={"zhllama.io/stage": "lora"}, **more)


def pod(of: TrainingJob, api: str = "pytorchjob") -> End:
    """A pod of the job, with the labels that its manifest gives it."""
    if api == "pytorchjob":
        metadata = pytorchjob(of)["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["metadata"]
    else:
        (patch,) = trainjob(of)["spec"]["runtimePatches"]
        (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
        metadata = replicated["template"]["spec"]["template"]["metadata"]
    return End(metadata["labels"])


DENY = {
    "metadata": {"namespace": "zhllama"},
    "spec": {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]},
}


@pytest.mark.parametrize("api", ["pytorchjob", "trainjob"])
@pytest.mark.parametrize("base", [(), (DENY,)], ids=["alone", "in a namespace that denies"])
def test_a_jobs_pods_reach_each_other_names_and_s3_and_nothing_else(api, base):
    one, other = job(), job("run-lora-a2")
    policies = [*base, network_policy(one), network_policy(other)]
    mine, its, stranger = pod(one, api), pod(other, api), End({"app": "notebook"})
    for port in (1, 23456, 29500, 65535):
        assert allowed(policies, mine, mine, port)
        assert not allowed(policies, mine, its, port)
        assert not allowed(policies, stranger, mine, port)
    for port in (443, 8333, 9000):
        assert allowed(policies, mine, End({"app": "minio"}, namespace="storage"), port)
        assert not allowed(policies, mine, OUTSIDE, port)
    for protocol in ("UDP", "TCP"):
        assert allowed(policies, mine, End({"k8s-app": "kube-dns"}, namespace="kube-system"), 53, protocol)
    for port in (22, 80, 3306, 6443, 10250):
        assert not allowed(policies, mine, OUTSIDE, port)
    assert not allowed(policies, mine, stranger, 8080)


def test_s3_may_be_narrowed_to_ranges_and_namespaces():
    policies = [network_policy(job(), S3Network(ports=(9000,), cidrs=("203.0.113.0/24",), namespaces=("minio",)))]
    mine = pod(job())
    assert allowed(policies, mine, OUTSIDE, 9000)
    assert allowed(policies, mine, End({"app": "minio"}, namespace="minio"), 9000)
    for target, port in ((OUTSIDE, 443), (End(address="198.51.100.1"), 9000), (End(namespace="other"), 9000)):
        assert not allowed(policies, mine, target, port)


@pytest.mark.parametrize(
    ("endpoint", "ports"),
    [
        ("", {443}),
        ("https://s3.example.com", {443}),
        ("http://s3.example.com", {80}),
        ("http://ceph.example.com:7480", {7480}),
        ("http://192.0.2.7:9000", {9000}),
    ],
)
def test_s3_outside_is_reached_on_its_own_port_alone(endpoint, ports):
    policies = [network_policy(job(), S3Network.at(endpoint))]
    assert {port for port in range(1, 10_000) if allowed(policies, pod(job()), OUTSIDE, port)} - {53, 5353} == ports
    # its address may be a Service's, behind which the pods of the cluster have the usual ports
    assert allowed(policies, pod(job()), End({"app": "minio"}, namespace="storage"), 9000)


def test_s3_anywhere_is_a_choice_that_holds_the_clusters_pods_too():
    policies = [network_policy(job(), S3Network(ports=(9000,), cidrs=("0.0.0.0/0",)))]
    for target in (OUTSIDE, End({"app": "minio"}, namespace="storage")):
        assert allowed(policies, pod(job()), target, 9000)
        assert not allowed(policies, pod(job()), target, 443)


@pytest.mark.parametrize("host", ["minio.storage.svc", "minio.storage.svc.cluster.local"])
def test_s3_in_the_cluster_is_reached_in_its_namespace_alone(host):
    policies, mine = [network_policy(job(), S3Network.at(f"http://{host}:9000"))], pod(job())
    assert allowed(policies, mine, End({"app": "minio"}, namespace="storage"), 9000)
    for other in (OUTSIDE, End({"app": "minio"}, namespace="other")):
        assert not allowed(policies, mine, other, 9000)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"dns": ("names",)}, "--dns-cidr names: "),
        ({"ports": (0,)}, "--s3-port 0"),
        ({"cidrs": ("10.0.0.1/8",)}, "--s3-cidr 10.0.0.1/8: .*host bits"),
        ({"cidrs": ("10.0.0.0",)}, "--s3-cidr 10.0.0.0: .*mask"),
        ({"dns": ("10.0.0.0/255.0.0.0",)}, "--dns-cidr 10.0.0.0/255.0.0.0: .*mask"),
        ({"namespaces": ("Mine",)}, "--s3-namespace: 'Mine'"),
    ],
)
def test_what_is_no_place_is_refused(given, said):
    with pytest.raises(InputError, match=said):
        S3Network(**given)
    with pytest.raises(InputError, match="ZHLLAMA_S3_ENDPOINT=http://s3:x: "):
        S3Network.at("http://s3:x")


def test_it_goes_when_the_jobs_owner_goes_and_lies_where_the_job_lies():
    metadata = network_policy(job(owner=OWNER))["metadata"]
    assert metadata["ownerReferences"] == pytorchjob(job(owner=OWNER))["metadata"]["ownerReferences"]
    assert (metadata["name"], metadata["namespace"]) == ("run-lora-a1", "zhllama")
    assert metadata["labels"]["zhllama.io/stage"] == "lora"
    assert "ownerReferences" not in network_policy(job())["metadata"]


@pytest.mark.parametrize("s3", [None, S3Network(cidrs=("10.0.0.0/8", "2001:db8::/32"), namespaces=("minio",))])
def test_an_api_server_takes_it(s3, tmp_path: Path):
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump(network_policy(job(owner=OWNER), s3)))
    assert check([tmp_path]) == []
