"""The rendered jobs are what is in k8s/, fit the operator's schema, and run the training with the size's values."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.finetune.options import Finetune
from components.pretrain.options import Pretrain
from pipelines import sizes
from pipelines.manifests import render
from pipelines.manifests.check.check import check
from tests.recordings import crds
from zhllama.errors import InputError
from zhllama.kubernetes.job_manifest import pytorchjob
from zhllama.stage.command_line import parse

CRDS = crds()
ROOT = Path(__file__).resolve().parents[3]
ADDRESSES = {"model": "s3://bucket/model", "dataset": "s3://bucket/dataset", "store": "s3://bucket/store"}


@pytest.fixture(autouse=True)
def no_registry(monkeypatch):
    for name in ("ZHLLAMA_REGISTRY", "ZHLLAMA_TAG"):
        monkeypatch.delenv(name, raising=False)


def written(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for name in ("pytorchjob", "serving") for path in folder.glob(f"{name}/*/*")}


def test_k8s_holds_what_the_sizes_give():
    kept = {name: (render.FOLDER / name).read_text() for name in written(render.FOLDER)}
    assert kept == render.examples(), "k8s/ is not as pipelines/sizes say; run: zhllama render all"


def test_every_size_with_gpus_has_its_trainings_and_is_served_both_ways():
    """A vocabulary that is kept has no new rows to begin with."""
    extended, kept = ("7b", "13b", "33b", "65b", "mistral-7b"), ("llama3.1-8b", "llama3.2-1b", "qwen2.5-7b", "qwen3-8b")
    jobs = dict.fromkeys(extended, sizes.STAGES) | dict.fromkeys(kept, sizes.STAGES[1:])
    wanted = {f"pytorchjob/{size}/{name}.yaml" for size in jobs for name in (*jobs[size], "kustomization")}
    wanted |= {f"serving/{size}/{name}.yaml" for size in jobs for name in ("vllm", "kserve", "kustomization")}
    assert set(render.examples()) == wanted


def test_no_example_needs_prometheus_operator() -> None:
    assert not [name for name, text in render.examples().items() if "PodMonitor" in text]


def test_the_jobs_pass_the_check():
    found = check([render.FOLDER / "pytorchjob"], CRDS)
    assert [str(finding) for finding in found if finding.level == "error"] == []
    assert "no-schema" not in {finding.rule for finding in found}


def container(job: dict[str, Any], replica: str = "Master") -> dict[str, Any]:
    (found,) = job["spec"]["pytorchReplicaSpecs"][replica]["template"]["spec"]["containers"]
    return found


@pytest.mark.parametrize("stage", sizes.STAGES)
@pytest.mark.parametrize("name", ["tiny", "7b", "65b"])
def test_the_command_is_the_trainings_own_with_the_sizes_values(name, stage):
    size = sizes.load(name)
    machine = size.training(stage)
    job = pytorchjob(render.training_job(size, stage, **ADDRESSES))
    words = container(job)["command"]
    config = parse(Finetune if stage == "sft" else Pretrain, words[3:])
    assert (config.model, config.dataset, config.store) == tuple(ADDRESSES.values())
    assert (config.max_steps, config.learning_rate) == (machine.steps, machine.learning_rate)
    assert (
        config.per_device_train_batch_size * config.gradient_accumulation_steps * machine.processes
        == machine.global_batch
    )
    assert getattr(config, "stage", "sft") == stage
    assert sum(spec["replicas"] for spec in job["spec"]["pytorchReplicaSpecs"].values()) == machine.nodes


def test_what_is_asked_for_is_in_the_job():
    size = sizes.load("7b")
    job = pytorchjob(
        render.training_job(
            size, "lora", **ADDRESSES, name="mine", namespace="team", queue="gpus", arguments="--lora-r 64"
        )
    )
    assert (job["metadata"]["name"], job["metadata"]["namespace"]) == ("mine", "team")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert parse(Pretrain, container(job)["command"][3:]).lora_r == 64


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"arguments": "--lora-rr 64"},
            r"components\.pretrain: there is no option --lora-rr \(did you mean --lora-r\?\)",
        ),
        ({"arguments": "--seed 'x"}, "--arguments --seed 'x: No closing quotation"),
        ({"name": "Not A Name"}, "job name 'Not A Name'"),
    ],
)
def test_a_wrong_option_is_refused(arguments, said):
    with pytest.raises(InputError, match=said):
        render.training_job(sizes.load("7b"), "lora", **ADDRESSES, **arguments)


def test_an_unknown_stage_names_the_nearest():
    with pytest.raises(InputError, match=r"no training stage 'loras' \(did you mean lora\?\)"):
        render.training_job(sizes.load("7b"), "loras", **ADDRESSES)


def rendered(*words: str) -> "subprocess.CompletedProcess[str]":
    given = [word for name, value in ADDRESSES.items() for word in (f"--{name}", value)]
    return zhllama("render", "pytorchjob", "--size", "13b", "--stage", "lora", *given, *words)


def test_a_job_comes_with_its_network_policy_and_goes_where_it_is_told_to():
    done = rendered(
        *("--namespace", "team", "--queue", "gpus", "--priority-class", "low", "--pull-secret", "registry"),
        *("--node-selector", "pool=gpu", "--toleration", "nvidia.com/gpu:NoSchedule", "--toleration", "kind=a100"),
        *("--label", "team=nlp", "--annotation", "note=a b=c", "--grace-seconds", "900", "--s3-secret", "mine"),
        *("--proxy-secret", "proxy", "--ca-config-map", "authorities"),
        *("--s3-cidr", "10.20.0.0/16", "--s3-namespace", "minio", "--s3-port", "9000"),
    )
    assert done.returncode == 0, done.stderr
    job, policy = yaml.safe_load_all(done.stdout)
    template = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    selector = policy["spec"]["podSelector"]["matchLabels"]
    assert selector.items() <= template["metadata"]["labels"].items()
    assert {value["metadata"]["namespace"] for value in (job, policy)} == {"team"}
    assert job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "low"
    assert job["metadata"]["annotations"] == {"note": "a b=c"}
    assert template["metadata"]["labels"]["team"] == "nlp"
    assert template["spec"]["terminationGracePeriodSeconds"] == 900
    (container,) = template["spec"]["containers"]
    mounted = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
    volumes = {one["name"]: one for one in template["spec"]["volumes"]}
    named = {path: {one["secret"]["name"] for one in volumes[name]["projected"]["sources"]}
             for path, name in mounted.items() if "projected" in volumes[name]}  # fmt: skip
    assert named == {"/etc/zhllama-s3": {"mine"}, "/etc/zhllama-proxy": {"proxy"}}
    assert template["spec"]["nodeSelector"] == {"pool": "gpu"}
    assert template["spec"]["imagePullSecrets"] == [{"name": "registry"}]
    assert template["spec"]["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "kind", "operator": "Equal", "value": "a100"},
    ]
    assert volumes.keys() == {"tmp", "shm", "ca", "s3-secret", "proxy-secret"}
    *_, s3 = policy["spec"]["egress"]
    assert s3 == {
        "to": [
            {"ipBlock": {"cidr": "10.20.0.0/16"}},
            {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "minio"}}},
        ],
        "ports": [{"protocol": "TCP", "port": 9000}],
    }


@pytest.mark.slow
def test_without_a_secret_pods_have_their_accounts_own_identity():
    for words in (
        ["pytorchjob", "--stage", "lora", "--dataset", "s3://bucket/d", "--store", "s3://bucket/s"],
        ["serving"],
    ):
        done = zhllama("render", *words, "--size", "13b", "--model", "s3://bucket/m", "--s3-secret", "none")
        assert done.returncode == 0, done.stderr
        assert "zhllama-s3" not in done.stdout
        assert "AWS_SECRET_ACCESS_KEY" not in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--node-selector", "pool"], "--node-selector pool: write KEY=VALUE"),
        (["--label", "=x"], "--label =x: write KEY=VALUE"),
        (["--toleration", "gpu:Never"], "--toleration gpu:Never: write KEY"),
        (["--toleration", "a b"], "--toleration a b: key: 'a b' must be letters, digits"),
        (["--s3-port", "http"], "--s3-port http: a port is a number"),
        (["--s3-cidr", "10.0.0.1/8"], "--s3-cidr 10.0.0.1/8: "),
        (["--s3-namespace", "My_S3"], "--s3-namespace: 'My_S3' must be lower-case letters"),
        (["--namespace", "Team_A"], "--namespace: 'Team_A' must be lower-case letters"),
        (["--pull-secret", "my secret"], "--pull-secret: 'my secret' must be lower-case letters"),
        (["--s3-secret", "Mine"], "--s3-secret: 'Mine' must be lower-case letters"),
        (["--queue", "gpu_queue"], "--queue: 'gpu_queue' must be lower-case letters"),
        (["--priority-class", "high"], "--priority-class high: it is Kueue's, which asks for a --queue too"),
        (["--label", "team=a b"], "--label: team: 'a b' must be"),
        (["--annotation", "a b=c"], "--annotation: key 'a b' must be"),
        (["--node-selector", "pool=a b"], "--node-selector: pool: 'a b' must be"),
        (["--grace-seconds", "0"], "--grace-seconds: 0 must be between 1 and"),
        (["--model", "models/zh"], "--model models/zh: pods of a cluster reach S3 alone"),
        (["--store", "s3://b/store"], "s3://b/store: not a bucket name"),
        (["--registry", "https://r.example.com"], "--registry: 'https://r.example.com' is no registry"),
        (["--registry", "Reg/x"], "--registry: 'Reg/x' is no registry; write a host and a path in lower case"),
        (["--toleration", "a=b/c:NoSchedule"], "--toleration a=b/c:NoSchedule: value: 'b/c' must be"),
        (["--tag", "of today"], "--tag: 'of today' is no tag: letters, digits"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_meant_is_refused_in_one_line_and_nothing_is_written(words, said):
    done = rendered(*words)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert said in done.stderr


@pytest.mark.parametrize("names", [("model", "dataset", "store"), ("model", "data", "output")], ids="-".join)
def test_the_command_writes_a_manifest_to_standard_output(names):
    words = ["render", "pytorchjob", "--size", "13b", "--stage", "sft", "--registry", "r.example.com/t", "--tag", "2"]
    words += [word for name, value in zip(names, ADDRESSES.values(), strict=True) for word in (f"--{name}", value)]
    ended = subprocess.run([sys.executable, "-m", "pipelines", *words], capture_output=True, text=True, check=True)
    assert container(next(yaml.safe_load_all(ended.stdout)))["image"] == "r.example.com/t/zhllama-finetune:2"


def test_examples_of_a_size_that_is_no_more_are_taken_away(tmp_path):
    (tmp_path / "pytorchjob" / "9b").mkdir(parents=True)
    (tmp_path / "pytorchjob" / "9b" / "lora.yaml").touch()
    render.write_examples(tmp_path)
    assert written(tmp_path) == set(render.examples())


def zhllama(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "pipelines", *words], capture_output=True, text=True, cwd=ROOT)


def test_a_trainjob_is_rendered_and_what_it_loses_is_said_beside_it(tmp_path):
    given = [word for name, value in ADDRESSES.items() for word in (f"--{name}", value)]
    done = zhllama("render", "pytorchjob", "--size", "13b", "--stage", "lora", *given, "--api", "trainjob")
    assert done.returncode == 0, done.stderr
    assert [one["kind"] for one in yaml.safe_load_all(done.stdout)] == ["TrainJob", "NetworkPolicy"]
    assert "not in a TrainJob: ttlSecondsAfterFinished" in done.stderr
    (tmp_path / "job.yaml").write_text(done.stdout)
    assert {finding.rule for finding in check([tmp_path])} == {"no-schema"}


def test_an_elastic_job_is_refused_with_zero_and_rendered_without():
    more = {"min_nodes": 1, "max_nodes": 4}
    with pytest.raises(InputError, match="checkpoints belong to one number of processes"):
        render.training_job(sizes.load("13b"), "lora", **ADDRESSES, **more)
    for arguments in ("--deepspeed none", "--deepspeed=none"):
        job = render.training_job(sizes.load("13b"), "lora", **ADDRESSES, **more, arguments=arguments)
        assert pytorchjob(job)["spec"]["elasticPolicy"]["maxReplicas"] == 4


@pytest.mark.slow
def test_the_environment_of_a_node_is_printed():
    done = zhllama("env", "--size", "13b", "--node", "1")
    assert done.returncode == 0, done.stderr
    printed = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert (printed["RANK"], printed["WORLD_SIZE"]) == ("1", "16")
    assert printed["AWS_SECRET_ACCESS_KEY"].startswith("(secret ")
    assert zhllama("env", "--size", "13b", "--node", "2").returncode == 2


@pytest.mark.slow
def test_the_environment_of_a_trainjobs_node_is_its_operators_and_the_containers():
    done = zhllama("env", "--size", "13b", "--node", "1", "--api", "trainjob")
    assert done.returncode == 0, done.stderr
    printed = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert (printed["PET_NODE_RANK"], printed["PET_MASTER_PORT"]) == ("1", "29500")
    assert not {"RANK", "WORLD_SIZE"} & set(printed)
    assert printed["HOME"] == "/tmp"
    assert printed["AWS_SECRET_ACCESS_KEY"].startswith("(secret ")
    elastic = ("--min-nodes", "1", "--max-nodes", "4", "--arguments", "--deepspeed none")
    refused = zhllama("env", "--size", "13b", "--api", "trainjob", *elastic)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)


def test_what_else_the_pods_have_is_said_by_options_or_at_once(tmp_path):
    done = rendered(
        *("--pods", '{"environment": {"NCCL_DEBUG": "WARN"}, "resources": {"rdma/hca": 1}}'),
        *("--env", "NCCL_DEBUG=INFO", "--env", "NCCL_IB_HCA==mlx5_0", "--resource", "hugepages-2Mi=4Gi"),
        *("--pod-label", "fabric=ib", "--pod-annotation", "sidecar.example.com/x=a b"),
        *("--annotation", "k8s.v1.cni.cncf.io/networks=team/rdma", "--annotation", "note=x"),
        *("--node-affinity", "gpu=h100,h200"),
    )
    assert done.returncode == 0, done.stderr
    job, _ = yaml.safe_load_all(done.stdout)
    assert job["metadata"]["annotations"] == {"note": "x"}
    for role in ("Master", "Worker"):
        template = job["spec"]["pytorchReplicaSpecs"][role]["template"]
        networks = {"k8s.v1.cni.cncf.io/networks": "team/rdma"}
        assert template["metadata"]["annotations"] == {**networks, "sidecar.example.com/x": "a b"}
        assert template["metadata"]["labels"]["fabric"] == "ib"
        told = {one["name"]: one.get("value") for one in container(job, role)["env"]}
        assert (told["NCCL_DEBUG"], told["NCCL_IB_HCA"]) == ("INFO", "=mlx5_0")
        asked = container(job, role)["resources"]["limits"]
        assert (asked["rdma/hca"], asked["hugepages-2Mi"]) == ("1", "4Gi")
        (terms,) = template["spec"]["affinity"]["nodeAffinity"].values()
        (expression,) = terms["nodeSelectorTerms"][0]["matchExpressions"]
        assert expression == {"key": "gpu", "operator": "In", "values": ["h100", "h200"]}
    (tmp_path / "job.yaml").write_text(done.stdout)
    assert [str(one) for one in check([tmp_path], CRDS) if one.level == "error"] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--env", "RANK=0"], "--env: environment: 'RANK': the job sets it"),
        (["--env", "HF_TOKEN=x"], "--env: environment: 'HF_TOKEN': it looks like a credential"),
        (["--env", "NCCL"], "--env NCCL: write KEY=VALUE"),
        (["--resource", "rdma/hca=1Gi"], "--resource: resources: rdma/hca: '1Gi'"),
        (["--pod-label", "a=b c"], "--pod-label: labels: a: 'b c' must be"),
        (["--pod-annotation", "a b=c"], "--pod-annotation: annotations: key 'a b' must be"),
        (["--node-affinity", "a=b c"], "--node-affinity: node_affinity: requiredDuringScheduling"),
        (["--pods", "{"], "--pods {: not JSON"),
    ],
)
def test_a_wrong_setting_of_pods_names_its_option(words, said):
    done = rendered(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {said}")
    assert len(done.stderr.splitlines()) == 1
