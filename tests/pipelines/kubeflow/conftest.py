"""A stand-in of Kubeflow Pipelines, and an environment that says nothing of any other."""

from collections.abc import Iterator

import pytest

from pipelines.kubeflow import connection
from tests.pipelines.kubeflow.fake_kfp import FakeKfp, fake_kfp


@pytest.fixture
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    proxies = [word for name in ("http_proxy", "https_proxy", "no_proxy") for word in (name, name.upper())]
    certificates = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
    monkeypatch.setenv("KUBECONFIG", "/nonexistent")
    for name in ("ZHLLAMA_KFP_TOKEN", "ZHLLAMA_KFP_TOKEN_FILE", "KUBERNETES_SERVICE_HOST", *proxies, *certificates):
        monkeypatch.delenv(name, raising=False)
    # what is asked again is asked again at once
    monkeypatch.setattr(connection, "PATIENCE", 0.2)
    monkeypatch.setattr(connection, "FIRST_WAIT", 0.01)


@pytest.fixture
def server() -> Iterator[FakeKfp]:
    with fake_kfp() as started:
        yield started
