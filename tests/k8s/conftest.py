"""Overlays, built."""

import pytest

from tests.k8s.kustomizations import Object, build


@pytest.fixture(scope="session")
def cluster() -> list[Object]:
    return build("overlays/cluster")


@pytest.fixture(scope="session")
def profile() -> list[Object]:
    return build("overlays/profile")
