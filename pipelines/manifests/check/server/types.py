"""Kubernetes' own kinds as the server decodes them (every field known, and of its type), and validates them: the fields
and rules of each type, wherever the type stands. The types come from kubernetes-validate."""

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pipelines.manifests.check.documents import WORKS, Document, Finding
from pipelines.manifests.check.field import Field
from pipelines.manifests.check.server import (
    containers,
    metadata,
    networking,
    objects,
    pods,
    scheduling,
    volumes,
    workloads,
)
from pipelines.manifests.check.server import security_context as security
from zhllama.errors import InputError
from zhllama.kubernetes import formats

VERSION = "1.34"
"""Of Kubernetes: the one whose answers the rules were held against."""
Rule = Callable[[Field], Iterator[Finding]]
_MODULES: tuple[Any, ...] = (metadata, pods, containers, security, volumes, scheduling, workloads, networking, objects)
FIELDS: Mapping[str, Mapping[str, formats.Check]] = {
    name: checks for module in _MODULES for name, checks in module.FIELDS.items()
}
"""Type → field → what is checked of its value."""
RULES: Mapping[str, list[Rule]] = {name: rules for module in _MODULES for name, rules in module.RULES.items()}
"""Type → what its fields say of each other."""
_MAY_LACK = {
    "StatefulSetSpec": {"serviceName"}, "Sysctl": {"value"}, "PriorityClass": {"value"}, "LimitRangeSpec": {"limits"},
    "NetworkPolicySpec": {"podSelector"}, "PreferredSchedulingTerm": {"preference"}, "SleepAction": {"seconds"},
    "WeightedPodAffinityTerm": {"podAffinityTerm"},
}  # fmt: skip
"""Fields that the schema says are needed, and the server does without."""
_LATER = {("StatefulSetSpec", "template")}
"""Parts that are decoded with the object, and validated when pods are made of them."""
_WORDS = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "a mapping"}
_TYPES: Mapping[str, Any] = {
    "string": str, "boolean": bool, "integer": int, "number": (int, float), "array": list, "object": dict,
}  # fmt: skip
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)")


@functools.cache
def definitions(version: str = VERSION) -> Mapping[str, Any]:
    """Name → schema of every type. InputError for a version that is not at hand."""
    from kubernetes_validate import utils

    known = {utils.major_minor(one): one for one in utils.all_versions()}
    if version.removeprefix("v") not in known:
        raise InputError(f"--kubernetes {version}: known are {', '.join(known)}")
    full = known[version.removeprefix("v")]
    path = f"kubernetes-json-schema/v{full}-local-strict/_definitions.json"
    found: Mapping[str, Any] = utils.schema_contents(path, full)["$defs"]
    return found


@functools.cache
def _kinds(version: str) -> Mapping[tuple[str, str], str]:
    """(apiVersion, kind) → the name of its type."""
    found = {}
    for name, schema in definitions(version).items():
        for one in schema.get("x-kubernetes-group-version-kind", ()):
            group = f"{one['group']}/" if one["group"] else ""
            found[f"{group}{one['version']}", one["kind"]] = name
    return found


def is_own(document: Document, version: str) -> bool:
    """Whether its group is one of Kubernetes' own."""
    groups = {api_version.rpartition("/")[0] for api_version, _ in _kinds(version)}
    return document.api_version.rpartition("/")[0] in groups


def check_own(document: Document, version: str) -> Iterator[Finding]:
    """Decoding and validation of one of Kubernetes' own kinds."""
    name = _kinds(version).get((document.api_version, document.kind))
    if name is None:
        kinds = [kind for api_version, kind in _kinds(version) if api_version == document.api_version]
        near = difflib.get_close_matches(document.kind, kinds, 1)
        wrong = f"there is no {document.kind} in {document.api_version} of Kubernetes {version}"
        wrong += f"; is {near[0]} meant?" if near else "; correct one of them"
        yield Field(document)["kind"].wrong(wrong, "schema")
        return
    reference = {"$ref": name}
    document.value = without_nulls(document.value, reference, version)
    yield from walk(Field(document, value=document.value), reference, version)


def check_part(field: Field, name: str, version: str) -> Iterator[Finding]:
    """A part of a custom resource that is one of Kubernetes' types: `io.k8s.api.core.v1.PodTemplateSpec`."""
    reference = {"$ref": name}
    cleaned = without_nulls(field.value, reference, version)
    yield from walk(dataclasses.replace(field, value=cleaned), reference, version)


def walk(field: Field, schema: Mapping[str, Any], version: str) -> Iterator[Finding]:
    """What is wrong with a value of a type."""
    value = field.value
    if value is None:
        return
    reference = schema.get("$ref", "").rpartition("/")[2]
    name = reference.rpartition(".")[2]
    if name in _SPECIAL:
        if wrong := _SPECIAL[name](value):
            yield field.wrong(wrong, "schema")
        return
    if reference:
        schema = definitions(version)[reference]
    if wrong := _of_type(value, schema):
        yield field.wrong(wrong, "schema")
    elif isinstance(value, list):
        for item in field.items():
            yield from walk(item, schema.get("items", {}), version)
    elif isinstance(value, dict) and isinstance(schema.get("properties"), dict):
        yield from _fields(field, name, schema, version)
    elif isinstance(value, dict) and isinstance(schema.get("additionalProperties"), dict):
        for key in value:
            yield from walk(field[key], schema["additionalProperties"], version)


def _fields(field: Field, name: str, schema: Mapping[str, Any], version: str) -> Iterator[Finding]:
    known = schema["properties"]
    set_aside = field.place[:1] == ("status",)  # decoded, and forgotten
    checks = {} if set_aside else FIELDS.get(name, {})
    for key in field.value:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            wrong = f"{key!r} was unexpected: " + (f"is {near[0]} meant?" if near else "no field of that name is known")
            yield field[key].wrong(wrong, "schema")
    for key in schema.get("required", ()) if not set_aside else ():
        if not field[key] and key not in _MAY_LACK.get(name, ()) and not hasattr(checks.get(key), "needed"):
            yield field[key].wrong("is needed")
    sound = True
    for key, inner in known.items():
        for found in walk(field[key], inner, version) if key in field.value else ():
            sound &= found.rule != "schema"
            later = (name, key) in _LATER and found.rule != "schema"
            yield dataclasses.replace(found, grade=WORKS) if later else found
    for key, check in checks.items():
        value, inner = field[key].value, known.get(key, {})
        absent = value is None or value == ""
        if inner and (hasattr(check, "needed") or not absent) and (value is None or not _of_type(value, inner)):
            try:
                wrong = check(value)
            except (TypeError, AttributeError):  # of another type, which has been said
                continue
            if wrong:
                yield field[key].wrong(f"{_shown(value)}{wrong}")
    for rule in RULES.get(name, ()) if sound and not set_aside else ():  # they count on the types
        yield from rule(field)


def _of_type(value: Any, schema: Mapping[str, Any]) -> str:
    """What is wrong with a value's type."""
    types = schema.get("type", ())
    kind = types if isinstance(types, str) else next((one for one in types if one != "null"), "")
    wanted = _TYPES.get(kind)
    if wanted is None:
        return ""
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        words = {"string": "text", "boolean": "true or false", "array": "a list", "object": "a mapping"}
        quote = "; put it in quotes" if kind == "string" and not isinstance(value, (list, dict)) else ""
        return f"must be {words.get(kind, 'a number')}, is {_shown(value, '')}{quote}"
    bits = {"int32": 31, "int64": 63}.get(schema.get("format", ""))
    if bits and not -(2**bits) <= value < 2**bits:
        return f"{value} is out of range"
    if schema.get("format") == "byte" and (wrong := formats.base64_text(value)):
        return wrong
    return ""


def _shown(value: Any, end: str = ": ") -> str:
    if value is None or isinstance(value, (dict, list)):
        return _WORDS.get(type(value), "nothing") if not end else ""
    text = ("true" if value else "false") if isinstance(value, bool) else repr(value)
    return f"{text[:80]}{end}"


def _int_or_text(value: Any) -> str:
    good = isinstance(value, (int, str)) and not isinstance(value, bool)
    return "" if good else "must be a whole number or text"


def _quantity(value: Any) -> str:
    wrong = formats.quantity(value)
    return f"{_shown(value, '')} {wrong}" if wrong else ""


def _time(value: Any) -> str:
    return "" if isinstance(value, str) and _TIME.fullmatch(value) else "must be a time, as 2026-01-31T00:00:00Z"


_SPECIAL: Mapping[str, formats.Check] = {
    "Quantity": _quantity, "IntOrString": _int_or_text, "Time": _time, "MicroTime": _time, "JSON": lambda _: "",
    "RawExtension": lambda value: "" if isinstance(value, dict) else "must be a mapping", "FieldsV1": lambda _: "",
    **dict.fromkeys(("JSONSchemaPropsOrArray", "JSONSchemaPropsOrBool", "JSONSchemaPropsOrStringArray"), lambda _: ""),
    "JSONSchemaProps": lambda value: "" if isinstance(value, dict) else "must be a mapping",
}  # fmt: skip


def without_nulls(value: Any, schema: Mapping[str, Any], version: str) -> Any:
    """As the decoder has it: a null field is none, a null in a list or a map is the type's zero."""
    reference = schema.get("$ref", "").rpartition("/")[2]
    if reference.rpartition(".")[2] in _SPECIAL:
        return value
    if reference:
        schema = definitions(version)[reference]
    if isinstance(value, list):
        inner = schema.get("items", {})
        return [without_nulls(_zero(inner) if one is None else one, inner, version) for one in value]
    if not isinstance(value, dict):
        return value
    known = schema.get("properties")
    if isinstance(known, dict):
        given = {key: one for key, one in value.items() if one is not None}
        return {key: without_nulls(one, known.get(key, {}), version) for key, one in given.items()}
    inner = schema.get("additionalProperties")
    inner = inner if isinstance(inner, dict) else {}
    return {key: without_nulls(_zero(inner) if one is None else one, inner, version) for key, one in value.items()}


def _zero(schema: Mapping[str, Any]) -> Any:
    if "$ref" in schema:
        return 0 if schema["$ref"].endswith((".Quantity", ".IntOrString")) else {}
    types = schema.get("type", ())
    kind = types if isinstance(types, str) else next((one for one in types if one != "null"), "")
    return {"string": "", "integer": 0, "number": 0, "boolean": False, "array": [], "object": {}}.get(kind)
