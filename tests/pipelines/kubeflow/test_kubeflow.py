"""Runs through KFP's own client, against a server that speaks what of its API they need."""

import json
import os
import re
import ssl
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from kfp import dsl

from pipelines.cli.runs import _follow
from pipelines.kubeflow import client
from pipelines.kubeflow.answers import Server, cause
from pipelines.kubeflow.client import Kubeflow, connected, known_address
from tests.pipelines.kubeflow.fake_kfp import FakeKfp, recorded, task
from zhllama.errors import InputError, StorageFault

ROOT = Path(__file__).resolve().parents[3]
ASKED = {"pipeline": "adapt", "run_name": "mine", "experiment": "zhllama"}


pytestmark = pytest.mark.usefixtures("plain_environment")


@pytest.fixture
def package(compiled, steps):
    @dsl.pipeline(name="test")
    def pipeline(store: str, number: int = 3):
        steps.publish(store=store, value=f"{number}")

    return compiled(pipeline)


def test_a_run_starts_with_its_parameters(package, server, monkeypatch):
    monkeypatch.setenv("ZHLLAMA_KFP_TOKEN", "t0k")
    run = Kubeflow(server.host + "/", "team").start(package, {"store": "s3://bucket/b", "number": 5}, **ASKED)
    assert run == "r-42"
    (started,) = server.started
    assert started["display_name"] == "mine"
    assert started["experiment_id"] == "e1"
    assert started["runtime_config"]["parameters"] == {"store": "s3://bucket/b", "number": 5}
    assert started["pipeline_version_reference"]["pipeline_id"] == "adapt"
    assert set(server.tokens) == {"Bearer t0k"}


@pytest.mark.parametrize("namespace", [None, "team"], ids=["shared", "of a profile"])
def test_a_package_is_uploaded_once_and_a_changed_one_becomes_a_version(package, server, namespace):
    there = Kubeflow(server.host, namespace)
    first = there.upload(package, "adapt")
    assert there.upload(package, "adapt") == first
    assert len(server.pipelines["adapt"]) == 1
    package.write_text(package.read_text() + "# changed\n")
    assert there.upload(package, "adapt") != first
    assert len(server.pipelines["adapt"]) == 2


def test_a_token_in_a_file_is_read_for_every_call(package, server, monkeypatch, tmp_path):
    (tmp_path / "token").write_text("one")
    monkeypatch.setenv("ZHLLAMA_KFP_TOKEN_FILE", str(tmp_path / "token"))
    there = Kubeflow(server.host, None)
    there.run("r-42")
    (tmp_path / "token").write_text("two")
    there.run("r-42")
    assert server.tokens[-2:] == ["Bearer one", "Bearer two"]
    monkeypatch.setenv("ZHLLAMA_KFP_TOKEN_FILE", str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"ZHLLAMA_KFP_TOKEN_FILE=.*none: no such file"):
        Kubeflow(server.host, None)


@pytest.mark.parametrize(
    ("status", "kind", "said"),
    [(404, InputError, "404 .*no such namespace.*check the address"), (503, StorageFault, "503 .*try again")],
)
def test_a_refusal_and_a_failing_server_are_one_line(package, server, status, kind, said):
    there = Kubeflow(server.host, None)
    server.answers = [status] * 100
    with pytest.raises(kind, match=f"answered {said}"):
        there.start(package, {"store": "s3://bucket/b"}, **ASKED)


def test_a_host_where_nobody_answers_is_one_line():
    with pytest.raises(InputError, match=r"--host http://127\.0\.0\.1:9: no Kubeflow Pipelines answers there"):
        Kubeflow("http://127.0.0.1:9", None).run("r-42")


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"])
def test_a_certificate_of_the_sites_own_is_trusted_where_the_environment_says_so(
    server, monkeypatch, tmp_path, variable
):
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", tmp_path / "key", "-out", tmp_path / "site.crt"]
    subprocess.run(command, check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "site.crt", tmp_path / "key")
    server.socket = tls.wrap_socket(server.socket, server_side=True)
    address = server.host.replace("http:", "https:")
    with pytest.raises(InputError, match="its certificate is not accepted"):
        Kubeflow(address, None)
    monkeypatch.setenv(variable, str(tmp_path / "site.crt"))
    assert Kubeflow(address, None).run("r-42").name == "mine"


def test_a_proxy_is_used_where_the_environment_says_so(server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.host)
    assert Kubeflow("http://kfp.example.invalid", None).run("r-42").name == "mine"
    monkeypatch.setenv("no_proxy", ".invalid")
    with pytest.raises(InputError, match="no Kubeflow Pipelines answers there"):
        Kubeflow("http://kfp.example.invalid", None)


@pytest.mark.slow
def test_a_wrong_host_is_one_line_of_the_command_too():
    for host, said in (
        ("http://kfp.invalid", "--host http://kfp.invalid: no Kubeflow Pipelines answers there"),
        ("kfp.example.com", "--host kfp.example.com: write the whole address, as https://kfp.example.com"),
    ):
        command = [sys.executable, "-m", "pipelines", "status", "r-42", "--host", host]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
        assert said in done.stderr


def test_a_run_is_followed_through_a_server_that_is_away_for_a_moment(server):
    running = ("RUNNING", [task("fetch", "SUCCEEDED"), task("pretrain", "RUNNING")])
    failed = ("FAILED", [task("fetch", "SUCCEEDED"), task("pretrain", "FAILED")])
    server.course = [running, running, failed]
    there = Kubeflow(server.host, None)
    server.answers = [200, 503, 503, 200]
    looks = list(there.follow("r-42", look_every=0.01))
    assert [look.state for look in looks] == ["RUNNING", "FAILED"]
    assert [(each.name, each.state) for each in looks[-1].steps] == [("fetch", "SUCCEEDED"), ("pretrain", "FAILED")]


def test_a_server_that_stays_away_ends_the_following(server, monkeypatch):
    monkeypatch.setattr(client, "PATIENCE", 0.05)
    there = Kubeflow(server.host, None)
    server.answers = [503] * 1000
    with pytest.raises(StorageFault, match="503"):
        list(there.follow("r-42", look_every=0.01))


def test_a_cancelled_run_ends_the_following(server):
    server.course = [("RUNNING", []), ("CANCELING", []), ("FAILED", [])]
    assert [look.state for look in Kubeflow(server.host, None).follow("r-42", look_every=0.01)][-1] == "CANCELED"


def test_a_run_that_goes_on_while_its_list_shows_nothing_says_what_would_be_needed(server):
    """Past 1 MiB KFP lists no task any more, and without a kubeconfig nothing else tells of them."""
    for tasks in ([], [task("fetch", "SUCCEEDED")]):
        server.course = [("RUNNING", tasks)]
        there = Kubeflow(server.host, None)
        note = there.whole(there.run("r-42")).note
        assert note.startswith("no step is listed as running for")
        assert "list workflows.argoproj.io, list pods and get pods/log" in note


def test_a_list_that_stays_as_it_is_gets_a_word_after_several_looks_and_no_sooner(server, monkeypatch):
    monkeypatch.setattr(client, "STILL_LOOKS", 5)
    running = ("RUNNING", [task("pretrain", "RUNNING")])
    server.course = [*[running] * 8, ("SUCCEEDED", [task("pretrain", "SUCCEEDED")])]
    looks = list(Kubeflow(server.host, None).follow("r-42", look_every=0.01))
    assert [look.state for look in looks] == ["RUNNING", "RUNNING", "SUCCEEDED"]
    first, second, last = [look.note for look in looks]
    assert (first, last) == ("", "")
    assert second.startswith("the steps stand as they did for a while")
    assert "list workflows.argoproj.io" in second


def test_following_says_the_note_once(server, monkeypatch, capsys):
    monkeypatch.setattr(client, "STILL_LOOKS", 2)
    monkeypatch.setattr(client.time, "sleep", lambda seconds: None)
    pretrain = task("pretrain", "RUNNING")
    server.course = [*[("RUNNING", [])] * 5, *[("RUNNING", [pretrain])] * 5,
                     ("SUCCEEDED", [task("pretrain", "SUCCEEDED")])]  # fmt: skip
    with pytest.raises(SystemExit) as end:
        _follow(Kubeflow(server.host, None), "r-42")
    assert end.value.code == 0
    assert capsys.readouterr().err.count("list workflows.argoproj.io") == 1


def test_cancel_terminates_what_runs_and_leaves_what_is_over(server):
    there = Kubeflow(server.host, None)
    assert there.cancel("r-42").state == "SUCCEEDED"
    assert server.terminated == []
    server.course = [("RUNNING", [])]
    assert there.cancel("r-42").state == "CANCELING"
    assert server.terminated == ["r-42"]


# --- ways in ----------------------------------------------------------------------------------------------------------


def kubectl(folder: Path, script: str) -> str:
    """A folder for PATH with a kubectl that is this shell script."""
    (folder / "kubectl").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "kubectl").chmod(0o755)
    assert (folder / "kubectl").stat().st_mode & stat.S_IXUSR
    return f"{folder}:{os.environ['PATH']}"


def test_without_a_host_kubectl_forwards_a_port_while_it_lasts(server, tmp_path, monkeypatch):
    port = server.server_address[1]
    pid = tmp_path / "pid"
    said = f"Forwarding from 127.0.0.1:{port} -> 8888"
    script = f'echo "$@" > {tmp_path}/asked; echo $$ > {pid}; echo "{said}"; exec sleep 600'
    monkeypatch.setenv("PATH", kubectl(tmp_path, script))
    with connected(kfp_namespace="kfp") as there:
        assert there.run("r-42").state == "SUCCEEDED"
        os.kill(int(pid.read_text()), 0)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert "--namespace kfp --address 127.0.0.1 service/ml-pipeline" in (tmp_path / "asked").read_text()


def test_a_port_that_cannot_be_forwarded_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", kubectl(tmp_path, 'echo "Error: services \\"ml-pipeline\\" not found" >&2; exit 1'))
    with (
        pytest.raises(InputError, match=r"port-forward to kubeflow/ml-pipeline failed .*not found.*give --host"),
        connected(),
    ):
        pass
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="kubectl is not here; give --host"), connected():
        pass


def test_inside_a_cluster_the_service_is_asked_by_its_name(monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert known_address("", "kfp") == "http://ml-pipeline.kfp.svc.cluster.local:8888"
    assert known_address("https://kfp.example.com", "kfp") == "https://kfp.example.com"


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def zhllama(server: FakeKfp, tmp_path: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    def run(*words: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "pipelines", *words, "--host", server.host]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)

    return run


@pytest.mark.slow
def test_submit_prints_the_address_and_waits_for_the_end(zhllama, server):
    server.course = [("FAILED", [task("fetch-weights", "FAILED")])]
    done = zhllama(
        "submit",
        "--size",
        "7b",
        "--set",
        "store=s3://bucket/b",
        "--set",
        "weights=s3://a/w",
        "--set",
        "text=s3://a/t",
        "--set",
        "instructions=s3://a/i",
        "--set",
        "vocab_size=20000",
        "--wait",
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[0] == f"{server.host}/#/runs/details/r-42"
    assert re.search(r"fetch_weights: failed \(0:01:05\)", done.stderr)
    assert "fault: fetch_weights: failed" in done.stderr
    # as the type that the parameter has
    assert server.started[0]["runtime_config"]["parameters"]["vocab_size"] == 20000
    assert server.pipelines.keys() == {"adapt-llama-7b"}
    assert len(server.pipelines["adapt-llama-7b"]) == 1


def test_a_misspelt_parameter_is_one_line(zhllama, server):
    done = zhllama("submit", "--size", "7b", "--set", "stroe=s3://bucket/b")
    assert done.returncode == 2
    assert "did you mean store?" in done.stderr
    assert server.started == []
    assert server.pipelines == {}


@pytest.mark.slow
def test_status_shows_the_steps_and_cancel_says_what_became_of_it(zhllama, server):
    done = zhllama("status", "r-42")
    assert done.returncode == 0
    assert re.search(r"evaluate +succeeded +2026-11-25 10:00:00 +0:01:05", done.stdout)
    assert "root" not in done.stdout
    done = zhllama("cancel", "r-42")
    assert done.stdout == "run r-42: succeeded\n"
    server.history, server.course = ["RUNNING", "CANCELING"], [("FAILED", [])]
    done = zhllama("status", "r-42", "--wait")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (143, "cancelled: the run was cancelled")
    done = zhllama("status", "r-43")
    assert done.returncode == 2
    assert "Run r-43 not found" in done.stderr


# --- what the API answers ---------------------------------------------------------------------------------------------


ERRORS = [each for each in recorded("exchanges") if each["status"] >= 400]


@pytest.mark.parametrize("exchange", ERRORS, ids=lambda each: each["request"]["path"][-40:])
def test_a_recorded_refusal_is_the_users_to_mend_and_told_to_its_end(exchange):
    body = exchange["body"]
    text = body if isinstance(body, str) else json.dumps(body)
    error = Server("http://kfp").refused(exchange["status"], "x", text)
    assert isinstance(error, InputError)
    assert "try again" not in str(error)
    last = body if isinstance(body, str) else body["message"]
    assert " ".join(last.split())[-80:] in str(error)


@pytest.mark.parametrize(
    ("status", "message", "kind", "said"),
    [
        (500, "InternalServerError: Error 1366 (22007): Incorrect string value: 'x'", InputError, "utf8mb4"),
        (500, "Failed: Already exist error: The name a already exist", InputError, "check the address"),
        (500, "InternalServerError: dial tcp: connection refused", StorageFault, "try again"),
        (503, "upstream connect error", StorageFault, "try again"),
        (500, "Failed to authorize: PermissionDenied: not yours", InputError, "--namespace, of the profile"),
        (429, "too many requests", StorageFault, "try again"),
    ],
)
def test_words_decide_whether_a_500_may_pass(status, message, kind, said):
    error = Server("http://kfp").refused(status, "x", json.dumps({"code": 13, "message": message}))
    assert type(error) is kind
    assert said in str(error)


def test_a_long_answer_is_cut_at_its_beginning_and_loses_its_stack():
    details = (
        "Failed to create a version: " * 60 + "the cause\ngithub.com/kubeflow/pipelines.New\n\t/go/src/error.go:12"
    )
    said = cause(json.dumps({"error_message": "Failed", "error_details": details}))
    assert said.endswith("the cause")
    assert said.startswith("…")
    assert len(said) < 650


REFUSED_WITHOUT_A_WORD = [
    (0, "", ""), (0, "", ""), (0, "", ""),
    (500, "application/json", {"error_message": "Failed to create a pipeline version"}),
]  # fmt: skip


@pytest.mark.parametrize("where", ["a default", "a constant"])
def test_chinese_text_that_the_upload_refuses_without_a_word_is_named(where, compiled, steps, server):
    text = "请介绍一下你自己。"

    @dsl.pipeline(name="test")
    def pipeline(store: str, prompt: str = text if where == "a default" else ""):
        steps.publish(store=store, value=prompt if where == "a default" else text)

    package = compiled(pipeline)
    # kfp escapes it, and repeats a default as it is in a comment
    assert "\\u8BF7" in package.read_text()
    there = Kubeflow(server.host, None)
    server.bodies = list(REFUSED_WITHOUT_A_WORD)
    with pytest.raises(InputError, match=r"请介绍一下你自己。.*latin1 refuses.*ml-pipeline") as refusal:
        there.upload(package, "adapt")
    assert "try again" not in str(refusal.value)


def test_an_upload_of_latin_text_that_is_refused_without_a_word_may_pass_later(package, server):
    package.write_text(package.read_text() + "# 中文 in a comment reaches no database\n", encoding="utf-8")
    there = Kubeflow(server.host, None)
    server.bodies = list(REFUSED_WITHOUT_A_WORD)
    with pytest.raises(StorageFault, match="try again"):
        there.upload(package, "adapt")


def test_a_run_that_is_deleted_while_it_is_followed_is_said(server):
    server.runs["r-7"] = {**recorded("run-cancelled")["body"], "run_id": "r-7", "state": "RUNNING", "state_history": []}
    looks = Kubeflow(server.host, None).follow("r-7", look_every=0.01)
    next(looks)
    del server.runs["r-7"]
    with pytest.raises(StorageFault, match="the run was deleted"):
        list(looks)


def test_a_cancel_that_comes_after_the_end_says_how_the_run_ended(server):
    there = Kubeflow(server.host, None)
    server.course = [("RUNNING", []), ("SUCCEEDED", [])]
    late = next(each for each in ERRORS if each["status"] == 400)["body"]
    server.bodies = [(0, "", ""), (400, "application/json", late)]
    assert there.cancel("r-42").state == "SUCCEEDED"
    assert server.terminated == []
