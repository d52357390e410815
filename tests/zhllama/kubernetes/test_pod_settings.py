"""What a cluster asks of a job's pods: from the run's configuration to the pods of both kinds of job, and what is
refused on the way."""

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from components.launch_training.launcher import training_job
from components.launch_training.options import LaunchTraining
from pipelines.configuration import configure
from pipelines.machines import as_json, training_machine
from pipelines.manifests.check.check import check
from pipelines.manifests.render import yaml_of
from pipelines.sizes import STAGES
from tests import recordings
from zhllama.errors import InputError
from zhllama.kubernetes.job_manifest import job_manifest, pod_environment
from zhllama.kubernetes.names import JOB_LABELS
from zhllama.kubernetes.pod_settings import PREFERRED, REQUIRED, pod_settings, required_nodes
from zhllama.kubernetes.training_job import TrainingJob
from zhllama.stage.command_line import parse

ROOT = Path(__file__).resolve().parents[3]
ADDRESSES = ("--store=s3://bucket/s", "--model=s3://bucket/m", "--dataset=s3://bucket/d", "--size=13b")
RACK = "kueue.x-k8s.io/podset-required-topology"
NETWORKS = "k8s.v1.cni.cncf.io/networks"
FABRIC: dict[str, Any] = {
    "labels": {"fabric": "ib"},
    "annotations": {RACK: "cloud.example.com/rack", NETWORKS: "team/rdma"},
    "resources": {"rdma/hca": "1", "vpc.amazonaws.com/efa": 32, "hugepages-2Mi": "5Gi"},
    "environment": {
        "NCCL_IB_HCA": "=mlx5_0,mlx5_1",
        "NCCL_IB_GID_INDEX": 3,
        "WANDB_API_KEY": {"secret": "wandb", "key": "key"},
    },
    "node_affinity": {
        REQUIRED: {
            "nodeSelectorTerms": [{"matchExpressions": [{"key": "gpu", "operator": "In", "values": ["h100", "h200"]}]}]
        },
        PREFERRED: [{"weight": 5, "preference": {"matchExpressions": [{"key": "zone", "operator": "Exists"}]}}],
    },
}


def launched(machine: dict[str, Any], stage: str = "lora") -> TrainingJob:
    """The job that a step makes of what the compiled pipeline tells it."""
    options = parse(LaunchTraining, [*ADDRESSES, f"--stage={stage}", f"--machine={as_json(machine)}"])
    return training_job(options, "key", ("python",), 1)


def of_pipeline(stage: str = "lora", size: str = "13b", files: tuple[Path, ...] = (), **settings: str) -> TrainingJob:
    told = configure(size, {"store": "s3://bucket/store", **settings}, files)
    return launched(training_machine(told, stage), stage)


def templates(manifest: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each pod template of a job, and its container as the operator makes it."""
    spec = manifest["spec"]
    if manifest["kind"] == "TrainJob":
        (patch,) = spec["runtimePatches"]
        (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
        trainer = spec["trainer"]
        yield node["template"]["spec"]["template"], {**trainer, "resources": trainer["resourcesPerNode"]}
        return
    for replica in spec["pytorchReplicaSpecs"].values():
        yield replica["template"], replica["template"]["spec"]["containers"][0]


def findings(tmp_path: Path, *objects: dict[str, Any]) -> list[str]:
    (tmp_path / "job.yaml").write_text(yaml_of(objects))
    return [str(one) for one in check([tmp_path / "job.yaml"], recordings.crds()) if one.level == "error"]


@pytest.mark.parametrize("api", ["pytorchjob", "trainjob"])
def test_a_pipelines_settings_reach_every_pod_of_its_job(api, tmp_path):
    job = of_pipeline(training_pods=json.dumps(FABRIC))
    assert (job.nodes, of_pipeline("sft", training_pods=json.dumps(FABRIC)).pods) == (2, job.pods)
    manifest = job_manifest(job, api)
    assert "annotations" not in manifest["metadata"]
    assert "fabric" not in manifest["metadata"]["labels"]
    for template, container in templates(manifest):
        assert template["metadata"]["annotations"] == FABRIC["annotations"]
        assert template["metadata"]["labels"]["fabric"] == "ib"
        assert template["spec"]["affinity"] == {"nodeAffinity": FABRIC["node_affinity"]}
        for side in ("requests", "limits"):
            asked = {name: container["resources"][side][name] for name in FABRIC["resources"]}
            assert asked == {"rdma/hca": "1", "vpc.amazonaws.com/efa": "32", "hugepages-2Mi": "5Gi"}
        told = {one["name"]: one for one in container["env"]}
        assert len(told) == len(container["env"])
        assert (told["NCCL_IB_HCA"]["value"], told["NCCL_IB_GID_INDEX"]["value"]) == ("=mlx5_0,mlx5_1", "3")
        assert told["WANDB_API_KEY"]["valueFrom"] == {"secretKeyRef": {"name": "wandb", "key": "key"}}
    assert findings(tmp_path, manifest) == []
    assert pod_environment(job, 1, api)["WANDB_API_KEY"] == "(secret wandb, key key)"


def test_labels_of_the_pods_stand_over_those_of_the_job():
    told = {"labels": '{"cost": "a", "of": "job"}', "lora_pods": '{"labels": {"cost": "b"}}'}
    template, _ = next(templates(job_manifest(of_pipeline(**told), "pytorchjob")))
    assert template["metadata"]["labels"].items() >= {"cost": "b", "of": "job"}.items()
    with pytest.raises(InputError, match=r"--set lora_pods: labels: zhllama\.io/team: pods are found by it"):
        of_pipeline(lora_pods='{"labels": {"zhllama.io/team": "x"}}')


def test_a_trainings_own_settings_stand_over_those_for_all():
    mine = {"training_pods": json.dumps(FABRIC), "sft_pods": '{"environment": {"NCCL_DEBUG": "INFO"}}'}
    assert dict(of_pipeline("sft", **mine).pods.environment) == {"NCCL_DEBUG": "INFO"}
    assert of_pipeline("sft", **mine).pods.resources == {}
    assert of_pipeline("lora", **mine).pods.labels == {"fabric": "ib"}


def test_what_is_not_said_is_no_byte_of_a_step():
    assert "pods" not in as_json(training_machine(configure("13b", {"store": "s3://bucket/s"}), "lora"))


@pytest.mark.parametrize("size", ["13b", "33b", "65b"])
@pytest.mark.parametrize("api", ["pytorchjob", "trainjob"])
def test_the_example_with_rdma_passes_the_check_for_every_training(size, api, tmp_path):
    jobs = [of_pipeline(stage, size, (ROOT / "docs" / "rdma.yaml",)) for stage in STAGES]
    for job in jobs:
        assert job.nodes > 1
        assert job.pods.resources == {"rdma/hca": "1"}
    assert findings(tmp_path, *(job_manifest(job, api) for job in jobs)) == []


# --- the right object -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("api", ["pytorchjob", "trainjob"])
def test_annotations_and_labels_land_where_they_are_read(api):
    labels = dict.fromkeys(JOB_LABELS, "gpus") | {"team": "nlp"}
    job = launched({"annotations": {RACK: "r", NETWORKS: "n", "note": "x"}, "labels": labels})
    manifest = job_manifest(job, api)
    assert manifest["metadata"]["annotations"] == {"note": "x"}
    assert labels.items() <= manifest["metadata"]["labels"].items()
    for template, _ in templates(manifest):
        assert template["metadata"]["annotations"] == {RACK: "r", NETWORKS: "n"}
        assert template["metadata"]["labels"]["team"] == "nlp"
        assert not JOB_LABELS.keys() & template["metadata"]["labels"].keys()


# --- what is refused --------------------------------------------------------------------------------------------------

RESERVED = """
PET_NNODES PET_X ZHLLAMA_S3_ENDPOINT ZHLLAMA_ANY AWS_ACCESS_KEY_ID AWS_REGION MASTER_ADDR MASTER_PORT RANK
LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK ROLE_WORLD_SIZE TORCHELASTIC_RUN_ID HOME TMPDIR HF_HOME
TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR HTTPS_PROXY https_proxy NO_PROXY SSL_CERT_FILE REQUESTS_CA_BUNDLE
PYTHONUNBUFFERED PATH PYTHONPATH HF_HUB_OFFLINE TORCH_ELASTIC_SHUTDOWN_TIMEOUT
"""


@pytest.mark.parametrize("name", RESERVED.split())
def test_a_variable_that_the_job_or_a_secret_sets_is_refused_by_name(name):
    with pytest.raises(InputError, match=f"--pods: environment: '{name}': .*(leave it out|secret|ConfigMap)"):
        pod_settings("--pods", {"environment": {name: "x"}})


def test_every_variable_that_a_job_has_is_reserved():
    job = launched({"s3_secret": "zhllama-s3", "proxy_secret": "proxy", "ca_config_map": "ca"})
    for api in ("pytorchjob", "trainjob"):
        for name in pod_environment(job, 0, api):
            with pytest.raises(InputError, match=re.escape(name)):
                pod_settings("--pods", {"environment": {name: "x"}})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_TOKEN", "abc"),
        ("WANDB_API_KEY", "0123"),
        ("MLFLOW_TRACKING_PASSWORD", "x"),
        ("SOME_SECRET", "x"),
        ("NOTE", "hf_abcdefghijklmnopqrstuvwxyz"),
        ("MLFLOW_TRACKING_URI", "https://me:word@mlflow.example.com"),
    ],
)
def test_a_credential_is_refused_with_the_way_to_give_it(name, value):
    with pytest.raises(
        InputError, match=f'{name}.*looks like a credential.*"{name}": {{"secret": "NAME", "key"'
    ) as said:
        pod_settings("--pods", {"environment": {name: value}})
    assert value not in str(said.value).replace(name, "")
    made = pod_settings("--pods", {"environment": {name: {"secret": "mine", "key": "a.b"}}})
    assert made.variables == {name: {"secretKeyRef": {"name": "mine", "key": "a.b"}}}


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "MAX_TOKENS", "HF_TOKEN_PATH", "NCCL_DEBUG", "FI_PROVIDER"])
def test_a_name_that_only_sounds_like_one_is_taken(name):
    assert pod_settings("--pods", {"environment": {name: "x"}}).environment == {name: "x"}


def required(**requirement: Any) -> dict[str, Any]:
    return {"node_affinity": {REQUIRED: {"nodeSelectorTerms": [{"matchExpressions": [requirement]}]}}}


WRONG = {
    "no mapping": (["x"], "write a mapping"),
    "an unknown field": ({"env": {}}, "pods have no 'env' here; use labels, annotations, resources, environment"),
    "a list for a mapping": ({"labels": []}, "labels: .* where a mapping is needed"),
    "a number with a point": ({"environment": {"A": 1.5}}, "A: 1.5 where a text is needed"),
    "a switch": ({"environment": {"A": True}}, "A: True where a text is needed"),
    "no text": ({"annotations": {"a": None}}, "a: None where a text is needed"),
    "a label's value": ({"labels": {"a": "b c"}}, "labels: a: 'b c' must be"),
    "an annotation's key": ({"annotations": {"a b": "c"}}, "annotations: key 'a b' must be"),
    "the queue": ({"labels": {"kueue.x-k8s.io/queue-name": "q"}}, "on the job alone; it is --queue"),
    "the queue as an annotation": ({"annotations": {"kueue.x-k8s.io/queue-name": "q"}}, "it is --queue"),
    "topology as a label": ({"labels": {RACK: "q"}}, "an annotation of pods; put it under annotations"),
    "cpu": ({"resources": {"cpu": "4"}}, "a job has an option for it, --cpu"),
    "half a card": ({"resources": {"rdma/hca": "0.5"}}, "whole numbers, 1 or more"),
    "no card": ({"resources": {"rdma/hca": "0"}}, "whole numbers, 1 or more"),
    "cards with a unit": ({"resources": {"rdma/hca": "1Gi"}}, "whole numbers"),
    "a resource without a domain": ({"resources": {"hca": "1"}}, "no name of a device plugin's resource"),
    "Kubernetes' own domain": ({"resources": {"kubernetes.io/x": "1"}}, "no name of a device plugin's resource"),
    "a resource with a blank": ({"resources": {"rdma/h ca": "1"}}, "no name of a device plugin's resource"),
    "huge pages": ({"resources": {"hugepages-2Mi": "some"}}, "no number of such pages; write a multiple of 2Mi"),
    "a variable with =": ({"environment": {"A=B": "c"}}, "printable ASCII without ="),
    "a Chinese variable": ({"environment": {"变量": "c"}}, "printable ASCII without ="),
    "a variable without a name": ({"environment": {"": "c"}}, "'': is needed"),
    "a zero byte": ({"environment": {"A": "b\0"}}, "zero byte"),
    "half a secret": ({"environment": {"A": {"secret": "x"}}}, "name a secret and its key"),
    "a secret's name": ({"environment": {"A": {"secret": "X Y", "key": "k"}}}, "name a secret and its key"),
    "affinity of pods": ({"node_affinity": {"podAffinity": {}}}, "and nothing else"),
    "no terms": ({"node_affinity": {REQUIRED: {"nodeSelectorTerms": []}}}, "a term or more"),
    "an operator": (required(key="a", operator="Equals", values=["b"]), "operator 'Equals' must be one of In, NotIn"),
    "In of nothing": (required(key="a", operator="In", values=[]), "a: values are needed with In"),
    "Exists of something": (required(key="a", operator="Exists", values=["b"]), "values may not be given with"),
    "Gt of two": (required(key="a", operator="Gt", values=["1", "2"]), "a: values must be one with Gt"),
    "Gt of no number": (required(key="a", operator="Gt", values=["b"]), "a whole number"),
    "the label that finds a job's pods": ({"labels": {"zhllama.io/job": "x"}}, "pods are found by it"),
    "the label of the work": ({"labels": {"zhllama.io/key": "x"}}, "pods are found by it"),
    "a label of the operator": ({"labels": {"training.kubeflow.org/job-name": "x"}}, "pods are found by it"),
    "the label of the stage": ({"labels": {"zhllama.io/stage": "mine"}}, "pods are found by it"),
    "a label of JobSet": ({"labels": {"jobset.sigs.k8s.io/jobset-name": "x"}}, "pods are found by it"),
    "a value that no label has": (required(key="a", operator="In", values=["b c"]), "a: values 'b c' must be"),
    "a number for a value": (required(key="a", operator="In", values=[1]), "write them in quotes"),
    "a key": (required(key="a b", operator="Exists"), "a b: key 'a b': must be"),
    "a weight": ({"node_affinity": {PREFERRED: [{"weight": 0, "preference": {}}]}}, "from 1 to 100"),
    "a field of nodes": (
        {"node_affinity": {REQUIRED: {"nodeSelectorTerms": [{"matchFields": [{"key": "x", "operator": "In"}]}]}}},
        "metadata.name",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("value", "said"), WRONG.values(), ids=WRONG)
def test_what_the_server_would_refuse_is_one_line_before_anything_is_sent(value, said):
    with pytest.raises(InputError, match=f"(?s)^--pods.*{said}") as found:
        pod_settings("--pods", value)
    assert "\n" not in str(found.value)


def test_the_setting_is_named_and_the_step_refuses_it_too():
    wrong = '{"environment": {"RANK": "0"}}'
    with pytest.raises(InputError, match=r"^--set lora_pods: environment: 'RANK'"):
        of_pipeline(lora_pods=wrong)
    with pytest.raises(InputError, match="--pods: environment: 'RANK'"):
        launched({"pods": json.loads(wrong)})
    with pytest.raises(InputError, match=r"nvidia\.com/gpu: it is the job's GPU"):
        of_pipeline(training_pods='{"resources": {"nvidia.com/gpu": 1}}')


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=20)
NAME = st.text("abAB01-_./ =变", max_size=12)
REQUIREMENT = st.fixed_dictionaries(
    {"key": NAME, "operator": st.sampled_from(["In", "NotIn", "Exists", "DoesNotExist", "Gt"])},
    optional={"values": st.lists(NAME, max_size=2)},
)


@settings(max_examples=40)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "labels": st.dictionaries(NAME, NAME, max_size=2),
            "annotations": st.dictionaries(NAME, TEXT, max_size=2),
            "resources": st.dictionaries(NAME, st.sampled_from(["1", "01", "0", "-1", "1k", "x", ""]), max_size=2),
            "environment": st.dictionaries(NAME, TEXT, max_size=2),
            "node_affinity": st.builds(
                lambda terms: {REQUIRED: {"nodeSelectorTerms": terms}},
                st.lists(
                    st.builds(lambda one: {"matchExpressions": one}, st.lists(REQUIREMENT, max_size=2)), max_size=2
                ),
            ),
        },
    )
)
def test_what_is_taken_is_taken_by_the_server_and_the_rest_is_said(value):
    """As the recorded verdicts say it, which the check holds."""
    try:
        job = launched({"pods": value, "gpu_resource": "nvidia.com/gpu"})
    except InputError:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "job.yaml")
        path.write_text(yaml.safe_dump(job_manifest(job, "pytorchjob")), encoding="utf-8")
        assert [str(one) for one in check([path]) if one.level == "error"] == []


def test_nodes_by_their_labels():
    (term,) = required_nodes({"a": ["b", "c"], "d": ["e"]})[REQUIRED]["nodeSelectorTerms"]
    assert [one["values"] for one in term["matchExpressions"]] == [["b", "c"], ["e"]]
