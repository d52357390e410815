"""A deployment against an API server and a vLLM of the tests' own: it stands and answers, or all is as it was."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from components.serve.check import checked
from components.serve.cluster import as_it_was
from components.serve.deploy import deploy, server_of
from components.serve.options import Serve
from tests.components.serve.controllers import READY, pod, replica_set, stands
from tests.fake_engine import FakeEngine
from tests.kubernetes_server import KubernetesServer
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError, StorageFault
from zhllama.tokenizer.prompt import RECIPE
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder

KEY = "a-key-for-the-tests-only"
CHAT = "/v1/chat/completions"


@pytest.fixture
def engine(llama_tokenizer: bytes) -> Iterator[FakeEngine]:
    with FakeEngine(SentencePieceEncoder(llama_tokenizer), api_key=KEY) as made:
        yield made


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesServer]:
    monkeypatch.setenv("ZHLLAMA_API_KEY", KEY)
    # the retries' own waits are no part of these tests
    monkeypatch.setattr("zhllama.kubernetes.api.FIRST_WAIT", 0.0)
    with KubernetesServer() as server:
        server.on_apply = roll_out(server)
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig")))
        yield server


@pytest.fixture
def model(s3_store: str, tiny_model: str) -> str:
    """The tiny model in S3."""
    out = ArtifactWriter(s3_store, "merge_adapters", "key")
    source = open_artifact(tiny_model)
    for name in source.names:
        if name != source.manifest.blocks:
            out.copy(source, name)
    out.vocabulary = source.manifest.vocabulary
    return out.publish("hf-model").reference


def roll_out(
    server: KubernetesServer, other: Callable[[dict[str, Any]], None] | None = None
) -> Callable[[dict[str, Any]], None]:
    """Deployments come to stand; the first one as `other` does, where that is given."""
    seen: list[str] = []

    def operate(thing: dict[str, Any]) -> None:
        if thing["kind"] not in ("Deployment", "InferenceService"):
            return
        seen.append(thing["metadata"]["name"])
        if other is not None and len(seen) == 1:
            other(thing)
        else:
            stands(server, thing)

    return operate


def asked(model: str, engine: FakeEngine, kind: str = "kubernetes", **more: Any) -> Serve:
    return Serve(model=model, deploy=kind, address=engine.address, **more)  # type: ignore[arg-type]


def state_of(server: KubernetesServer) -> dict[str, Any]:
    """Every object that is there, as it can be compared: without what the server counts."""
    return {
        path: as_it_was(thing) for path, thing in server.objects.items() if thing["kind"] not in ("Pod", "ReplicaSet")
    }


# --- it stands --------------------------------------------------------------------------------------------------------


def test_a_deployment_stands_and_is_tried_through_its_api(
    cluster: KubernetesServer, engine: FakeEngine, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference, output = tmp_path / "ref", tmp_path / "tried.json"
    more = {"reference": str(reference), "output": str(output), "vllm_image": "r.example.com/vllm:1"}
    assert deploy(asked(model, engine, **more)) == "http://zhllama.team.svc:8000"
    assert reference.read_text() == "http://zhllama.team.svc:8000"
    tried = json.loads(output.read_text())
    assert (tried["address"], tried["name"], tried["model"]) == (reference.read_text(), "zhllama", model)
    assert [sorted(answer) for answer in tried["answered"]] == [["Input", "Output"]] * 2
    assert all(answer["Output"] for answer in tried["answered"])
    assert sorted(thing["kind"] for thing in cluster.objects.values()) == [
        "Deployment", "NetworkPolicy", "Pod", "PodMonitor", "ReplicaSet", "Service",
    ]  # fmt: skip
    spec = cluster.of_kind("Deployment")["zhllama"]["spec"]["template"]["spec"]
    assert spec["containers"][0]["image"] == "r.example.com/vllm:1"
    assert spec["containers"][0]["args"][0] == model.removesuffix("manifest.json")
    assert spec["initContainers"][0]["args"][:2] == ["--model", model]
    encoded = [body for path, body in engine.seen if path == "/tokenize" and body]
    assert {"model": "zhllama", "prompt": "你好，世界！今天天气不错。"} in encoded
    assert [path for path, _ in engine.seen].count(CHAT) == 2
    assert "http://zhllama.team.svc:8000/v1 answers" in capsys.readouterr().out
    assert spec["securityContext"]["runAsUser"] == 65532
    # no secret is made, read or sent to the API server
    assert not [path for _, path in cluster.requests if "secrets" in path]
    assert KEY not in json.dumps(cluster.objects)


def test_on_openshift_its_pods_name_no_user() -> None:
    made = server_of(Serve(model="s3://bucket/m", deploy="kubernetes", openshift=True)).deployment()
    assert set(made["spec"]["template"]["spec"]["securityContext"]) == {"runAsNonRoot", "seccompProfile"}


@pytest.mark.parametrize("kind", ["kubernetes", "kserve"])
def test_from_outside_the_cluster_it_is_tried_through_the_api_server(
    cluster: KubernetesServer, engine: FakeEngine, model: str, kind: str
) -> None:
    host, _, port = engine.address.removeprefix("http://").partition(":")
    cluster.forward_to = (host, int(port))
    deploy(Serve(model=model, deploy=kind))  # type: ignore[arg-type]
    (name,) = cluster.of_kind("Pod")
    assert ("GET", f"/api/v1/namespaces/team/pods/{name}/portforward") in cluster.requests
    assert [path for path, _ in engine.seen].count(CHAT) == 2


def test_a_pod_that_cannot_be_forwarded_to_is_taken_back(
    cluster: KubernetesServer, engine: FakeEngine, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.serve.smoke.REACHED_WITHIN", 0.5)
    cluster.fault = lambda method, path: 403 if path.endswith("portforward") else None
    with pytest.raises(StorageFault, match="/v1/models"):
        deploy(Serve(model=model, deploy="kubernetes"))
    assert not state_of(cluster)


def forward_to(cluster: KubernetesServer, engine: FakeEngine) -> None:
    host, _, port = engine.address.removeprefix("http://").partition(":")
    cluster.forward_to = (host, int(port))


def forwarded(cluster: KubernetesServer) -> list[str]:
    """Names of the pods that were asked through the API server, each once."""
    paths = [path for _, path in cluster.requests if path.endswith("/portforward")]
    return list(dict.fromkeys(path.split("/")[-2] for path in paths))


def leave_old_pods_terminating(cluster: KubernetesServer) -> Callable[[dict[str, Any]], None]:
    """As a rolling update does: counted no more, the pods of before are Ready until they have ended."""

    def operate(thing: dict[str, Any]) -> None:
        if thing["kind"] in ("Deployment", "InferenceService"):
            before = cluster.of_kind("Pod")
            stands(cluster, thing)
            for name in set(before) - set(cluster.of_kind("Pod")):
                before[name]["metadata"]["deletionTimestamp"] = "2026-01-01T00:01:00Z"
                cluster.put(f"/api/v1/namespaces/team/pods/{name}", before[name])

    return operate


@pytest.mark.parametrize("kind", ["kubernetes", "kserve"])
def test_after_a_change_of_labels_alone_a_new_pod_is_tried_and_not_the_old_one_that_still_is_ready(
    cluster: KubernetesServer, engine: FakeEngine, model: str, kind: Any
) -> None:
    forward_to(cluster, engine)
    cluster.on_apply = leave_old_pods_terminating(cluster)
    deploy(Serve(model=model, deploy=kind))
    (old,) = cluster.of_kind("Pod")
    deploy(Serve(model=model, deploy=kind, labels='{"team": "nlp"}'))
    assert old in cluster.of_kind("Pod")
    versions = {one["metadata"]["labels"]["zhllama.io/version"] for one in cluster.of_kind("Pod").values()}
    assert len(versions) == 1
    (_, new) = forwarded(cluster)
    assert new != old
    assert cluster.of_kind("Pod")[new]["metadata"]["labels"]["team"] == "nlp"


def test_a_pod_that_goes_before_it_is_reached_is_followed_by_another(
    cluster: KubernetesServer, engine: FakeEngine, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    forward_to(cluster, engine)
    first = threading.Event()

    def gone(method: str, path: str) -> None:
        if path.endswith("/portforward") and not first.is_set():
            first.set()
            cluster.delete(path.removesuffix("/portforward"))
            pod(cluster, next(iter(cluster.of_kind("ReplicaSet").values())), READY, "b")

    cluster.fault = gone
    deploy(Serve(model=model, deploy="kubernetes"))
    old, new = forwarded(cluster)
    assert (old[-2:], new[-2:]) == ("-a", "-b")
    (said,) = [line for line in caplog.messages if "cannot be reached" in line]
    assert said == f'pod team/{old} cannot be reached through the API server: 404 pods "{old}" not found'
    assert [path for path, _ in engine.seen].count(CHAT) == 2


def test_a_pod_that_goes_while_it_is_asked_is_followed_by_another(
    cluster: KubernetesServer, engine: FakeEngine, model: str
) -> None:
    forward_to(cluster, engine)

    def gone(handler: Any) -> None:
        engine.faults.clear()
        (name,) = cluster.of_kind("Pod")
        cluster.delete(f"/api/v1/namespaces/team/pods/{name}")
        pod(cluster, next(iter(cluster.of_kind("ReplicaSet").values())), READY, "b")
        handler.json(503, {"error": "shutting down"})

    engine.faults["/tokenize"] = gone
    deploy(Serve(model=model, deploy="kubernetes"))
    assert [name[-2:] for name in forwarded(cluster)] == ["-a", "-b"]


def test_in_a_pod_of_the_cluster_a_new_pod_is_asked_at_its_own_address_and_then_the_services_name(
    cluster: KubernetesServer, engine: FakeEngine, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("cluster", "deploy"):
        monkeypatch.setattr(f"components.serve.{module}.ACCOUNT", tmp_path)
    monkeypatch.setattr("components.serve.cluster.PORT", int(engine.address.rpartition(":")[2]))

    def operate(thing: dict[str, Any]) -> None:
        if thing["kind"] == "InferenceService":
            stands(cluster, thing, engine.address)

    cluster.on_apply = operate
    deploy(Serve(model=model, deploy="kserve"))
    assert not forwarded(cluster)
    paths = [path for path, _ in engine.seen]
    # with the key, without it, and once through the Service
    assert paths.count("/v1/models") == 3
    assert paths[-1] == "/v1/models"


def test_the_same_again_changes_nothing(cluster: KubernetesServer, engine: FakeEngine, model: str) -> None:
    deploy(asked(model, engine))
    before = state_of(cluster)
    deploy(asked(model, engine))
    assert state_of(cluster) == before
    assert cluster.of_kind("Deployment")["zhllama"]["metadata"]["generation"] == 1


def test_an_inference_service_stands_and_is_tried(cluster: KubernetesServer, engine: FakeEngine, model: str) -> None:
    assert deploy(asked(model, engine, "kserve")) == "http://zhllama-predictor.team.svc.cluster.local"
    assert set(cluster.of_kind("InferenceService")) == {"zhllama"}
    assert set(cluster.of_kind("NetworkPolicy")) == {"zhllama"}
    assert set(cluster.of_kind("Deployment")) == {"zhllama-predictor"}


def test_a_cluster_without_pod_monitors_does_without(cluster: KubernetesServer, engine: FakeEngine, model: str) -> None:
    cluster.fault = lambda method, path: 404 if "podmonitors" in path else None
    deploy(asked(model, engine))
    assert not cluster.of_kind("PodMonitor")
    assert cluster.of_kind("Deployment")


@pytest.mark.slow
def test_a_server_that_is_away_or_busy_for_a_while_is_asked_again(
    cluster: KubernetesServer, engine: FakeEngine, model: str
) -> None:
    faults = iter([503, 429, 500, 504, None, 503, None, 502])
    cluster.fault = lambda method, path: next(faults, None)
    deploy(asked(model, engine))
    assert cluster.of_kind("Deployment")


# --- or all is as it was ----------------------------------------------------------------------------------------------


def wrong_ids(handler: Any) -> None:
    handler.json(200, {"tokens": [1, 2, 3], "count": 3})


def wrong_template(handler: Any) -> None:
    asked_body = handler.of.seen[-1][1]
    encoder = handler.of.encoder
    text = asked_body["prompt"] if "prompt" in asked_body else asked_body["messages"][0]["content"]
    handler.json(200, {"tokens": [encoder.bos, *encoder.encode(text)]})


MISBEHAVIOURS: dict[str, tuple[str, Callable[[Any], None], type[Exception], str]] = {
    "other ids": ("/tokenize", wrong_ids, InputError, "it encodes .* as"),
    "another template": ("/tokenize", wrong_template, InputError, "it encodes the question"),
    "another model": (
        "/v1/models", lambda handler: handler.json(200, {"data": [{"id": "gpt"}]}), InputError, "it serves gpt, not",
    ),
    "a shorter context": (
        "/v1/models", lambda handler: handler.json(200, {"data": [{"id": "zhllama", "max_model_len": 512}]}),
        InputError, "up to 512 tokens, 2048 were asked for",
    ),
    "another key": ("/v1/models", lambda handler: handler.json(401, {}), InputError, "refuses the API key"),
    "no answer": (CHAT, lambda handler: handler.json(500, {"error": "x"}), StorageFault, CHAT),
    "nonsense": (CHAT, lambda handler: handler.raw(200, b"<html>", "text/html"), StorageFault, CHAT),
    "no text": (CHAT, lambda handler: handler.json(200, {"choices": []}), StorageFault, "IndexError"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MISBEHAVIOURS)
@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
def test_a_server_that_misbehaves_is_taken_back(
    cluster: KubernetesServer, engine: FakeEngine, model: str, name: str, first: bool
) -> None:
    path, fault, kind, said = MISBEHAVIOURS[name]
    before: dict[str, Any] = {}
    if not first:
        deploy(asked(model, engine))
        before = state_of(cluster)
    engine.faults[path] = fault
    with pytest.raises(kind, match=said):
        deploy(asked(model, engine, memory="32Gi"))
    # a first deployment is deleted, a second one is again what the first was
    assert state_of(cluster) == before


def test_a_server_that_asks_for_no_key_is_taken_back(cluster: KubernetesServer, engine: FakeEngine, model: str) -> None:
    engine.api_key = ""
    with pytest.raises(InputError, match="it answers without an API key"):
        deploy(asked(model, engine))
    assert not state_of(cluster)


def container(name: str, **state: Any) -> dict[str, Any]:
    return {"name": name, "state": state}


def ends(code: int, message: str) -> dict[str, Any]:
    return {"terminated": {"exitCode": code, "message": message, "reason": "Error"}}


UNFIT = {"initContainerStatuses": [container("check", **ends(2, "error: --model s3://m: a shard is missing\n"))]}
CRASHED = {
    "initContainerStatuses": [container("check", terminated={"exitCode": 0})],
    "containerStatuses": [container("server", waiting={"reason": "CrashLoopBackOff"}) | {
        "lastState": ends(1, "CUDA out of memory")}],
}  # fmt: skip
NO_NODE = {
    "conditions": [
        {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": "0/3 nodes: no nvidia.com/gpu",
        }
    ]
}
NO_IMAGE = {
    "containerStatuses": [container("server", waiting={"reason": "ImagePullBackOff", "message": "no such image"})]
}
LATE = {"conditions": [{"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"}]}


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
@pytest.mark.parametrize(
    ("pod_status", "status", "kind", "said"),
    [
        (UNFIT, {}, InputError, "^--model s3://m: a shard is missing$"),
        (CRASHED, LATE, StorageFault, "server ended with 1: CUDA out of memory"),
        (NO_NODE, LATE, StorageFault, "Unschedulable: 0/3 nodes"),
        (NO_IMAGE, LATE, StorageFault, "ImagePullBackOff: no such image"),
    ],
    ids=["unfit", "crashed", "no node", "no image"],
)
def test_pods_that_never_answer_are_taken_back_with_their_reason(
    cluster: KubernetesServer,
    engine: FakeEngine,
    model: str,
    pod_status: Any,
    status: Any,
    kind: Any,
    said: str,
    first: bool,
) -> None:
    before: dict[str, Any] = {}
    if not first:
        deploy(asked(model, engine))
        before = state_of(cluster)

    def stuck(thing: dict[str, Any]) -> None:
        pod(cluster, replica_set(cluster, thing), pod_status)
        cluster.set_status("Deployment", "zhllama", {"observedGeneration": thing["metadata"]["generation"], **status})

    cluster.on_apply = roll_out(cluster, stuck)
    with pytest.raises(kind, match=said):
        deploy(asked(model, engine, memory="32Gi"))
    assert state_of(cluster) == before


@pytest.mark.slow
def test_a_deployment_that_is_not_ready_in_time_is_taken_back(
    cluster: KubernetesServer, engine: FakeEngine, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.on_apply = lambda thing: None
    monkeypatch.setattr("components.serve.cluster.LOOK_EVERY", 0.1)
    clock = iter(range(0, 100_000, 100))
    for module in ("cluster", "deploy"):
        monkeypatch.setattr(f"components.serve.{module}.monotonic", lambda: float(next(clock)))
    with pytest.raises(StorageFault, match="is not ready after 30 minutes: the controller has not seen it yet"):
        deploy(asked(model, engine))
    assert not state_of(cluster)


def test_what_cannot_be_applied_leaves_nothing(cluster: KubernetesServer, engine: FakeEngine, model: str) -> None:
    cluster.fault = lambda method, path: 403 if method == "PATCH" and "deployments" in path else None
    with pytest.raises(InputError, match=r"Deployment team/zhllama was refused: 403 .*Role zhllama-deployer"):
        deploy(asked(model, engine))
    assert not state_of(cluster)
    cluster.fault = lambda method, path: 404 if method == "PATCH" else None
    with pytest.raises(InputError, match="install KServe"):
        deploy(asked(model, engine, "kserve"))


@pytest.mark.slow
def test_a_cancel_takes_it_back(cluster: KubernetesServer, engine: FakeEngine, model: str) -> None:
    applied = threading.Event()
    cluster.on_apply = lambda thing: applied.set() if thing["kind"] == "Deployment" else None
    command = [sys.executable, "-m", "components.serve", "--model", model, "--deploy", "kubernetes"]
    command += ["--address", engine.address]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ}) as program:
        assert applied.wait(120)
        program.send_signal(signal.SIGTERM)
        _, said = program.communicate(timeout=120)
    assert program.returncode == 143
    assert said.splitlines()[-1] == "cancelled"
    assert KEY not in said
    assert not state_of(cluster)


def test_what_is_somebody_elses_is_left_alone(cluster: KubernetesServer, engine: FakeEngine, model: str) -> None:
    path = "/api/v1/namespaces/team/services/zhllama"
    theirs = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "zhllama", "namespace": "team"}, "spec": {}}
    cluster.apply(path, theirs)
    before = state_of(cluster)
    with pytest.raises(InputError, match=r"Service team/zhllama is there and is not zhllama's; give another --name"):
        deploy(asked(model, engine))
    assert state_of(cluster) == before
    assert not [method for method, _ in cluster.requests if method != "GET"]


# --- what is refused before the cluster is asked ----------------------------------------------------------------------


def test_without_the_key_nothing_is_deployed(
    cluster: KubernetesServer, engine: FakeEngine, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ZHLLAMA_API_KEY")
    with pytest.raises(InputError, match="with the key that is in the secret zhllama-api-key"):
        deploy(asked(model, engine))
    assert not cluster.requests


def test_a_model_that_is_not_in_s3_is_not_deployed(
    cluster: KubernetesServer, engine: FakeEngine, tiny_model: str
) -> None:
    with pytest.raises(InputError, match="pods of a cluster read the model from S3"):
        deploy(asked(tiny_model, engine))


def test_a_shard_that_is_gone_or_cut_short_is_found_before_the_cluster_is_asked(
    cluster: KubernetesServer, engine: FakeEngine, model: str
) -> None:
    from zhllama import storage

    shard = next(name for name in open_artifact(model).names if name.endswith(".safetensors"))
    place = f"{model.removesuffix('/manifest.json')}/{shard}"
    content = storage.read_bytes(place)
    storage.write_bytes(place, content[:-10])
    with pytest.raises(InputError, match=f"{shard} is .* bytes, the manifest says"):
        deploy(asked(model, engine))
    storage.delete(place)
    with pytest.raises(InputError, match=f"{shard} is not there, the manifest says"):
        deploy(asked(model, engine))
    assert not cluster.requests


def test_the_check_of_a_serving_pod_says_what_is_wrong(model: str) -> None:
    artifact, encoder, _ = checked(model, 2048)
    assert artifact.verified
    assert encoder.encode(RECIPE.wrap("x"))
    with pytest.raises(InputError, match="the model has 2048 positions; --context-length 4096 is more"):
        checked(model, 4096)


@pytest.mark.slow
def test_the_check_is_a_program_with_the_contracts_exit_codes(model: str, tmp_path: Path) -> None:
    last = tmp_path / "termination-log"
    last.touch()
    environment = {**os.environ, "ZHLLAMA_TERMINATION_LOG": str(last)}
    command = [sys.executable, "-m", "components.serve.check", "--model"]
    fit = subprocess.run([*command, model], capture_output=True, text=True, env=environment)
    assert fit.returncode == 0, fit.stderr
    none = subprocess.run([*command, f"{model}x"], capture_output=True, text=True, env=environment)
    assert none.returncode == 2
    assert last.read_text().startswith("error: --model s3://")
