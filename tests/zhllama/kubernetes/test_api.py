"""Answers of a real API server, as the client judges them: what may pass is asked again, the rest is not."""

import io
import json
from typing import Any

import pytest
from kubernetes.client.exceptions import ApiException
from urllib3 import HTTPResponse

from tests.recordings import exchanges
from zhllama.kubernetes import api
from zhllama.kubernetes.api import call, passes, plain, unanswered

PASSING = {
    "webhook/no-endpoints", "webhook/no-endpoints-pytorchjob", "webhook/no-service", "evict/budget",
    "list/version-future",
}  # fmt: skip
"""A webhook that is away, a budget that is used up, a server that has not caught up."""


@pytest.fixture(autouse=True)
def _no_account(monkeypatch):
    monkeypatch.setattr(api, "_account", [])


def answer(body: Any) -> HTTPResponse:
    return HTTPResponse(body, status=200, preload_content=False)


def refusals():
    """Id → the recorded answer as the client raises it."""
    for name, one in exchanges().items():
        answer = one["response"]
        if answer["status"] >= 400:
            lines = [line["line"] for line in answer.get("lines", ())]
            error = ApiException(status=answer["status"])
            error.body = json.dumps(answer.get("body") or (lines[0] if lines else answer.get("text")))
            error.headers = {"Retry-After": "0"}
            yield name, error


def test_of_all_recorded_refusals_these_are_asked_again():
    assert {name for name, error in refusals() if passes(error)} == PASSING


@pytest.mark.parametrize(
    "words",
    [
        "etcdserver: request timed out",
        "etcdserver: leader changed",
        "rpc error: code = Unavailable",
        "context canceled",
    ],
)
def test_other_500s_may_pass(words):
    error = ApiException(status=500)
    error.body = json.dumps({"kind": "Status", "message": words, "code": 500})
    assert passes(error)


@pytest.mark.parametrize("name", ["unknown/apply-crd", "large/etcd", "auth/expired-token", "quota/count-pytorchjobs"])
def test_an_answer_that_stays_is_raised_at_once(name):
    error = dict(refusals())[name]
    asked = []

    def request(**_):
        asked.append(name)
        raise error

    with pytest.raises(ApiException):
        call(request)
    assert asked == [name]


@pytest.mark.parametrize(
    "content",
    [b"<html><title>Log in</title>", b"", b"ok", b"{}", b"null", b"[]", b'{"kind": 3}', b'{"kind": "PodList"}',
     b'{"kind": "PodList", "items": 3}', b'{"error": "unauthenticated"}'],
)  # fmt: skip
def test_a_page_in_place_of_an_answer_is_said(content):
    with pytest.raises(ApiException) as raised:
        call(plain, call=lambda **_: answer(io.BytesIO(content)))
    said = f"200 OK, but no answer of an API server ({content.decode()}); a login page or a proxy's?"
    said += " Check the server in KUBECONFIG"
    assert str(unanswered(raised.value)) == f"the Kubernetes API server failed: {said}"


class Endless(io.RawIOBase):
    """Counts what it gave."""

    given = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        buffer[:] = b" " * len(buffer)
        self.given += len(buffer)
        return len(buffer)


def test_an_answer_without_end_is_no_answer(monkeypatch):
    monkeypatch.setattr(api, "LONGEST", 2**20)
    body = Endless()
    with pytest.raises(ApiException, match="no answer of an API server"):
        call(plain, call=lambda **_: answer(body))
    assert 2**20 < body.given < 2**21
