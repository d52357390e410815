"""Where the pods of a job or a server go, and what they are given there. Options that are mappings and lists are JSON,
as KFP writes its parameters of these kinds into a command."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from zhllama.errors import InputError

_OPERATORS = ("Exists", "Equal")
_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
_TOLERATION = {"key": str, "operator": str, "value": str, "effect": str, "tolerationSeconds": int}


def mapping(option: str, text: str) -> dict[str, str]:
    """`{"team": "nlp"}` → that mapping; "" is none. InputError for anything but texts by name."""
    value = _json(option, text, "{}", '{"name": "value"}')
    if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
        raise InputError(f'{option} {text}: write texts by name, as {{"name": "value"}}')
    return value


def tolerations(option: str, text: str) -> tuple[Mapping[str, Any], ...]:
    """`[{"key": "nvidia.com/gpu", "operator": "Exists"}]` → those tolerations; "" is none. InputError for others."""
    shape = '[{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]'
    value = _json(option, text, "[]", shape)
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise InputError(f"{option} {text}: write a list of tolerations, as {shape}")
    for one in value:
        for name, given in one.items():
            if type(given) is not _TOLERATION.get(name):
                known = ", ".join(f"{field} ({kind.__name__})" for field, kind in _TOLERATION.items())
                raise InputError(f"{option}: {name}: {given!r} is nothing that a toleration has; it has {known}")
        for name, choices in (("operator", _OPERATORS), ("effect", _EFFECTS)):
            if one.get(name, choices[0]) not in choices:
                raise InputError(f"{option}: {name}: {one[name]!r}; use {' or '.join(choices)}")
    return tuple(value)


def place(
    pod: dict[str, Any],
    ca_config_map: str,
    pull_secret: str,
    node_selector: Mapping[str, str],
    tolerations: Sequence[Mapping[str, Any]],
) -> None:
    """Puts into a pod's spec, which has volumes, what its platform asks of it; what is empty is left out."""
    if ca_config_map:
        pod["volumes"].append({"name": "ca", "configMap": {"name": ca_config_map, "optional": True}})
    if pull_secret:
        pod["imagePullSecrets"] = [{"name": pull_secret}]
    if node_selector:
        pod["nodeSelector"] = dict(node_selector)
    if tolerations:
        pod["tolerations"] = [dict(toleration) for toleration in tolerations]


def _json(option: str, text: str, empty: str, shape: str) -> Any:
    try:
        return json.loads(text or empty)
    except ValueError as error:
        raise InputError(f"{option} {text}: not JSON ({error}); write {shape}") from error
