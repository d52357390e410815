"""What the components put to a kustomization, and what the examples beside the base say."""

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import sizes
from pipelines.manifests import render
from pipelines.manifests.check.check import check
from pipelines.manifests.serving import model_server
from tests.k8s.kustomizations import K8S, KUBECTL, Object, build, of_kind
from tests.k8s.test_pods import pods
from zhllama.kubernetes.formats import amount
from zhllama.kubernetes.pods import S3_KEYS, S3_OPTIONAL_KEYS

RDMA = {"NCCL_IB_HCA", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_DEBUG"}


def example(name: str) -> Any:
    return yaml.safe_load((K8S / "base" / name).read_text())


@pytest.fixture
def built_with(tmp_path: Path) -> Callable[..., list[Object]]:
    """What a folder of rendered manifests becomes with a component."""

    def build_with(manifests: str, component: str) -> list[Object]:
        relative = [os.path.relpath(K8S / part, tmp_path) for part in (manifests, f"components/{component}")]
        (tmp_path / "kustomization.yaml").write_text(
            yaml.safe_dump({"resources": relative[:1], "components": relative[1:]})
        )
        done = subprocess.run([KUBECTL, "kustomize", str(tmp_path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (tmp_path / "kustomization.yaml").unlink()
        (tmp_path / "built.yaml").write_text(done.stdout)
        return list(yaml.safe_load_all(done.stdout))

    return build_with


def test_a_job_on_several_nodes_gets_cards_and_nccls_settings_and_keeps_what_it_has():
    sizes_of = [object for size in ("13b", "33b", "65b") for object in build(f"pytorchjob/{size}")]
    before, after = of_kind(sizes_of, "PyTorchJob"), of_kind(build("overlays/training-rdma"), "PyTorchJob")
    assert before.keys() == after.keys()
    for name, job in after.items():
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "zhllama"
        for (_, spec), (_, old) in zip(pods(job), pods(before[name]), strict=True):
            assert spec["nodeSelector"]
            assert spec["tolerations"]
            (container,), (was,) = spec["containers"], old["containers"]
            assert {one["name"] for one in container["env"]} == {one["name"] for one in was["env"]} | RDMA
            for side in ("requests", "limits"):
                assert container["resources"][side] == {**was["resources"][side], "rdma/hca": "1"}
            assert container["image"].startswith("registry.example.com/team/zhllama-")


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_on_openshift_a_job_names_no_user_and_keeps_all_else(built_with, size):
    before = of_kind(build(f"pytorchjob/{size}"), "PyTorchJob")
    for name, job in of_kind(built_with(f"pytorchjob/{size}", "openshift"), "PyTorchJob").items():
        for (_, spec), (_, old) in zip(pods(job), pods(before[name]), strict=True):
            assert old["securityContext"].pop("runAsUser") == 65532
            assert spec == old


ELASTIC = {"nodes": 1, "min_nodes": 1, "max_nodes": 4, "arguments": "--deepspeed none"}


def written(folder: Path, api: str = "pytorchjob", **options: Any) -> Path:
    """A folder with one rendered job, which may have no Master (elastic) or be a TrainJob."""
    addresses = {"model": "s3://team/m", "dataset": "s3://team/d", "store": "s3://team/s"}
    job = render.training_job(sizes.load("7b"), "lora", **addresses, **options)
    folder.mkdir()
    (folder / "job.yaml").write_text(render.as_yaml(job, api))
    (folder / "kustomization.yaml").write_text(render.kustomization(["job.yaml"]))
    return folder


@pytest.mark.parametrize("component", ["openshift", "rdma", "rdma-ipc-lock", "node-pool"])
def test_a_component_serves_an_elastic_job_which_has_workers_alone(built_with, tmp_path, component):
    folder = written(tmp_path / "elastic", **ELASTIC)
    (before,) = of_kind(build(folder), "PyTorchJob").values()
    (after,) = of_kind(built_with(str(folder), component), "PyTorchJob").values()
    assert set(after["spec"]["pytorchReplicaSpecs"]) == {"Worker"}
    (((_, spec),), ((_, old),)) = pods(after), pods(before)
    assert spec != old
    if component == "openshift":
        assert old["securityContext"].pop("runAsUser") == 65532
        assert spec == old


def test_on_openshift_a_trainjob_names_no_user_and_keeps_all_else(built_with, tmp_path):
    folder = written(tmp_path / "trainjob", api="trainjob")
    (before,) = of_kind(build(folder), "TrainJob").values()
    (after,) = of_kind(built_with(str(folder), "openshift"), "TrainJob").values()
    changes = before["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert changes[0]["template"]["spec"]["template"]["spec"]["securityContext"].pop("runAsUser") == 65532
    assert after == before


@pytest.mark.parametrize("component", ["rdma", "node-pool", "rdma-ipc-lock"])
def test_a_job_on_one_node_passes_through_and_gets_no_worker(built_with, component):
    assert sizes.load("7b").embeddings.nodes == 1
    before = of_kind(build("pytorchjob/7b"), "PyTorchJob")["llama-7b-embeddings"]
    after = of_kind(built_with("pytorchjob/7b", component), "PyTorchJob")["llama-7b-embeddings"]
    assert set(after["spec"]["pytorchReplicaSpecs"]) == {"Master"}
    assert (after == before) is (component != "node-pool")


def test_to_lock_memory_is_outside_the_restricted_standard_and_the_check_says_so(built_with, tmp_path):
    built_with("pytorchjob/13b", "rdma-ipc-lock")
    found = [one for one in check([tmp_path / "built.yaml"]) if one.level == "error"]
    assert {one.rule for one in found} == {"restricted"}
    assert all("IPC_LOCK" in one.message for one in found)
    # a Master and a Worker of three jobs
    assert len(found) == 6


def test_the_quota_holds_any_one_training_and_its_served_model(cluster):
    hard = of_kind(cluster, "ResourceQuota")["zhllama"]["spec"]["hard"]
    for size in map(sizes.load, sizes.names()):
        for machine in (size.embeddings, size.lora, size.sft):
            served = size.serving
            for kind, name in (("cpu", "cpu"), ("memory", "memory"), ("ephemeral-storage", "ephemeral_storage")):
                asked = machine.nodes * (amount(getattr(machine, name)) or 0)
                asked += served.replicas * (amount(getattr(served, name)) or 0)
                assert asked <= (amount(hard[f"requests.{kind}"]) or 0), (size.name, kind)
            gpus = machine.nodes * machine.gpus + (served.replicas * served.gpus if served.gpu else 0)
            assert gpus <= int(hard["requests.nvidia.com/gpu"]), size.name


def test_the_example_of_a_cluster_queue_covers_what_any_job_asks_for_and_holds_any_one_of_them():
    """Kueue leaves a job that asks for a resource which is not covered, or for more than there is, waiting for ever."""
    _, queue = yaml.safe_load_all((K8S / "components" / "kueue" / "cluster-queue.example.yaml").read_text())
    (group,) = queue["spec"]["resourceGroups"]
    (flavor,) = group["flavors"]
    there = {one["name"]: amount(one["nominalQuota"]) or 0 for one in flavor["resources"]}
    assert list(there) == group["coveredResources"]
    overlays = [*(f"pytorchjob/{size}" for size in ("7b", "13b", "33b", "65b")), "overlays/training-rdma"]
    for job in (job for name in overlays for job in of_kind(build(name), "PyTorchJob").values()):
        asked: dict[str, float] = {}
        for replica in job["spec"]["pytorchReplicaSpecs"].values():
            (container,) = replica["template"]["spec"]["containers"]
            for kind, value in container["resources"]["requests"].items():
                asked[kind] = asked.get(kind, 0) + replica["replicas"] * (amount(value) or 0)
        assert asked.keys() <= there.keys(), job["metadata"]["name"]
        assert all(asked[kind] <= there[kind] for kind in asked), (job["metadata"]["name"], asked)


def test_a_quota_asks_no_limit_of_pods_that_state_none_and_what_it_asks_has_a_default(cluster):
    hard = of_kind(cluster, "ResourceQuota")["zhllama"]["spec"]["hard"]
    assert not [name for name in hard if name.startswith("limits.")]
    (limits,) = of_kind(cluster, "LimitRange")["zhllama"]["spec"]["limits"]
    assert {"cpu", "memory", "ephemeral-storage"} == set(limits["defaultRequest"])
    assert "default" not in limits


def test_openshift_is_the_same_by_the_component_and_by_the_option():
    server = model_server(sizes.load("13b"), openshift=True)
    (pod,) = [spec for value in build("overlays/serving-openshift") for _, spec in pods(value)]
    assert pod["securityContext"] == server.deployment()["spec"]["template"]["spec"]["securityContext"]


def test_openshift_takes_seaweedfs_as_well(built_with):
    store = of_kind(built_with("dev", "openshift"), "StatefulSet")["seaweedfs"]
    assert set(store["spec"]["template"]["spec"]["securityContext"]) == {"runAsNonRoot", "seccompProfile"}


# --- secrets and settings -------------------------------------------------------------------------------------------


def test_both_examples_of_the_secret_have_the_keys_that_pods_take():
    plain, external = example("s3-secret.example.yaml"), example("s3-external-secret.example.yaml")
    for name, keys in (
        (plain["metadata"]["name"], plain["stringData"]),
        (external["spec"]["target"]["name"], external["spec"]["target"]["template"]["data"]),
    ):
        assert name == "zhllama-s3"
        assert set(S3_KEYS) <= set(keys) <= {*S3_KEYS, *S3_OPTIONAL_KEYS}


def test_kfp_is_told_the_same_secret_by_the_names_that_it_reads():
    """As backend/src/v2/config/s3.go of Kubeflow Pipelines 2.17 reads it."""
    settings = example("kfp-launcher.example.yaml")
    assert settings["metadata"]["name"] == "kfp-launcher"
    assert settings["data"]["defaultPipelineRoot"].startswith("s3://")
    s3 = yaml.safe_load(settings["data"]["providers"])["s3"]["default"]
    assert set(s3) == {"endpoint", "disableSSL", "region", "forcePathStyle", "credentials"}
    assert "://" not in s3["endpoint"]
    assert {type(s3[name]) for name in ("disableSSL", "forcePathStyle")} == {bool}
    assert s3["credentials"] == {
        "fromEnv": False,
        "secretRef": {
            "secretName": "zhllama-s3",
            "accessKeyKey": "AWS_ACCESS_KEY_ID",
            "secretKeyKey": "AWS_SECRET_ACCESS_KEY",
        },
    }


# --- what docs/kubernetes.md shows --------------------------------------------------------------------------------


def test_the_manifests_in_the_docs_are_manifests(tmp_path):
    text = (K8S.parent / "docs" / "kubernetes.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    assert {yaml.safe_load(block)["kind"] for block in blocks} == {"Kustomization", "NetworkPolicy", "ConfigMap"}
    for number, block in enumerate(blocks):
        if yaml.safe_load(block)["kind"] == "Kustomization":
            (tmp_path / "kustomization.yaml").write_text(
                block.replace("../zhllama/k8s", os.path.relpath(K8S, tmp_path))
            )
            built = subprocess.run([KUBECTL, "kustomize", str(tmp_path)], capture_output=True, text=True, check=True)
            objects = list(yaml.safe_load_all(built.stdout))
            subjects = [one for value in of_kind(objects, "RoleBinding").values() for one in value["subjects"]]
            assert {one["namespace"] for one in subjects} == {"team"}
            block = built.stdout
        (tmp_path / f"{number}.yaml").write_text(block)
    assert [str(one) for one in check([tmp_path]) if one.level == "error"] == []


def test_every_component_and_overlay_is_in_the_docs_or_named_by_what_is():
    text = (K8S.parent / "docs" / "kubernetes.md").read_text()
    for folder in (*(K8S / "components").iterdir(), *(K8S / "overlays").iterdir()):
        if folder.name not in ("in-shared-namespace", "job-queue"):
            assert re.search(rf"\b{folder.name}\b", text), folder.name
