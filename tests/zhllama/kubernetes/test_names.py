"""Names and labels that Kubernetes takes pass, others are refused with what is allowed."""

from functools import partial
from typing import Any

import pytest

from zhllama.errors import InputError
from zhllama.kubernetes.names import check_namespace, check_value


def _check(name: str, option: str, value: Any) -> None:
    check_value(name, value, option)


check_name, check_labels, check_keys = (partial(_check, name) for name in ("s3_secret", "labels", "annotations"))

TAKEN = [
    (check_namespace, "team-1"),
    (check_namespace, "a" * 63),
    (check_name, "zhllama-s3"),
    (check_name, "a.b-c.d"),
    (check_name, "a" * 253),
    (check_labels, {"team": "nlp", "a.b/c_d": "X.y_z-1", "empty": ""}),
    (check_keys, {"k8s.v1.cni.cncf.io/networks": '[{"any": "text"}]'}),
]
REFUSED = [
    (check_namespace, "Team"),
    (check_namespace, "a.b"),
    (check_namespace, "a" * 64),
    (check_namespace, ""),
    (check_name, "my secret"),
    (check_name, "-a"),
    (check_name, "a..b"),
    (check_name, "a" * 254),
    (check_labels, {"a b": "c"}),
    (check_labels, {"a": "b c"}),
    (check_labels, {"a": "b" * 64}),
    (check_labels, {"a": "b-"}),
    (check_keys, {"a/b/c": "d"}),
]


@pytest.mark.parametrize(("check", "value"), TAKEN)
def test_what_kubernetes_takes_passes(check, value):
    check("--option", value)


@pytest.mark.parametrize(("check", "value"), REFUSED)
def test_what_it_refuses_is_refused_with_what_is_allowed(check, value):
    with pytest.raises(InputError, match=r"^--option: .*must (be|have)"):
        check("--option", value)
