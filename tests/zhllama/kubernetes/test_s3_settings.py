"""A key of the S3 secret → a pod's variable → boto3's client: in steps, jobs and served models alike."""

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.launch_training.job_state import judge
from components.launch_training.launcher import training_job
from components.launch_training.options import LaunchTraining
from pipelines import sizes
from pipelines.local import s3_server as seaweed
from pipelines.local.s3_server import LocalS3
from pipelines.manifests.serving import model_server
from tests import kubelet
from tests.faulty_proxy import Fault, FaultyProxy
from zhllama import mounted_secrets, storage
from zhllama.errors import InputError
from zhllama.kubernetes.job_manifest import job_manifest
from zhllama.kubernetes.pods import S3_KEYS, S3_OPTIONAL_KEYS
from zhllama.kubernetes.refusals import named_options
from zhllama.mounted_secrets import S3_FOLDER, take_secrets
from zhllama.stage.tls import trust_site
from zhllama.storage.parallel import connections, patience
from zhllama.storage.s3_session import Session

ROOT = Path(__file__).resolve().parents[3]
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
AUTHORITY = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----"
EVERYTHING = KEYS | {
    "AWS_SESSION_TOKEN": "session",
    "AWS_DEFAULT_REGION": "oss-cn-1",
    "AWS_CA_BUNDLE": AUTHORITY,
    "ZHLLAMA_S3_ENDPOINT": "https://oss.example.com",
    "AWS_ENDPOINT_URL_S3": "https://not-this.example.com",
    "ZHLLAMA_S3_ADDRESSING_STYLE": "virtual",
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    "ZHLLAMA_S3_CONNECTIONS": "3",
    "ZHLLAMA_S3_TIMEOUT": "17",
    "AWS_MAX_ATTEMPTS": "2",
}


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the machine's."""
    for name in {*os.environ}:
        if name.startswith(("AWS_", "ZHLLAMA_", "RUNAI_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))


def pod_of_job(api: str) -> dict[str, Any]:
    options = LaunchTraining(
        store="s3://bucket/s",
        stage="lora",
        model="s3://bucket/m",
        dataset="s3://bucket/d",
        s3_secret="zhllama-s3",
        size="7b",
    )
    job = job_manifest(training_job(options, "key", ("python",), 1), api)
    if api == "trainjob":
        (patch,) = job["spec"]["runtimePatches"]
        (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
        pod = node["template"]["spec"]["template"]["spec"]
        return {**pod, "containers": [{**pod["containers"][0], **job["spec"]["trainer"]}]}
    pod = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    return dict(pod)


def containers_of_server() -> tuple[dict[str, Any], dict[str, Any]]:
    pod = model_server(sizes.load("7b")).pod("server")
    return pod["initContainers"][0], pod["containers"][0]


JOBS = {"PyTorchJob": "pytorchjob", "TrainJob": "trainjob"}
CHECK, EARLIER = "the served model's check", "a job that an earlier release made"
EVERYWHERE = ["a step", *JOBS, CHECK, EARLIER]


def variables(container: Mapping[str, Any], secret: Mapping[str, str]) -> dict[str, str]:
    """What a container has in its environment, as the kubelet makes it."""
    found = {}
    for one in container["env"]:
        if (value := one.get("value")) is None:
            reference = one["valueFrom"]["secretKeyRef"]
            if reference["name"] != "zhllama-s3":
                continue
            assert reference["key"] in secret or reference.get("optional"), reference
            value = secret.get(reference["key"])
        if value is not None:
            found[one["name"]] = value
    return found


def as_a_pod(where: str, secret: Mapping[str, str], monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """The process's environment and files as a pod's command has them when its work begins."""
    for name in ("AWS_CA_BUNDLE", *secret):
        # what the command sets of it is taken back at the end
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    mounted, told = folder / "mounted", {}
    monkeypatch.setattr(mounted_secrets, "S3_FOLDER", str(mounted))
    if where == "a step":
        kubelet.write(mounted, secret)
    elif where == EARLIER:
        told = dict(secret)
    elif where == CHECK:
        told = variables(containers_of_server()[0], secret)
    else:
        pod = pod_of_job(JOBS[where])
        kubelet.mount(mounted, pod, S3_FOLDER, {"zhllama-s3": secret})
        told = variables(pod["containers"][0], {})
    for name, value in told.items():
        if not name.startswith(("HF_", "TORCH", "TRITON", "PYTHON", "XDG", "USER", "LOGNAME")):
            monkeypatch.setenv(name, value)
    take_secrets()
    trust_site()


@pytest.mark.parametrize("where", EVERYWHERE)
def test_every_setting_of_a_laptop_reaches_the_client_of_a_pod(where, monkeypatch, tmp_path):
    as_a_pod(where, EVERYTHING, monkeypatch, tmp_path)
    session = Session(os.environ["ZHLLAMA_S3_ENDPOINT"])
    config = session.client.meta.config
    assert config.s3["addressing_style"] == "virtual"
    assert session._bucket("team") == ("https://team.oss.example.com", "oss-cn-1", "s3")
    assert (config.request_checksum_calculation, config.response_checksum_validation) == ("when_required",) * 2
    assert (session.attempts, config.retries["total_max_attempts"], config.read_timeout) == (2, 2, 17)
    assert (connections(), patience()) == (3, 17)
    assert Path(os.environ["AWS_CA_BUNDLE"]).read_text(encoding="utf-8").strip() == AUTHORITY
    assert session.credentials.token == "session"


@pytest.mark.parametrize("where", EVERYWHERE)
def test_a_key_that_is_not_there_changes_nothing(where, monkeypatch, tmp_path):
    as_a_pod(where, KEYS | {"ZHLLAMA_S3_ENDPOINT": "http://minio:9000"}, monkeypatch, tmp_path)
    session = Session(os.environ["ZHLLAMA_S3_ENDPOINT"])
    assert session._bucket("team")[0] == "http://minio:9000/team"
    assert session.client.meta.config.request_checksum_calculation == "when_supported"
    assert (session.attempts, connections(), patience()) == (8, 8, 60)
    assert "AWS_CA_BUNDLE" not in os.environ


@pytest.mark.parametrize("where", ["a step", *JOBS])
def test_what_comes_as_a_file_is_no_variable_where_it_is_a_credential(where, monkeypatch, tmp_path):
    as_a_pod(where, EVERYTHING, monkeypatch, tmp_path)
    credentials = {*S3_KEYS, "AWS_SESSION_TOKEN"}
    assert not credentials & os.environ.keys()
    assert {*EVERYTHING} - credentials <= os.environ.keys()
    # nor has a child it
    done = subprocess.run(["env"], capture_output=True, text=True, check=True)
    assert "SECRET" not in done.stdout


def test_keys_but_the_credentials_are_optional_and_each_variable_stands_once():
    variables = containers_of_server()[0]["env"]
    assert len({one["name"] for one in variables}) == len(variables)
    found = {one["valueFrom"]["secretKeyRef"]["key"]: one for one in variables if "valueFrom" in one}
    assert set(EVERYTHING) == set(found) == {*S3_KEYS, *S3_OPTIONAL_KEYS}
    for key, one in found.items():
        assert bool(one["valueFrom"]["secretKeyRef"].get("optional")) == (key not in S3_KEYS)


@pytest.mark.parametrize("api", JOBS.values())
@pytest.mark.parametrize(
    ("secrets", "said"),
    [
        ({}, 'secret "zhllama-s3" not found'),
        ({"zhllama-s3": {**EVERYTHING, "AWS_ACCESS_KEY_ID": None}}, "non-existent secret key: AWS_ACCESS_KEY_ID"),
        ({"zhllama-s3": {"AWS_ACCESS_KEY_ID": "k"}}, "non-existent secret key: AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_without_its_keys_a_jobs_pod_does_not_start_and_the_launcher_names_the_option(api, secrets, said, tmp_path):
    given = {name: {key: text for key, text in one.items() if text} for name, one in secrets.items()}
    with pytest.raises(kubelet.NotMounted, match=said) as event:
        kubelet.mount(tmp_path / "m", pod_of_job(api), S3_FOLDER, given)
    starting = {"metadata": {"name": "p"}, "status": {"phase": "Pending"}}
    verdict = judge({"metadata": {"name": "j"}}, [starting], [f"FailedMount: {event.value}"])
    assert verdict.stuck
    assert said in verdict.reason
    assert '"s3-secret"' in verdict.reason
    assert named_options(verdict.reason, LaunchTraining) == " (--s3-secret)"


def test_a_launcher_tells_its_job_how_the_server_is_spoken_to(monkeypatch):
    """Where there is no secret (web identity), nobody else does."""
    monkeypatch.setenv("ZHLLAMA_S3_ADDRESSING_STYLE", "virtual")
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    # those of this machine
    monkeypatch.setenv("AWS_DEFAULT_REGION", "here")
    monkeypatch.setenv("AWS_CA_BUNDLE", "/etc/here.pem")
    told = {one["name"]: one["value"] for one in pod_of_job("pytorchjob")["containers"][0]["env"] if "value" in one}
    assert told["ZHLLAMA_S3_ADDRESSING_STYLE"] == "virtual"
    assert told["AWS_REQUEST_CHECKSUM_CALCULATION"] == "when_required"
    assert not {"AWS_DEFAULT_REGION", "AWS_CA_BUNDLE"} & told.keys()


STREAMER = """#!{python}
import json, os, sys
import boto3
from botocore.config import Config
# as Run:ai's streamer makes its client
path = os.environ["RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING"] == "0"
client = boto3.client("s3", config=Config(s3={{"addressing_style": "path"}}) if path else None)
url = client.generate_presigned_url("get_object", Params={{"Bucket": "team", "Key": "k"}}).partition("?")[0]
bundle = os.environ.get("AWS_CA_BUNDLE", "")
concurrency = os.environ.get("RUNAI_STREAMER_CONCURRENCY")
print(json.dumps([sys.argv[1:], url, path, bundle and open(bundle).read(), concurrency]))
"""


def streamed(tmp_path: Path, secret: Mapping[str, str]) -> list[Any]:
    """What vLLM's container runs, with a program of its name that makes the streamer's client and says what that is."""
    vllm = containers_of_server()[1]
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(STREAMER.format(python=sys.executable))
    program.chmod(stat.S_IRWXU)
    told = variables(vllm, secret) | {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    words = [one.replace("/tmp/", f"{tmp_path}/") for one in vllm["command"]] + vllm["args"]
    done = subprocess.run(words, env=told, capture_output=True, text=True, check=True)
    found: list[Any] = yaml.safe_load(done.stdout)
    assert found.pop(0) == ["serve", *vllm["args"]]
    return found


def test_vllm_asks_by_path_where_the_secret_says_nothing(tmp_path):
    secret = KEYS | {"ZHLLAMA_S3_ENDPOINT": "http://minio.example:9000"}
    assert streamed(tmp_path, secret) == ["http://minio.example:9000/team/k", True, "", None]


def test_vllm_asks_for_buckets_as_host_names_where_the_secret_says_so(tmp_path):
    url, path, bundle, concurrency = streamed(tmp_path, EVERYTHING)
    assert (url, path, concurrency) == ("https://team.oss.example.com/k", False, "3")
    assert bundle.strip() == AUTHORITY


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ZHLLAMA_S3_ADDRESSING_STYLE", "host", "use path or virtual or auto"),
        ("AWS_REQUEST_CHECKSUM_CALCULATION", "never", "use when_supported or when_required"),
        ("AWS_RESPONSE_CHECKSUM_VALIDATION", "no", "use when_supported or when_required"),
        ("AWS_MAX_ATTEMPTS", "many", "give a whole number, 1 or more"),
    ],
)
def test_a_wrong_setting_is_one_line_with_its_name(monkeypatch, name, value, said):
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"^{name}.*{value}.*{said}$"):
        Session("http://s3:9000")


def test_a_style_stands_over_the_one_of_the_configuration_file(monkeypatch, tmp_path):
    (tmp_path / "config").write_text("[default]\ns3 =\n  addressing_style = virtual\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    assert Session("http://s3.example:9000")._bucket("team")[0] == "http://team.s3.example:9000"
    monkeypatch.setenv("ZHLLAMA_S3_ADDRESSING_STYLE", "path")
    assert Session("http://s3.example:9000")._bucket("team")[0] == "http://s3.example:9000/team"


@pytest.mark.parametrize("name", ["s3-secret.example.yaml", "s3-external-secret.example.yaml"])
def test_the_examples_and_the_page_name_every_key(name):
    text = (ROOT / "k8s" / "base" / name).read_text()
    page = (ROOT / "docs" / "storage.md").read_text()
    for key in S3_OPTIONAL_KEYS:
        assert f"{key}: " in text
        assert f"`{key}`" in page


@pytest.fixture
def virtual_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A store that knows buckets as host names alone: what comes by path gets Alibaba's answer."""
    start = subprocess.Popen
    monkeypatch.setattr(
        seaweed.subprocess, "Popen", lambda words, **more: start([*words, "-s3.domainName=oss.test"], **more)
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    with LocalS3(tmp_path / "s3", bucket="tests") as server, FaultyProxy(server.endpoint) as proxy:

        def by_path(request: Any) -> Fault | None:
            named = request.headers["host"].startswith("tests.")
            return None if named else Fault("status", status=403, code="SecondLevelDomainForbidden")

        proxy.fault = by_path
        look_up = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", lambda host, *more, **named: look_up("127.0.0.1", *more, **named))
        yield server.environment() | {"ZHLLAMA_S3_ENDPOINT": proxy.endpoint.replace("127.0.0.1", "oss.test")}
    storage.forget_client()


@pytest.mark.slow
def test_a_store_of_host_names_alone_works_in_a_pod_by_one_key_of_the_secret(virtual_only, monkeypatch, tmp_path):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "*")
    secret = {name: value for name, value in virtual_only.items() if name in (*S3_KEYS, *S3_OPTIONAL_KEYS)}
    as_a_pod("PyTorchJob", secret, monkeypatch, tmp_path)
    storage.forget_client()
    with pytest.raises(InputError, match="SecondLevelDomainForbidden"):
        storage.write_bytes("s3://tests/a", b"one")
    as_a_pod("PyTorchJob", secret | {"ZHLLAMA_S3_ADDRESSING_STYLE": "virtual"}, monkeypatch, tmp_path)
    storage.forget_client()
    storage.write_bytes("s3://tests/a", b"one")
    assert storage.read_bytes("s3://tests/a", 1, 2) == b"ne"
    assert [item.name for item in storage.listing("s3://tests/")] == ["a"]
