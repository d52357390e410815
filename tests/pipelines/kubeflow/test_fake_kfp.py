"""The stand-in for Kubeflow Pipelines, held against what the real one answered: status, kind, and the shape of the
body; of a refusal its code and words too."""

import json
from collections.abc import Iterator
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from tests.pipelines.kubeflow.fake_kfp import API, BEGAN, EXPERIMENT, OVER, FakeKfp, fake_kfp, recorded, task
from tests.pipelines.kubeflow.test_recorded_runs import NAMES

EXCHANGES = recorded("exchanges")


@pytest.fixture
def server() -> Iterator[FakeKfp]:
    """With what the real server held when it was asked."""
    with fake_kfp() as started:
        names = ("adapt-llama-tiny", "adapt-llama-mended", "adapt-llama-7b", "adapt-llama-flat")
        started.pipelines = {name: [] for name in names}
        started.owned = dict.fromkeys(names, "")
        ours = {name: text for name, text in EXPERIMENT.items() if name != "namespace"}
        started.experiments = [{**ours, "display_name": "Default", "description": "All runs"}, ours]
        started.runs[OVER] = {"run_id": OVER, "state": "SUCCEEDED"}
        yield started


def asked(server: FakeKfp, method: str, path: str, body: Any = None) -> tuple[int, str, Any]:
    content = None if body is None else json.dumps(body).encode()
    try:
        with urlopen(Request(server.host + path, content, method=method), timeout=30) as answer:
            text, status, kind = answer.read().decode(), answer.status, answer.headers["Content-Type"]
    except HTTPError as answer:
        text, status, kind = answer.read().decode(), answer.code, answer.headers["Content-Type"]
    return status, kind, json.loads(text) if "json" in kind else text


def shape(value: Any) -> Any:
    """Names and types."""
    if isinstance(value, dict):
        return {name: shape(one) for name, one in value.items()}
    if isinstance(value, list):
        return [shape(one) for one in value]
    return type(value).__name__


@pytest.mark.parametrize("one", EXCHANGES, ids=lambda one: f"{one['request']['method']} {one['request']['path'][-40:]}")
def test_what_the_real_server_answered_the_stand_in_answers(one, server):
    status, kind, body = asked(server, **one["request"])
    assert (status, kind) == (one["status"], one["content_type"])
    assert shape(body) == shape(one["body"])
    if status >= 400:
        assert body == one["body"]


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_run_is_answered_as_it_was(name, server):
    one = recorded(f"run-{name}")
    server.runs[one["body"]["run_id"]] = one["body"]
    assert asked(server, **one["request"]) == (one["status"], one["content_type"], one["body"])


def test_a_run_that_is_made_up_has_nothing_that_a_recorded_one_has_not(server):
    real = recorded("run-cancelled")["body"]
    server.course = [("RUNNING", [task("evaluate", "RUNNING")])]
    made = server.look()
    assert made.keys() <= real.keys()
    assert {name: shape(made[name]) for name in made if isinstance(made[name], str)} == {
        name: shape(real[name]) for name in made if isinstance(made[name], str)
    }
    tasks = [one.keys() for one in real["run_details"]["task_details"] if "start_time" in one]
    assert all(any(one.keys() <= seen for seen in tasks) for one in made["run_details"]["task_details"])


def test_a_run_that_is_told_to_end_ends_as_the_recorded_one_did(server):
    server.course = [("RUNNING", [])]
    server.look()
    assert asked(server, "POST", f"{API}/runs/r-42:terminate")[::2] == (200, {})
    bodies = [asked(server, "GET", f"{API}/runs/r-42")[2] for _ in range(3)]
    assert [one["state"] for one in bodies] == ["CANCELING", "FAILED", "FAILED"]
    real = [one.get("state") for one in recorded("run-cancelled")["body"]["state_history"]]
    assert [one["state"] for one in bodies[-1]["state_history"]] == real[real.index("RUNNING") :]
    assert bodies[-1]["created_at"] == BEGAN


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", f"{API}/runs"), ("POST", f"{API}/recurringruns"),
        ("GET", f"{API}/pipelines?filter=%7B%22predicates%22:%5B%7B%22operation%22:%22IS_SUBSTRING%22%7D%5D%7D"),
    ],
)  # fmt: skip
def test_what_was_not_recorded_the_stand_in_says_that_it_does_not_know(method, path, server):
    status, _, body = asked(server, method, path, {} if method == "POST" else None)
    assert (status, body["code"]) == (501, 12)
    assert "does not know what the real server answers" in body["message"]
