"""What a layer of a configuration says: a team's file, or words; each value of its setting's type."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from pipelines import sizes
from pipelines.local.placeholders import value_of
from pipelines.setting import Value
from pipelines.settings import SETTINGS
from zhllama.errors import InputError
from zhllama.kubernetes.pods import uid
from zhllama.stage.command_line import nearest

KFP_KINDS = {
    str: "STRING", int: "NUMBER_INTEGER", float: "NUMBER_DOUBLE", bool: "BOOLEAN", dict: "STRUCT", list: "LIST"
}  # fmt: skip
_A = {**sizes.WORDS, dict: "a mapping", list: "a list"}
_NESTED = (("work_", ""), ("adapter_", "lora_"), ("serving_", "serve_"))
"""A team's file may be written as a size's file is: `lora: {memory: 64Gi}` is lora_memory, `work: {data: …}` data_…"""
WORDS_OF_INSTRUCTIONS = ("given", "import", "generate", "none")


def read_file(path: Path) -> dict[str, Value]:
    """A team's file: names as `--set` takes them, or nested as in a size's file. InputError names file and field."""
    value = sizes.read_yaml(path, f"--config {path}")
    if not isinstance(value, Mapping):
        raise InputError(f"--config {path}: settings by name are needed, as `lora_steps: 3000`")
    found: dict[str, Value] = {}
    for name, one in _flat(value, str(path), ""):
        if name in found:
            raise InputError(f"--config {path}: {name} is there twice; keep one")
        found[name] = typed_value(name, one, f"--config {path}: {name}")
    return found


def _flat(value: Mapping[Any, Any], where: str, before: str) -> Iterator[tuple[str, Any]]:
    for key, one in value.items():
        name = f"{before}{key}"
        for nested, flat in _NESTED:
            name = flat + name.removeprefix(nested) if name.startswith(nested) and before else name
        if isinstance(one, Mapping) and name not in SETTINGS:
            yield from _flat(one, where, f"{before}{key}_")
        elif name in SETTINGS or before:
            yield name, one
        else:
            raise InputError(f"--config {where}: there is no setting {name}{nearest(name, SETTINGS)}")


def typed_value(name: str, value: Any, where: str) -> Value:
    """A value as its setting has it. InputError for an unknown name, a wrong type or a choice that there is not."""
    if name not in SETTINGS:
        raise InputError(
            f"{where}: the pipeline has no such parameter{nearest(name, SETTINGS)}; see zhllama parameters"
        )
    setting = SETTINGS[name]
    if isinstance(value, str) and setting.kind is not str:
        value = value_of(value, KFP_KINDS[setting.kind], where)
    elif isinstance(value, int | float) and not isinstance(value, bool) and setting.kind is str:
        value = str(value)
    if isinstance(value, int) and not isinstance(value, bool) and setting.kind is float:
        value = float(value)
    if not isinstance(value, setting.kind) or (isinstance(value, bool) and setting.kind is not bool):
        raise InputError(f"{where}: {value!r} where {_A[setting.kind]} is needed")
    if setting.choices and value not in setting.choices:
        near = nearest(str(value), setting.choices)
        raise InputError(f"{where}: {value!r}{near}; use {' or '.join(filter(None, setting.choices))}")
    checked: Any = value
    # what is written into pods, as the sizes' files are checked
    if re.search(r"(^|_)(cpu|memory|ephemeral_storage)$", name):
        sizes.check_quantity(checked, where)
    if name.endswith("gpu_resource") and checked:
        sizes.check_resource(checked, where)
    counts = name.endswith(("_nodes", "processes_per_node")) and not name.endswith(("min_nodes", "max_nodes"))
    if counts and checked < 1:
        raise InputError(f"{where}: {checked}; at least 1 is needed")
    if name == "run_as_user":
        uid(checked, where)
    return cast(Value, checked)
