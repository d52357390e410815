"""`zhllama status` and `--wait` on runs that real servers recorded: what is printed, whole, and how they end."""

import base64
import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.kubeflow.workflow import Unreadable, last_line, last_words, nodes_of, steps_of
from tests.kubernetes_server import KubernetesServer
from tests.pipelines.kubeflow.fake_kfp import FakeKfp, recorded
from zhllama.kubernetes.pod_state import pending_reason

ROOT = Path(__file__).resolve().parents[3]
GOLDENS = ROOT / "tests" / "goldens" / "status"
NAMES = [
    "cancelled", "driver-failed", "driver-failed-small", "flat-again-reused", "flat-succeeded",
    "image-not-pulled-cancelled", "nested-succeeded-frozen-details", "step-exit-2-failed-frozen",
]  # fmt: skip
TITLES = {
    "launch-training": "train_embeddings", "launch-training-2": "train_lora", "launch-training-3": "train_sft",
    "prepare-dataset": "prepare_text", "prepare-dataset-2": "prepare_instructions", "merge-adapters": "merge_lora",
    "merge-adapters-2": "merge_sft", "merge-adapters-3": "merge_both", "cleanup-training": "cleanup_training",
}  # fmt: skip
"""What the recorded flat pipeline called its tasks."""
OF_THE_FLAT_PIPELINE = ("cancelled", "flat-again-reused", "flat-succeeded")
RESOLVED = 'failed to resolve input parameters: parameter "max_positions" not found in executor input'


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[KubernetesServer]:
    with KubernetesServer("kubeflow") as started:
        started.kubeconfig(tmp_path / "kubeconfig")
        yield started


def run_of(server: FakeKfp, name: str) -> str:
    """The id of a recorded run, which the server answers for from now on."""
    body = recorded(f"run-{name}")["body"]
    server.runs[body["run_id"]] = body
    server.titles = TITLES if name in OF_THE_FLAT_PIPELINE else {}
    return str(body["run_id"])


def workflow_of(cluster: KubernetesServer, name: str) -> dict[str, Any]:
    """A recorded run's Workflow, in the cluster as Argo keeps it: its nodes compressed where they were."""
    value = recorded(f"workflow-{name}")
    nodes = {node["id"]: node for node in value["nodes"]}
    status: dict[str, Any] = {"phase": value["phase"], "message": value["message"]}
    if value["compressed"]:
        status["compressedNodes"] = base64.b64encode(gzip.compress(json.dumps(nodes).encode())).decode()
    else:
        status["nodes"] = nodes
    workflow = {"kind": "Workflow", "metadata": dict(value["metadata"]), "spec": {}, "status": status}
    cluster.put(f"/apis/argoproj.io/v1alpha1/namespaces/kubeflow/workflows/{value['metadata']['name']}", workflow)
    return workflow


def put_pod(cluster: KubernetesServer, workflow: str, node: str, status: dict[str, Any], *log: str) -> None:
    metadata = {
        "name": f"{workflow}-x", "namespace": "kubeflow", "labels": {"workflows.argoproj.io/workflow": workflow},
        "annotations": {"workflows.argoproj.io/node-id": node},
    }  # fmt: skip
    path = f"/api/v1/namespaces/kubeflow/pods/{workflow}-x"
    cluster.put(path, {"kind": "Pod", "metadata": metadata, "status": status})
    cluster.write_log(f"{workflow}-x", *log)


def zhllama(server: FakeKfp, kubeconfig: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "pipelines", *words, "--host", server.host]
    environment = {**os.environ, "KUBECONFIG": str(kubeconfig)}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=environment, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_status_prints_a_recorded_run_whole(name, server, cluster, tmp_path):
    workflow_of(cluster, name)
    done = zhllama(server, tmp_path / "kubeconfig", "status", run_of(server, name))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert [line.rstrip() for line in done.stdout.splitlines()] == (GOLDENS / f"{name}.txt").read_text().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code", "last"),
    [
        ("flat-succeeded", 0, "cleanup_training: succeeded"),
        ("nested-succeeded-frozen-details", 0, "cleanup_training: succeeded"),
        ("cancelled", 143, "cancelled: the run was cancelled"),
        ("image-not-pulled-cancelled", 143, "cancelled: the run was cancelled"),
        ("step-exit-2-failed-frozen", 2, "error: train_tokenizer: --text s3://zhllama/uploads/text: the text's"),
        ("driver-failed-small", 1, "fault: hello: "),
    ],
)
def test_waiting_ends_as_the_run_did(name, code, last, server, cluster, tmp_path):
    workflow_of(cluster, name)
    done = zhllama(server, tmp_path / "kubeconfig", "status", run_of(server, name), "--wait")
    assert done.returncode == code, done.stderr
    assert last in done.stderr.splitlines()[-1]


SUBMIT = ["submit", "--size", "7b", "--wait"]
for setting in ("store=s3://bucket/b", "weights=s3://a/w", "text=s3://a/t", "instructions=s3://a/i"):
    SUBMIT += ["--set", setting]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code", "last"),
    [
        ("flat-succeeded", 0, "cleanup_training: succeeded"),
        ("step-exit-2-failed-frozen", 2, "error: train_tokenizer: --text s3://zhllama/uploads/text: the text's"),
        ("cancelled", 143, "cancelled: the run was cancelled"),
    ],
)
def test_submit_waits_and_ends_as_the_run_that_it_started(name, code, last, server, cluster, tmp_path):
    server.runs["r-42"] = {**recorded(f"run-{name}")["body"], "run_id": "r-42"}
    workflow_of(cluster, name)["metadata"]["labels"] = {"pipeline/runid": "r-42"}
    done = zhllama(server, tmp_path / "kubeconfig", *SUBMIT)
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines()[0] == f"{server.host}/#/runs/details/r-42"
    assert last in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_submit_says_that_its_run_was_deleted(server, tmp_path):
    server.course = []
    done = zhllama(server, tmp_path / "none", *SUBMIT)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "fault: the run was deleted (r-42)"


@pytest.mark.slow
def test_a_drivers_words_come_from_its_pods_log(server, cluster, tmp_path):
    workflow = workflow_of(cluster, "driver-failed")["metadata"]["name"]
    nodes = recorded("workflow-driver-failed")["nodes"]
    (driver,) = [node for node in nodes if node["displayName"] == "convert-weights-driver(0)"]
    log = [f"F1129 01:41:54.000000      12 main.go:127] KFP driver: {RESOLVED}", "level=INFO argo=true error=exit"]
    put_pod(cluster, workflow, driver["id"], {"phase": "Failed"}, *log)
    done = zhllama(server, tmp_path / "kubeconfig", "status", run_of(server, "driver-failed"), "--wait")
    assert done.returncode == 1
    assert RESOLVED in done.stderr.splitlines()[-1]
    assert "fault: convert_weights: " in done.stderr.splitlines()[-1]


def test_a_step_whose_component_has_its_own_name_is_called_by_it_without_a_specification():
    text = json.dumps({node["id"]: node for node in recorded("workflow-flat-succeeded")["nodes"]})
    nodes = json.loads(text.replace("launch-training-2", "train-lora"))
    steps = {step.task: step for step, _ in steps_of(nodes, {})}
    assert steps["train-lora"].name == "train_lora"
    assert steps["train-lora"].state == "SUCCEEDED"
    assert not [task for task in steps if re.search(r"\(|driver|executor|root|exit-handler|condition", task)]


@pytest.mark.slow
def test_without_a_kubeconfig_it_says_what_would_be_needed(server, tmp_path):
    done = zhllama(server, tmp_path / "none", "status", run_of(server, "step-exit-2-failed-frozen"))
    assert done.returncode == 0
    said, verdict = done.stdout.splitlines()[-2:]
    assert verdict == "fault: the run failed"
    assert "list workflows.argoproj.io, list pods and get pods/log in the namespace kubeflow" in said
    assert "the run" in done.stdout
    assert "running" not in done.stdout


@pytest.mark.slow
def test_a_right_that_is_missing_is_said_with_the_servers_words(server, cluster, tmp_path):
    cluster.fault = lambda method, path: 403 if "workflows" in path else None
    done = zhllama(server, tmp_path / "kubeconfig", "status", run_of(server, "driver-failed-small"))
    said, verdict = done.stdout.splitlines()[-2:]
    assert "list workflows.argoproj.io" in said
    assert "403" in said
    assert verdict == "fault: hello: failed"


@pytest.mark.slow
def test_an_image_that_cannot_be_pulled_is_said_while_the_step_waits(server, cluster, tmp_path):
    body = recorded("run-image-not-pulled-cancelled")["body"]
    server.runs[body["run_id"]] = {**body, "state": "RUNNING", "state_history": [], "finished_at": None}
    workflow = workflow_of(cluster, "image-not-pulled-cancelled")
    nodes = {node["id"]: dict(node) for node in recorded("workflow-image-not-pulled-cancelled")["nodes"]}
    for node in nodes.values():
        if node["name"].endswith(".fetch-weights(0).executor(0)"):
            node["phase"], pod = "Pending", node["id"]
            node.pop("message")
        elif node["phase"] == "Failed":
            node["phase"] = "Running"
    workflow["status"] = {"phase": "Running", "nodes": nodes}
    waiting = {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "zhllama-fetch-weights:0.1.0"'}
    status = {"phase": "Pending", "containerStatuses": [{"name": "main", "state": {"waiting": waiting}}]}
    put_pod(cluster, workflow["metadata"]["name"], pod, status)
    done = zhllama(server, tmp_path / "kubeconfig", "status", body["run_id"])
    assert 'fetch_weights waits: ImagePullBackOff: Back-off pulling image "zhllama-fetch-weights:0.1.0"' in done.stdout


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("main: Error (exit code 1): error: --text x: mend it\n", "error: --text x: mend it"),
        ("main: Error (exit code 1): a line\nfault: the store is away\n", "fault: the store is away"),
        ("main: Error (exit code 143)", ""),
        ("OOMKilled (exit code 137)", "OOMKilled (exit code 137)"),
        ("Step exceeded its deadline", "Step exceeded its deadline"),
    ],
)
def test_a_nodes_message_is_the_steps_own_line(message, words):
    assert last_words(message) == words


def test_a_log_ends_with_the_containers_own_line():
    assert last_line("one\nF1129 01:41:54.0      12 main.go:127] two\nlevel=INFO argo=true\n\n") == "two"
    assert last_line("") == ""


def test_nodes_that_are_elsewhere_or_damaged_are_said():
    with pytest.raises(Unreadable, match="offloaded"):
        nodes_of({"offloadNodeStatusVersion": "fnv:1"})
    whole = gzip.compress(b'{"node": {"phase": "Succeeded"}}')
    for damaged in (b"not gzip", whole[:-9], whole[:10] + b"\x07" * 40, gzip.compress(b"[1]"), gzip.compress(b"{")):
        with pytest.raises(Unreadable, match="damaged"):
            nodes_of({"compressedNodes": base64.b64encode(damaged).decode()})
    with pytest.raises(Unreadable, match="damaged"):
        nodes_of({"compressedNodes": "no base64"})


def test_a_pod_that_cannot_be_placed_says_so_and_one_that_starts_nothing():
    unplaced = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/9 nodes"}
    assert pending_reason({"status": {"conditions": [unplaced]}}) == "Unschedulable: 0/9 nodes"
    assert (
        pending_reason({"status": {"containerStatuses": [{"state": {"waiting": {"reason": "PodInitializing"}}}]}}) == ""
    )
