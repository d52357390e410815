"""vLLM's server behind the guard: real requests to an application with vLLM's own paths."""

import socket
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from components.serve import vllm_guard
from components.serve.check import Check, check_key
from components.serve.local import listening, running
from components.serve.vllm_guard import Guard
from zhllama.errors import InputError
from zhllama.kubernetes.model_server import GUARD, ModelServer
from zhllama.mounted_secrets import KEY, KEY_FOLDER
from zhllama.stage.command_line import parse

TOKEN = "k" * 32
RIGHT = {"Authorization": f"Bearer {TOKEN}"}
STEERING = (
    "/abort_requests", "/collective_rpc", "/fault_tolerance/apply", "/finish_weight_update", "/get_world_size",
    "/init_weight_transfer_engine", "/is_paused", "/is_sleeping", "/pause", "/release_kv_cache_memory",
    "/reset_prefix_cache", "/resume", "/scale_elastic_ep", "/server_info", "/sleep", "/start_profile", "/stop_profile",
    "/update_weights", "/wake_up", "/docs", "/openapi.json", "/tokenizer_info", "/metrics/more", "/health/", "/v1",
)  # fmt: skip
"""Of vLLM's 0.32, as its routers list them, and some that are near to what is open."""
ASKED = (
    "/v1/chat/completions", "/v1/models", "/v1/responses/a", "/v2/rerank", "/inference/v1/generate", "/cohere/v2/chat",
    "/tokenize", "/detokenize", "/version", "/ping", "/load", "/invocations", "/score", "/rerank", "/classify",
    "/pooling",
)  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    def answer(request: Request) -> PlainTextResponse:
        return PlainTextResponse("answered")

    methods = ["GET", "POST", "PUT", "DELETE", "OPTIONS"]
    key = tmp_path_factory.mktemp("secret") / KEY
    key.write_text(f"{TOKEN}\n")
    vllm = Starlette(routes=[Route("/{path:path}", answer, methods=methods)])
    with listening("127.0.0.1", 0) as listener, running(Guard(vllm, str(key)), listener):
        yield httpx2.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", trust_env=False)


@pytest.mark.parametrize("path", [*STEERING, *ASKED, "/", "//v1/models", "/%76%31/models"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_no_path_but_the_probes_answers_without_the_key(server, path, method):
    for headers in ({}, {"Authorization": f"Bearer {TOKEN}x"}, {"Authorization": TOKEN}, {"Authorization": "Bearer"}):
        assert server.request(method, path, headers=headers).status_code == 401
    twice = [("Authorization", "Bearer x"), ("Authorization", f"Bearer {TOKEN}")]
    assert server.request(method, path, headers=twice).status_code == 401


@pytest.mark.parametrize("path", ["/health", "/metrics"])
def test_probes_and_prometheus_need_no_key_and_only_read(server, path):
    assert server.get(path).text == server.get(path, headers=RIGHT).text == "answered"
    assert server.post(path).status_code == 401


def test_the_keys_holder_asks_and_does_not_steer(server):
    for path in ASKED:
        assert server.post(path, headers=RIGHT).text == "answered"
    for path in STEERING:
        refused = server.post(path, headers=RIGHT)
        assert refused.status_code == 404
        assert refused.json()["error"]["type"] == "invalid_request_error"


def test_a_browsers_question_before_a_request_carries_no_key(server):
    assert server.options("/v1/chat/completions").status_code == 200
    assert server.options("/pause").status_code == 401


def test_a_body_is_not_waited_for(server):
    with socket.create_connection((server.base_url.host, server.base_url.port), timeout=60) as asking:
        # it announces more than it sends
        asking.sendall(b"POST /invocations HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\nx")
        assert asking.recv(12) == b"HTTP/1.1 401"


def test_without_a_key_the_server_does_not_start(tmp_path: Path):
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(RuntimeError, match="there is no API key to ask for"):
        Guard(lambda *_: None, str(tmp_path / "empty"))  # type: ignore[arg-type,return-value]
    for name in ("empty", "missing"):
        with pytest.raises(InputError, match="give the secret of the API key the key"):
            check_key(str(tmp_path / name))
    (tmp_path / "key").write_text(TOKEN)
    check_key(str(tmp_path / "key"))


def test_the_guard_is_where_vllm_looks_for_it_and_needs_nothing_but_python():
    (check,), (vllm,) = (
        ModelServer(name="a", model="s3://bucket/m").pod("server")[f"{kind}ontainers"] for kind in ("initC", "c")
    )
    config = parse(Check, check["args"])
    assert config.guard == next(one["value"] for one in vllm["env"] if one["name"] == "PYTHONPATH")
    assert vllm["args"][-2:] == ["--middleware", f"{GUARD}.{Guard.__name__}"]
    assert config.key_file == f"{KEY_FOLDER}/{KEY}" == vllm_guard.KEY_FILE
    for container in (check, vllm):
        assert {"name": "api-key", "mountPath": KEY_FOLDER} in container["volumeMounts"]
        assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"]
    text = Path(vllm_guard.__file__).read_text(encoding="utf-8")
    imported = [line.split()[1] for line in text.splitlines() if line[:5] in ("impor", "from ")]
    assert set(imported) <= {"hmac", "json", "collections.abc", "pathlib", "typing"}
