"""The tables of rules name types and fields that exist, each in one place; nulls are what the decoder makes of them."""

from collections import Counter
from typing import Any

import pytest

from pipelines.manifests.check.server import types

POD = {"$ref": "io.k8s.api.core.v1.Pod"}
CONFIG_MAP = {"$ref": "io.k8s.api.core.v1.ConfigMap"}


def properties() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, schema in types.definitions().items():
        found.setdefault(name.rpartition(".")[2], set()).update(schema.get("properties", {}))
    return found


def test_rules_name_types_that_exist_and_fields_that_these_have() -> None:
    known = properties()
    assert {*types.FIELDS, *types.RULES} <= set(known)
    strangers = {(name, field) for name, checks in types.FIELDS.items() for field in checks if field not in known[name]}
    # counts that several workloads share
    assert strangers == {("ReplicaSetSpec", "revisionHistoryLimit"), ("DaemonSetSpec", "replicas")}


@pytest.mark.parametrize("table", ["FIELDS", "RULES"])
def test_a_type_has_its_rules_in_one_module(table: str) -> None:
    named = Counter(name for module in types._MODULES for name in getattr(module, table))
    assert [name for name, times in named.items() if times > 1] == []


@pytest.mark.parametrize(
    ("schema", "value", "cleaned"),
    [
        (CONFIG_MAP, {"data": {"a": None}, "metadata": None}, {"data": {"a": ""}}),
        (POD, {"metadata": {"labels": {"a": None}, "name": None}}, {"metadata": {"labels": {"a": ""}}}),
        (POD, {"spec": {"containers": [{"args": [None]}, None]}}, {"spec": {"containers": [{"args": [""]}, {}]}}),
        (
            POD,
            {"spec": {"containers": [{"resources": {"limits": {"cpu": None}}}]}},
            {"spec": {"containers": [{"resources": {"limits": {"cpu": 0}}}]}},
        ),
    ],
    ids=["map", "labels", "lists", "quantities"],
)
def test_nulls(schema: dict[str, str], value: Any, cleaned: Any) -> None:
    assert types.without_nulls(value, schema, types.VERSION) == cleaned
