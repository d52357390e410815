"""What stands in front of Kubeflow Pipelines (Dex, oauth2-proxy, Istio, an ingress) and answers in its place. It is not
taken for the API, every command says so at once, with what to set, and nothing is believed to have happened."""

import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from pipelines.cli import runs as commands
from pipelines.kubeflow import connection
from pipelines.kubeflow.answers import Deleted
from pipelines.kubeflow.client import Kubeflow
from tests.pipelines.kubeflow.fake_kfp import API, FakeKfp
from zhllama.errors import InputError, StorageFault

ROOT = Path(__file__).resolve().parents[3]
HTML = {"Content-Type": "text/html; charset=utf-8"}
JSON = {"Content-Type": "application/json"}
DEX = (200, HTML, "<!DOCTYPE html>\n<html><head><title>Log in to Your Account</title></head><form></form></html>")
SIGN_IN = (403, HTML, "<html><head><title>Sign In</title></head><body>Sign in with OpenID Connect</body></html>")
AWAY = (302, {**HTML, "Location": "https://dex.example.com/dex/auth?client_id=kubeflow&state=s3cret"}, "Found")
HERE = (302, {**HTML, "Location": "/dex/auth?client_id=kubeflow"}, "Found")
RBAC = (403, {"Content-Type": "text/plain"}, "RBAC: access denied")
EXPIRED = (401, {**HTML, "WWW-Authenticate": "Bearer"}, "Jwt is expired")
NOT_MINE = (
    403,
    JSON,
    '{"code": 7, "message": "Failed to authorize with API: PermissionDenied: User \'a@b\' is not authorized with reason'
    ': (request: &ResourceAttributes{Namespace:team,Verb:list,Group:pipelines.kubeflow.org})", "details": []}',
)
NO_HEADER = (401, JSON, '{"code": 16, "message": "Request header error: there is no user identity header."}')
DASHBOARD = (404, HTML, "<pre>Cannot GET /apis/v2beta1/healthz</pre>")
FRONT_DOORS = {
    "Dex in place": (DEX, "(Log in to Your Account)"),
    "oauth2-proxy's page": (SIGN_IN, "(Sign In)"),
    "sent to another host": (AWAY, "sends on to https://dex.example.com/dex/auth; "),
    "sent to another path": (HERE, "/dex/auth; "),
    "Istio": (RBAC, "RBAC: access denied"),
    "an expired token": (EXPIRED, "Jwt is expired"),
    "a namespace of others": (NOT_MINE, "Namespace:team"),
    "past the gateway": (NO_HEADER, "no user identity header"),
    "the dashboard": (DASHBOARD, "404"),
    "a text": ((200, {"Content-Type": "text/plain"}, "ok"), "text/plain"),
    "a page without a type": ((200, {"Content-Type": ""}, "<html>"), "something without a type"),
    "a page that says it is JSON": ((200, JSON, "<html><title>Hi</title>"), "(Hi)"),
    "JSON without ids": ((200, JSON, "{}"), "no "),
    "a list": ((200, JSON, "[]"), "where an object belongs"),
    "another's JSON": ((200, JSON, '{"status": "UP"}'), "no "),
}
"""What is called → the answer to everything, and words that have to be said of it."""
doors = pytest.mark.parametrize(("door", "words"), FRONT_DOORS.values(), ids=FRONT_DOORS)


pytestmark = pytest.mark.usefixtures("plain_environment")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    path = tmp_path / "pipeline.yaml"
    path.write_text("root: {}\n")
    return path


Call = Callable[[Kubeflow, Path], object]
CALLS: dict[str, Call] = {
    "submit": lambda there, package: there.start(package, {}, pipeline="p", run_name="r", experiment="zhllama"),
    "upload": lambda there, package: there.upload(package, "p"),
    "--wait": lambda there, package: list(there.follow("r-42", look_every=0.01)),
    "status": lambda there, package: there.run("r-42"),
    "cancel": lambda there, package: there.cancel("r-42"),
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@doors
def test_a_front_door_is_no_api_and_that_is_said_at_once(door, words, server):
    server.always = {"": door}
    with pytest.raises(InputError) as refusal:
        Kubeflow(server.host, None)
    said = str(refusal.value)
    assert words in said
    assert "ZHLLAMA_KFP_TOKEN" in said
    assert "s3cret" not in said
    # of what has no such path, it is asked whether it is version 1
    assert server.asked == [f"GET {API}/healthz", "GET /apis/v1beta1/healthz"][: 2 if door[0] == 404 else 1]


@doors
@calls
def test_a_session_that_ends_on_the_way_ends_every_command(door, words, call, server, package):
    server.course = [("RUNNING", [])]
    there = Kubeflow(server.host, None)
    server.always = {"": door}
    with pytest.raises(InputError):
        call(there, package)


@doors
@pytest.mark.parametrize("stands_at", [f"POST {API}/runs", f"POST {API}/pipelines/upload_version", f"GET {API}/exp"])
def test_no_call_of_a_submit_takes_a_front_door_for_an_answer(door, words, stands_at, server, package):
    there = Kubeflow(server.host, None)
    server.experiments = []
    server.always = {stands_at: door, f"POST {API}/experiments": door}
    with pytest.raises(InputError):
        CALLS["submit"](there, package)
    assert server.started == []


@doors
def test_a_cancel_that_nobody_confirms_is_not_said_to_be_one(door, words, server):
    server.course = [("RUNNING", [])]
    there = Kubeflow(server.host, None)
    server.always = {f"POST {API}/runs/r-42:terminate": door}
    with pytest.raises((InputError, StorageFault)):
        there.cancel("r-42")
    assert server.terminated == []


def test_a_cancel_that_the_server_takes_and_forgets_is_a_fault(server):
    server.course = server.after_terminate = [("RUNNING", [])]
    with pytest.raises(StorageFault, match="told to end, and is still running"):
        Kubeflow(server.host, None).cancel("r-42")


def test_the_answer_about_another_run_is_none(server):
    there = Kubeflow(server.host, None)
    server.runs["r-1"] = {"run_id": "r-2", "state": "SUCCEEDED"}
    with pytest.raises(InputError, match="'r-2' where r-1 was asked for"):
        there.run("r-1")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('{"run_id": 42}', "run_id 42"),
        ('{"run_id": ["r-42"]}', "run_id"),
        ('{"run_id": "r-42", "created_at": "yesterday"}', "does not answer as Kubeflow Pipelines 2"),
        ('{"run_id": "r-42", "run_details": "none"}', "'none' where an object"),
        ('{"run_id": "r-42", "run_details": {"task_details": [7]}}', "7 where an object"),
        ('{"run_id": "r-42", "state_history": {"state": 1}}', "where a list"),
        ('{"run_id": "r-42", "state": 7}', "state 7"),
        ('{"run_id": "<script>"}', "run_id"),
    ],
)
def test_json_of_other_types_is_one_line(body, said, server):
    there = Kubeflow(server.host, None)
    server.always = {"": (200, JSON, body)}
    with pytest.raises(InputError, match=said):
        there.run("r-42")


@pytest.mark.parametrize("body", ["", '{"run_id": "r-4', "   "], ids=["empty", "cut off", "blank"])
@calls
def test_an_answer_that_is_cut_off_is_asked_for_again_and_then_a_fault(body, call, server, package, monkeypatch):
    monkeypatch.setattr("pipelines.kubeflow.client.PATIENCE", 0.0)
    there = Kubeflow(server.host, None)
    server.bodies = [(200, "application/json", body)]
    server.course = [("RUNNING", []), ("SUCCEEDED", [])]
    call(there, package)
    server.always = {"": (200, JSON, body)}
    with pytest.raises(StorageFault, match="empty or cut off"):
        call(there, package)


@pytest.mark.parametrize(
    ("status", "kind", "text"),
    [
        (404, "application/json", '{"error": "Not Found", "code": 5, "message": "Not Found", "details": []}'),
        (404, "text/plain", "404 page not found"),
        (501, "application/json", '{"error": "Not Implemented", "code": 12, "message": "Not Implemented"}'),
    ],
)
def test_a_server_of_version_1_is_said_to_be_one(status, kind, text, server):
    old = (200, JSON, '{"commit_sha": "a1b2", "tag_name": "1.8.5", "multi_user": false}')
    server.always = {"GET /apis/v1beta1/healthz": old, "": (status, {"Content-Type": kind}, text)}
    with pytest.raises(InputError, match=r"is Kubeflow Pipelines 1\.8\.5, and its API is older .* version 2 is needed"):
        Kubeflow(server.host, None)


STATES = ["EXPLODED", "succeeded", "RUNTIME_STATE_UNSPECIFIED", "", None]


@pytest.mark.parametrize("state", STATES)
def test_a_state_that_nobody_knows_is_no_success(state, server, monkeypatch, capsys):
    monkeypatch.setattr("pipelines.kubeflow.client.PATIENCE", 0.0)
    server.runs["r-1"] = {"run_id": "r-1", "display_name": "mine", "state": state}
    for wait in (False, True):
        given = Namespace(host=server.host, kfp_namespace="kubeflow", namespace=None, run="r-1", wait=wait)
        with pytest.raises(SystemExit) as ended:
            commands.status(given)
        assert ended.value.code == 1
        shown = capsys.readouterr()
        assert f"not known ({state or 'none'})" in shown.out
        assert "fault: the server" in shown.out + shown.err
    with pytest.raises(StorageFault, match=r"told to end, and is still not known"):
        Kubeflow(server.host, None).cancel("r-1")


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (InputError("a login page"), True), (StorageFault("away"), True), (SystemExit(143), True),
        (KeyboardInterrupt(), True), (Deleted("the run was deleted"), False),
    ],
    ids=lambda one: type(one).__name__,
)  # fmt: skip
def test_what_ends_the_following_is_not_taken_for_the_runs_end(end, said, server, monkeypatch, capsys):
    kubeflow = Kubeflow(server.host, None)

    def follow(run_id):
        yield kubeflow.run(run_id)
        raise end

    monkeypatch.setattr(kubeflow, "follow", follow)
    server.course = [("RUNNING", [])]
    with pytest.raises(type(end)):
        commands._follow(kubeflow, "r-42")
    assert ("the run goes on: zhllama status r-42, zhllama cancel r-42" in capsys.readouterr().err) is said


def test_of_a_run_that_was_never_seen_nothing_is_said(server, capsys):
    with pytest.raises(InputError):
        commands._follow(Kubeflow(server.host, None), "r-none")
    assert "goes on" not in capsys.readouterr().err


def test_a_state_that_nobody_knows_for_a_moment_is_waited_for(server):
    server.runs["r-1"] = {"run_id": "r-1", "state": "EXPLODED"}
    looks = Kubeflow(server.host, None).follow("r-1", look_every=0.01)
    assert not next(looks).known
    server.runs["r-1"] = {"run_id": "r-1", "state": "SUCCEEDED"}
    assert [run.state for run in looks] == ["SUCCEEDED"]


@pytest.mark.parametrize("time", ["2026-01-01T00:00:00", "9999-12-31T23:59:59-23:00", "2026-01-01T00:00:00+99:00"])
def test_a_time_that_is_none_of_this_world_ends_in_no_traceback(time, server):
    there = Kubeflow(server.host, None)
    server.runs["r-1"] = {"run_id": "r-1", "state": "RUNNING", "created_at": time}
    with suppress(InputError):
        there.whole(there.run("r-1"))


def test_what_a_server_lists_under_another_name_is_not_taken(server, package):
    """One that knows no filters lists all that it has."""
    there = Kubeflow(server.host, None)
    server.pipelines["p"], server.owned["p"] = [], ""
    other = '{"pipelines": [{"pipeline_id": "other", "display_name": "q"}, {"pipeline_id": "p", "display_name": "p"}]}'
    server.bodies = [(200, "application/json", other)]
    assert there.upload(package, "p")[0] == "p"


@pytest.mark.parametrize("limit", ["MOST_BYTES", "MOST_SECONDS"])
def test_an_answer_that_never_ends_is_given_up(limit, server, monkeypatch):
    there = Kubeflow(server.host, None)
    monkeypatch.setattr(connection, limit, 0.05 if limit == "MOST_SECONDS" else 2**16)

    def never_ending(handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        with suppress(OSError):
            while True:
                handler.wfile.write(b"400\r\n" + b" " * 1024 + b"\r\n")

    monkeypatch.setattr(server.RequestHandlerClass, "do_GET", never_ending)
    with pytest.raises(InputError, match="was answered with 200 and no end within"):
        there.run("r-42")


@pytest.mark.parametrize("status", [429, 502, 503, 504])
@calls
def test_a_gateway_that_restarts_is_waited_for(status, call, server, package):
    there = Kubeflow(server.host, None)
    server.course = [("RUNNING", []), ("SUCCEEDED", [])]
    server.bodies = [(status, "text/html", "<html><title>Bad Gateway</title></html>")] * 2
    call(there, package)


def test_a_gateway_that_stays_away_is_said_while_it_is_waited_for_and_then_a_fault(server, caplog):
    there = Kubeflow(server.host, None)
    server.answers = [503] * 1000
    with pytest.raises(StorageFault, match="answered 503"):
        there.run("r-42")
    (line,) = [record.message for record in caplog.records if record.name == "kubeflow"]
    assert "answered 503" in line
    assert "asking again for" in line


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_run_that_may_have_been_started_is_not_started_twice(status, server, package):
    there = Kubeflow(server.host, None)
    server.always = {f"POST {API}/runs": (status, HTML, "<html>")}
    with pytest.raises(StorageFault, match=r"may have been started: look at .*/#/runs before you try again"):
        CALLS["submit"](there, package)
    assert server.asked.count(f"POST {API}/runs") == 1


def test_a_port_forward_that_comes_back_is_waited_for(server, monkeypatch):
    """Nobody listens for a moment: what was not sent may be sent again, whatever it is."""
    monkeypatch.setattr(connection, "PATIENCE", 20.0)
    there = Kubeflow(server.host, None)
    pool = there._client._run_api.api_client.rest_client.pool_manager
    asked, real = [], pool._pool

    class Gone:
        def request(self, method: str, url: str, **options: object) -> object:
            asked.append(url)
            where = url.replace(server.host, "http://127.0.0.1:9") if len(asked) < 3 else url
            return real.request(method, where, **options)

    pool._pool = Gone()
    assert there.run("r-42").name == "mine"
    assert len(asked) == 3


def test_a_name_that_nobody_has_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(connection, "PATIENCE", 600.0)
    with pytest.raises(InputError, match="no Kubeflow Pipelines answers there"):
        Kubeflow("http://kfp.example.invalid", None)


# --- what to set ------------------------------------------------------------------------------------------------------


def said_of(
    server: FakeKfp, door: tuple[int, dict[str, str], str], path: str = "", namespace: str | None = None
) -> str:
    server.always = {"": door}
    with pytest.raises(InputError) as refusal:
        Kubeflow(server.host + path, namespace)
    return str(refusal.value)


def test_without_a_token_one_is_asked_for_and_with_one_it_is_doubted(server, monkeypatch):
    assert "set ZHLLAMA_KFP_TOKEN, or ZHLLAMA_KFP_TOKEN_FILE, to a token" in said_of(server, DEX)
    monkeypatch.setenv("ZHLLAMA_KFP_TOKEN", "t0k\n")
    said = said_of(server, EXPIRED)
    assert "the token of ZHLLAMA_KFP_TOKEN is of this server and has not expired" in said
    assert server.tokens[-1] == "Bearer t0k"
    assert "t0k" not in said


def test_the_path_below_the_gateway_is_named_where_it_may_be_what_lacks(server):
    assert f"--host {server.host}/pipeline" in said_of(server, DASHBOARD)
    assert "below /pipeline" not in said_of(server, DEX, "/pipeline")
    assert "below /pipeline" not in said_of(server, NOT_MINE)


def test_a_namespace_is_asked_for_where_the_api_knows_who_asks(server):
    assert "check --namespace, of the profile that is this account's" in said_of(server, NOT_MINE)
    assert "check that --namespace team is this account's" in said_of(server, NOT_MINE, namespace="team")


@pytest.mark.parametrize("token", [" ", "a b", "ключ", "a\nb"])
def test_a_token_that_no_header_can_hold_is_one_line(token, server, monkeypatch, tmp_path):
    monkeypatch.setenv("ZHLLAMA_KFP_TOKEN", token)
    with pytest.raises(InputError, match="ZHLLAMA_KFP_TOKEN: it holds no token"):
        Kubeflow(server.host, None)
    monkeypatch.delenv("ZHLLAMA_KFP_TOKEN")
    (tmp_path / "token").write_text(token, encoding="utf-8")
    monkeypatch.setenv("ZHLLAMA_KFP_TOKEN_FILE", str(tmp_path / "token"))
    with pytest.raises(InputError, match=r"ZHLLAMA_KFP_TOKEN_FILE=.*it holds no token"):
        Kubeflow(server.host, None)
    assert server.asked == []


def test_the_address_as_a_browser_shows_it_is_taken(server):
    assert Kubeflow(f"{server.host}/#/runs", None).address == server.host


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("words", [("status", "r-42"), ("status", "r-42", "--wait"), ("cancel", "r-42")], ids=" ".join)
def test_a_command_before_a_login_page_ends_with_2_and_one_line(words, server):
    server.always = {"": DEX}
    command = [sys.executable, "-m", "pipelines", *words, "--host", server.host]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
    assert "Log in to Your Account" in done.stderr
