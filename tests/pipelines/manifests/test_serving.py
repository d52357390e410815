"""The rendered servers are what serve's own --deploy applies."""

import subprocess
import sys
from typing import Any

import pytest
import yaml

from components.serve.check import Check
from components.serve.deploy import server_of
from components.serve.options import Serve
from pipelines import sizes
from pipelines.manifests import serving
from pipelines.manifests.render import yaml_of
from zhllama.errors import InputError
from zhllama.kubernetes.model_server import KEY, ModelServer
from zhllama.stage.command_line import parse
from zhllama.stage.images import image

MODEL = "s3://bucket/models/zh"


@pytest.fixture(autouse=True)
def no_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ZHLLAMA_REGISTRY", "ZHLLAMA_TAG"):
        monkeypatch.delenv(name, raising=False)


def test_a_size_without_gpus_is_not_served_on_a_cluster() -> None:
    with pytest.raises(InputError, match=r"size tiny has no GPUs.*python -m components\.serve"):
        serving.model_server(sizes.load("tiny"))


def objects(text: str) -> dict[str, dict[str, Any]]:
    return {value["kind"]: value for value in yaml.safe_load_all(text)}


def pod_of(value: dict[str, Any]) -> dict[str, Any]:
    spec = value["spec"]
    return dict(spec["predictor"] if "predictor" in spec else spec["template"]["spec"])


@pytest.fixture(params=[False, True], ids=["vllm", "kserve"])
def pod(request: pytest.FixtureRequest) -> dict[str, Any]:
    server = serving.model_server(sizes.load("33b"), f"{MODEL}/manifest.json")
    made = objects(yaml_of(server.objects(request.param)))
    return pod_of(made["InferenceService" if request.param else "Deployment"])


def variables(container: dict[str, Any]) -> dict[str, Any]:
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}


def test_vllm_reads_the_model_from_s3_with_the_sizes_machine(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    assert container["command"][:2] == ["sh", "-c"]
    assert container["command"][2].endswith('exec vllm serve "$@"\n')
    assert container["args"][0] == f"{MODEL}/"
    options = dict(zip(container["args"][1::2], container["args"][2::2], strict=True))
    assert options["--load-format"] == "runai_streamer"
    assert (options["--tensor-parallel-size"], options["--max-model-len"]) == ("2", "2048")
    assert options["--served-model-name"] == "llama-33b"
    assert yaml.safe_load(options["--override-generation-config"]) == {
        "temperature": 0.2, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1,
    }  # fmt: skip
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "2"
    given = variables(container)
    assert given["AWS_ENDPOINT_URL"]["secretKeyRef"] == {
        "name": "zhllama-s3", "key": "ZHLLAMA_S3_ENDPOINT", "optional": True,
    }  # fmt: skip
    assert "VLLM_API_KEY" not in given
    secret = {"secretName": "zhllama-api-key", "items": [{"key": KEY, "path": KEY}], "optional": True}
    assert {"name": "api-key", "secret": secret} in pod["volumes"]


def test_the_check_comes_first_with_our_own_image_and_command(pod: dict[str, Any]) -> None:
    (container,) = pod["initContainers"]
    assert container["image"] == image("serve")
    assert container["command"] == ["python", "-m", "components.serve.check"]
    config = parse(Check, container["args"])
    assert (config.model, config.context_length) == (f"{MODEL}/manifest.json", 2048)
    assert "ZHLLAMA_S3_ENDPOINT" in variables(container)


def test_a_serving_pod_is_confined(pod: dict[str, Any]) -> None:
    assert pod["automountServiceAccountToken"] is False
    assert pod["serviceAccountName"] == "zhllama-serving"
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in (*pod["initContainers"], *pod["containers"]):
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"]
        assert not security["allowPrivilegeEscalation"]
        assert security["capabilities"] == {"drop": ["ALL"]}
        given = variables(container)
        assert all(given[name].startswith("/tmp") for name in ("HOME", "HF_HOME", "TRITON_CACHE_DIR"))
        for name, value in given.items():
            if "KEY" in name or "TOKEN" in name:
                assert set(value) == {"secretKeyRef"}


def test_probes_wait_for_a_large_model_and_then_watch_it(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    assert container["startupProbe"]["periodSeconds"] * container["startupProbe"]["failureThreshold"] == 1800
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    assert {port["name"] for port in container["ports"]} == {"http"}


def test_what_belongs_together_selects_the_same_pods() -> None:
    made = objects(yaml_of(serving.model_server(sizes.load("7b"), MODEL).objects(monitored=True)))
    labels = made["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [
        made["Deployment"]["spec"]["selector"]["matchLabels"],
        made["Service"]["spec"]["selector"],
        made["PodMonitor"]["spec"]["selector"]["matchLabels"],
        made["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(selector == selectors[0] for selector in selectors)
    assert selectors[0].items() <= labels.items()
    # a label that changes with each version may not be selected by: a Deployment's selector cannot change
    assert "zhllama.io/version" not in selectors[0]
    (endpoint,) = made["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert endpoint["path"] == "/metrics"
    (rule,) = made["NetworkPolicy"]["spec"]["ingress"]
    assert rule["ports"] == [{"protocol": "TCP", "port": 8000}]


def test_kserves_pods_have_the_labels_that_the_network_policy_selects() -> None:
    made = objects(yaml_of(serving.model_server(sizes.load("7b"), MODEL).objects(kserve=True)))
    selected = made["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
    assert selected.items() <= made["InferenceService"]["spec"]["predictor"]["labels"].items()


def test_another_model_at_the_same_address_replaces_the_pods() -> None:
    first, second = (ModelServer(name="a", model=MODEL, model_digest=digest) for digest in ("1", "2"))
    assert first.version != second.version
    assert first.version == ModelServer(name="a", model=MODEL, model_digest="1", replicas=3).version


def test_serve_deploys_what_is_rendered() -> None:
    size = sizes.load("13b")
    asked = Serve(model=MODEL, name="llama-13b", deploy="kubernetes", memory=size.serving.memory)
    rendered = serving.model_server(size, MODEL)
    applied = pod_of(server_of(asked).deployment())
    assert applied == pod_of(rendered.deployment())


SITE = {"pull_secret": "registry", "proxy_secret": "way-out", "ca_config_map": "authorities"}
PLACE = {"node_selector": {"pool": "gpu"}, "tolerations": ({"key": "nvidia.com/gpu", "operator": "Exists"},)}


@pytest.mark.parametrize("kserve", [False, True], ids=["vllm", "kserve"])
def test_what_a_site_asks_of_pods_is_asked_of_a_served_models_too(kserve: bool) -> None:
    labels = {"team": "nlp", "app.kubernetes.io/name": "mine"}
    server = serving.model_server(sizes.load("13b"), MODEL, labels=labels, **SITE, **PLACE)
    made = objects(yaml_of(server.objects(kserve)))
    value = made["InferenceService" if kserve else "Deployment"]
    metadata = value["spec"]["predictor"] if kserve else value["spec"]["template"]["metadata"]
    selected = made["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
    # what they are found by cannot be overwritten
    assert (selected | {"team": "nlp", "zhllama.io/size": "13b"}).items() <= metadata["labels"].items()
    pod = pod_of(value)
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    assert pod["nodeSelector"] == {"pool": "gpu"}
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists"}]
    assert {"name": "ca", "configMap": {"name": "authorities", "optional": True}} in pod["volumes"]
    (check,), (vllm,) = pod["initContainers"], pod["containers"]
    assert {"name": "ca", "mountPath": "/etc/zhllama-ca", "readOnly": True} in check["volumeMounts"]
    # the check trusts them, and leaves them in the file that vLLM is told of: both have the same /tmp
    assert variables(check)["ZHLLAMA_CA"] == "/etc/zhllama-ca"
    assert variables(vllm)["AWS_CA_BUNDLE"] == variables(check)["ZHLLAMA_CA_BUNDLE"] == "/tmp/authorities.pem"
    for container in (check, vllm):
        assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"]
        for name in ("HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY"):
            assert variables(container)[name]["secretKeyRef"] == {"name": "way-out", "key": name, "optional": True}


def test_a_deployment_and_a_rendered_server_take_the_same_of_a_site() -> None:
    asked = Serve(
        model=MODEL, name="llama-65b", deploy="kubernetes", size="65b", gpus=4, cpu="32", memory="160Gi",
        shared_memory="32Gi", ephemeral_storage="20Gi", labels='{"team": "nlp"}', node_selector='{"pool": "gpu"}',
        tolerations='[{"key": "nvidia.com/gpu", "operator": "Exists"}]', **SITE,
    )  # fmt: skip
    rendered = serving.model_server(sizes.load("65b"), MODEL, labels={"team": "nlp"}, **SITE, **PLACE)
    assert server_of(asked).deployment() == rendered.deployment()


def test_a_server_reaches_s3_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def to_s3(server: ModelServer) -> Any:
        return server.network_policy()["spec"]["egress"][-1]

    monkeypatch.setenv("ZHLLAMA_S3_ENDPOINT", "http://ceph.example.com:7480")
    asked = server_of(Serve(model=MODEL, deploy="kubernetes"))
    assert 7480 in [one["port"] for one in to_s3(asked)["ports"]]
    words = ["render", "serving", "--size", "13b", "--model", MODEL, "--s3-port", "7480", "--s3-cidr", "10.0.0.0/8"]
    ended = subprocess.run([sys.executable, "-m", "pipelines", *words], capture_output=True, text=True, check=True)
    (*_, rule) = objects(ended.stdout)["NetworkPolicy"]["spec"]["egress"]
    assert rule == {"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "ports": [{"protocol": "TCP", "port": 7480}]}


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("labels", "team=nlp", "serve: --labels team=nlp: not JSON"),
        ("tolerations", '{"key": "a"}', "serve: --tolerations .*: write a list of tolerations"),
    ],
)
def test_wrong_json_is_refused_with_how_to_write_it(option: str, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Serve(model=MODEL, **{option: text})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name": "Not_A_Name"}, "'Not_A_Name' must be lower-case letters"),
        ({"model": "/data/model"}, "pods of a cluster read the model from S3"),
        ({"gpus": 0}, "--gpus: 0 must be between 1 and"),
        ({"namespace": "Team_A"}, "--namespace: 'Team_A' must be lower-case letters"),
        ({"api_key_secret": "My Key"}, "--api-key-secret: 'My Key' must be lower-case letters"),
        ({"labels": {"team": "a b"}}, "--labels: team: 'a b' must be"),
    ],
)
def test_a_wrong_option_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        ModelServer(**{"name": "a", "model": MODEL, **given})


@pytest.mark.slow
def test_the_command_writes_manifests_to_standard_output() -> None:
    words = ["render", "serving", "--size", "13b", "--model", MODEL, "--namespace", "team", "--name", "zh"]
    words += ["--registry", "r.example.com/t", "--tag", "2", "--vllm-image", "r.example.com/vllm:1", "--stop-first"]
    words += ["--pull-secret", "registry", "--label", "team=nlp", "--node-selector", "pool=gpu", "--toleration", "gpu"]
    ended = subprocess.run([sys.executable, "-m", "pipelines", *words], capture_output=True, text=True, check=True)
    made = objects(ended.stdout)
    assert {value["metadata"]["namespace"] for value in made.values()} == {"team"}
    assert made["Deployment"]["spec"]["strategy"] == {"type": "Recreate"}
    pod = pod_of(made["Deployment"])
    assert pod["initContainers"][0]["image"] == "r.example.com/t/zhllama-serve:2"
    assert pod["containers"][0]["image"] == "r.example.com/vllm:1"
    assert (pod["imagePullSecrets"], pod["nodeSelector"]) == ([{"name": "registry"}], {"pool": "gpu"})
    assert pod["tolerations"] == [{"key": "gpu", "operator": "Exists"}]
    assert made["Deployment"]["metadata"]["labels"]["team"] == "nlp"
    kserve = subprocess.run(
        [sys.executable, "-m", "pipelines", *words[:5], MODEL, "--kserve"], capture_output=True, text=True, check=True
    )
    assert set(objects(kserve.stdout)) == {"NetworkPolicy", "InferenceService"}


def rendered(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines", "render", "serving", "--size", "13b", "--model", MODEL, *words]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [[], ["--kserve"]], ids=["vllm", "kserve"])
def test_a_pod_monitor_is_rendered_only_where_it_is_asked_for(kind: list[str]) -> None:
    bare, monitored, old = (
        objects(rendered(*kind, *more).stdout) for more in ([], ["--pod-monitor"], ["--without-pod-monitor"])
    )
    assert "PodMonitor" not in bare
    assert old == bare
    assert set(monitored) == {*bare, "PodMonitor"}


@pytest.mark.slow
def test_replicas_are_the_sizes_a_number_or_left_to_an_autoscaler() -> None:
    size = sizes.load("13b")
    for words, wanted in (([], size.serving.replicas), (["--replicas", "3"], 3), (["--replicas", "autoscaled"], None)):
        assert objects(rendered(*words).stdout)["Deployment"]["spec"].get("replicas") == wanted
        predictor = objects(rendered("--kserve", *words).stdout)["InferenceService"]["spec"]["predictor"]
        assert (predictor.get("minReplicas"), predictor.get("maxReplicas")) == (wanted, wanted)


@pytest.mark.parametrize("wrong", ["0", "-1", "2.5", "auto", "²"])
def test_other_replicas_are_refused_with_what_to_give(wrong: str) -> None:
    ended = rendered(f"--replicas={wrong}")
    assert ended.returncode == 2
    assert f"--replicas {wrong}: give a number of pods from 1 on, or autoscaled" in ended.stderr
    assert not ended.stdout


def test_istios_sidecar_is_a_choice() -> None:
    plain, meshed = (serving.model_server(sizes.load("7b"), MODEL, istio=istio) for istio in (False, True))
    found = [server.deployment()["spec"]["template"]["metadata"] for server in (plain, meshed)]
    assert [one["labels"]["sidecar.istio.io/inject"] for one in found] == ["false", "true"]
    past = "traffic.sidecar.istio.io/excludeOutboundPorts"
    assert [one["annotations"].get(past) for one in found] == [None, "443,8333,9000"]
    control = [rule for rule in meshed.network_policy()["spec"]["egress"] if rule["ports"][0]["port"] == 15012]
    assert control[0]["to"][0]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "istio-system"}
    assert len(meshed.network_policy()["spec"]["egress"]) == len(plain.network_policy()["spec"]["egress"]) + 1
    assert server_of(Serve(model=MODEL, deploy="kubernetes", istio=True)).istio
