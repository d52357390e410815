"""A run is started through KFP's own client, against a server that speaks what of its API that needs."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from kfp import dsl

from components.shared.errors import InputError, StorageFault
from pipelines.submit import submit_run

EXPERIMENT = {"experiment_id": "e1", "display_name": "zhllama", "namespace": "team"}


class FakeKfp(ThreadingHTTPServer):
    """Knows one experiment, starts runs, and keeps what it was sent. `answer`: a status it gives to every start."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.started: list[dict[str, Any]] = []
        self.tokens: set[str] = set()
        self.answer = 200

    @property
    def host(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeKfp

    def do_GET(self) -> None:
        self.server.tokens.add(self.headers.get("Authorization", ""))
        if "/experiments" in self.path:
            self._say(200, {"experiments": [EXPERIMENT]} if "?" in self.path else EXPERIMENT)
        else:
            self._say(200, {"multi_user": False})

    def do_POST(self) -> None:
        value = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.answer != 200:
            self._say(self.server.answer, {"message": "no such namespace"})
        elif self.path.endswith("/runs"):
            self.server.started.append(value)
            self._say(200, {**value, "run_id": "r-42"})
        else:
            self._say(200, EXPERIMENT)

    def _say(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def kfp_server() -> Iterator[FakeKfp]:
    server = FakeKfp()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def package(compiled, steps):
    @dsl.pipeline(name="test")
    def pipeline(store: str, number: int = 3):
        steps.publish(store=store, value=f"{number}")

    return compiled(pipeline)


def test_a_run_starts_with_typed_parameters_and_its_address_is_given(package, kfp_server):
    address = submit_run(
        package,
        {"store": "s3://a/b", "number": "5"},
        host=kfp_server.host + "/",
        run_name="mine",
        namespace="team",
        token="t0k",
    )
    assert address == f"{kfp_server.host}/#/runs/details/r-42"
    (started,) = kfp_server.started
    assert started["display_name"] == "mine"
    assert started["experiment_id"] == "e1"
    assert started["runtime_config"]["parameters"] == {"store": "s3://a/b", "number": 5}
    assert "Bearer t0k" in kfp_server.tokens


def test_a_wrong_parameter_is_refused_before_anything_is_sent(package, kfp_server):
    with pytest.raises(InputError, match=r"--set stor: .* \(did you mean store\?\)"):
        submit_run(package, {"stor": "s3://a/b"}, host=kfp_server.host, run_name="mine")
    assert kfp_server.started == []


@pytest.mark.parametrize(
    ("status", "kind", "said"),
    [(404, InputError, "404 .*no such namespace.*check the address"), (503, StorageFault, "503 .*try again")],
)
def test_a_refusal_and_a_failing_server_are_one_line(package, kfp_server, status, kind, said):
    kfp_server.answer = status
    with pytest.raises(kind, match=f"answered {said}"):
        submit_run(package, {"store": "s3://a/b"}, host=kfp_server.host, run_name="mine")


def test_a_host_where_nobody_answers_is_one_line(package):
    with pytest.raises(InputError, match=r"--host http://127\.0\.0\.1:9: no Kubeflow Pipelines answers there"):
        submit_run(package, {"store": "s3://a/b"}, host="http://127.0.0.1:9", run_name="mine")
