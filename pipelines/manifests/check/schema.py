"""Custom resources against their definitions, as the API server holds them: strictly (a field that the schema does not
list is a mistake, not an extension), nulls dropped, defaults counted as given, keyed lists without repeats, CEL rules.

The definitions are a cluster's: `kubectl get crd pytorchjobs.kubeflow.org -o yaml`.
"""

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.manifests.check import cel
from pipelines.manifests.check.documents import ADVICE, Document, Finding
from pipelines.manifests.check.field import Field
from pipelines.manifests.check.server.metadata import object_metadata
from pipelines.manifests.check.server.types import check_part
from zhllama.artifacts.yaml_file import documents_of
from zhllama.errors import InputError

METADATA = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
Definitions = Mapping[tuple[str, str], dict[str, Any]]
"""(group, kind) → the definition's specification."""


@functools.cache  # a folder of them takes 2 s
def definitions(folder: Path) -> Definitions:
    """The custom resources whose definitions lie in a folder."""
    if not folder.is_dir():
        raise InputError(f"--crds {folder}: no such folder; give one with CustomResourceDefinition files")
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".yaml", ".yml")):
        try:
            values = documents_of(path.read_bytes())
        except (OSError, ValueError) as error:
            raise InputError(f"--crds {path}: not a readable YAML file; take it out of the folder") from error
        for value in values:
            items = value.get("items") if isinstance(value, dict) and value.get("kind") == "List" else None
            for one in items if isinstance(items, list) else [value]:
                if isinstance(one, dict) and one.get("kind") == "CustomResourceDefinition":
                    _require_definition(one.get("spec"), f"--crds {path}")
                    found[one["spec"]["group"], one["spec"]["names"]["kind"]] = one["spec"]
    return found


def _of(**properties: Any) -> dict[str, Any]:
    """The schema of a mapping that has those."""
    return {"type": "object", "required": list(properties), "properties": properties}


_TEXT, _TEXTS, _OWN = {"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"$ref": "#/$defs/schema"}
_YES, _NUMBER, _COUNT = {"type": "boolean"}, {"type": "number"}, {"type": "integer", "minimum": 0}
_ONE, _SEVERAL = ("items", "not", "additionalProperties"), ("allOf", "anyOf", "oneOf")
"""Fields of a schema that hold one, and several."""
_SOME = {"type": "array", "items": _OWN, "minItems": 1}
_SCHEMA = {
    "type": "object",
    "properties": {
        "properties": {"type": "object", "additionalProperties": _OWN},
        **dict.fromkeys(_ONE, _OWN),
        "additionalProperties": {"anyOf": [_YES, _OWN]},
        **dict.fromkeys(_SEVERAL, _SOME),
        **dict.fromkeys(("format", "x-kubernetes-list-type"), _TEXT),
        "type": {"enum": ["object", "array", "string", "integer", "number", "boolean"]},
        "pattern": {"type": "string", "format": "regex"},
        **dict.fromkeys(("required", "x-kubernetes-list-map-keys"), _TEXTS),
        **dict.fromkeys(("minimum", "maximum"), _NUMBER),
        "multipleOf": {"type": "number", "exclusiveMinimum": 0},
        **dict.fromkeys(("exclusiveMinimum", "exclusiveMaximum", "uniqueItems"), _YES),
        **dict.fromkeys(
            ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
            _COUNT,
        ),
        "enum": {"type": "array"},
        "x-kubernetes-validations": {"type": "array", "items": _of(rule=_TEXT)},
        # of JSON schema, and of no definition
        **dict.fromkeys(
            ("$ref", "$id", "definitions", "dependencies", "patternProperties", "additionalItems", "propertyNames"),
            False,
        ),
        **dict.fromkeys(("if", "then", "else", "contains"), False),
    },
}
_DEFINITION = {
    **_of(
        group=_TEXT,
        names=_of(kind=_TEXT),
        versions={
            "type": "array",
            "items": _of(name=_TEXT, served=_YES, schema=_of(openAPIV3Schema=_OWN)),
        },
    ),
    "$defs": {"schema": _SCHEMA},
}
"""As much of a definition as is read here."""


def _require_definition(spec: Any, where: str) -> None:
    import jsonschema

    checker = jsonschema.Draft202012Validator(_DEFINITION, format_checker=jsonschema.FormatChecker(["regex"]))
    for error in checker.iter_errors(spec):
        at = ".".join(("spec", *map(str, error.absolute_path)))
        raise InputError(
            f"{where}: no CustomResourceDefinition: {at}: {error.message[:200]}; take it out of the folder"
        )


def strict(definition: dict[str, Any], version: str) -> dict[str, Any] | None:
    """The strict schema of a served version, or None where that version is not served."""
    for listed in definition["versions"]:
        if listed["name"] == version and listed["served"]:
            schema: dict[str, Any] = closed(listed["schema"]["openAPIV3Schema"])
            # every object has a kind, said or not; a definition leaves metadata open: the API server knows what is in
            # it, and sets the status aside
            text = {"type": "string"}
            own, set_aside = schema.get("properties", {}), {"type": "object"}
            schema["properties"] = {
                "apiVersion": text, "kind": text, **own, "metadata": set_aside, "status": set_aside,
            }  # fmt: skip
            return schema
    return None


def closed(schema: Any) -> Any:
    """A definition's schema, made strict: an object that lists its properties has no others. What is no schema in it (a
    default, the values of an enum, fields that nobody knows) stays as it is."""
    if not isinstance(schema, dict):
        # additionalProperties: true
        return schema
    made = dict(schema)
    properties = schema.get("properties")
    if isinstance(properties, dict):
        made["properties"] = {name: closed(inner) for name, inner in properties.items()}
    made |= {name: closed(schema[name]) for name in _ONE if name in schema}
    made |= {name: [closed(inner) for inner in schema[name]] for name in _SEVERAL if name in schema}
    if isinstance(properties, dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    if isinstance(properties, dict) and isinstance(schema.get("required"), list):
        made["required"] = [name for name in schema["required"] if "default" not in properties.get(name, {})]
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if schema.get("nullable") is True and isinstance(schema.get("type"), str):
        made["type"] = [schema["type"], "null"]
    if schema.get("format") in ("int32", "int64") and schema.get("type") == "integer":
        bits = int(schema["format"].removeprefix("int")) - 1
        made["minimum"] = max(schema.get("minimum", -(2**bits)), -(2**bits))
        made["maximum"] = min(schema.get("maximum", 2**bits - 1), 2**bits - 1)
    return made


_STRICT: dict[tuple[int, str], tuple[dict[str, Any], dict[str, Any] | None]] = {}
"""Of each definition and version, once: the definition (so that its id stays its own) and the schema."""


def _strict_once(definition: dict[str, Any], version: str) -> dict[str, Any] | None:
    key = (id(definition), version)
    if key not in _STRICT:
        _STRICT[key] = (definition, strict(definition, version))
    return _STRICT[key][1]


def check_custom(document: Document, known: Definitions, version: str) -> Iterator[Finding]:
    """Everything in a custom resource that its definition does not allow."""
    group, _, served = document.api_version.rpartition("/")
    field = Field(document, value=document.value)
    yield from check_part(field["metadata"], METADATA, version)
    yield from object_metadata(field["metadata"], document.kind, own=False)
    if (group, document.kind) not in known:
        wrong = "no definition at hand, so its fields are not checked; give the folder with it as --crds"
        yield document.found(ADVICE, "no-schema", f"{document.api_version} {document.kind}: {wrong}", "kind")
    elif (schema := _strict_once(known[group, document.kind], served)) is None:
        yield field["apiVersion"].wrong(f"{document.kind} is not served as {document.api_version}", "schema")
    else:
        document.value = without_nulls(document.value, schema)
        field = Field(document, value=document.value)
        yield from _held_to(field, schema)
        yield from _walk(field, schema)


def without_nulls(value: Any, schema: Any) -> Any:
    """A null field is none, unless the schema takes nulls; a null in a list stays, and is refused."""
    if not isinstance(schema, dict) or schema.get("x-kubernetes-preserve-unknown-fields"):
        return value
    if isinstance(value, list):
        return [without_nulls(inner, schema.get("items")) for inner in value]
    if not isinstance(value, dict):
        return value
    known, others = schema.get("properties") or {}, schema.get("additionalProperties")
    made = {}
    for name, inner in value.items():
        own = known.get(name, others if isinstance(others, dict) else {})
        if inner is not None or own.get("nullable"):
            made[name] = without_nulls(inner, own)
    return made


def _held_to(field: Field, schema: dict[str, Any]) -> Iterator[Finding]:
    import jsonschema

    for error in jsonschema.Draft7Validator(schema).iter_errors(field.value):
        at = field
        for step in error.absolute_path:
            at = at[step] if isinstance(step, str) else list(at.items())[step]
        if error.validator == "additionalProperties" and isinstance(error.instance, dict):
            for name in sorted(set(error.instance) - set(error.schema.get("properties", {}))):
                yield at[name].wrong(f"{name!r} was unexpected: no field of that name is known", "schema")
        elif error.validator == "anyOf":
            yield at.wrong("must be a whole number or text", "schema")
        else:
            yield at.wrong(str(error.message)[:300], "schema")


def _walk(field: Field, schema: Any) -> Iterator[Finding]:
    """What JSON schema does not say: repeats in keyed lists, and rules in CEL."""
    value = field.value
    if value is None or not isinstance(schema, dict):
        return
    for rule in schema.get("x-kubernetes-validations") or ():
        yield from cel.check(field, rule)
    if isinstance(value, list):
        yield from _repeats(field, schema)
        for inner in field.items():
            yield from _walk(inner, schema.get("items"))
    elif isinstance(value, dict):
        known, others = schema.get("properties") or {}, schema.get("additionalProperties")
        for name in value:
            yield from _walk(field[name], known.get(name, others))


def _repeats(field: Field, schema: dict[str, Any]) -> Iterator[Finding]:
    kind, names = schema.get("x-kubernetes-list-type"), schema.get("x-kubernetes-list-map-keys", ())
    if kind not in ("map", "set"):
        return
    known = (schema.get("items") or {}).get("properties") or {}
    seen = set()
    for item in field.items():
        if kind == "map":
            if not isinstance(item.value, dict):
                continue
            key = json.dumps([item.value.get(name, known.get(name, {}).get("default")) for name in names])
        else:
            key = json.dumps(item.value, sort_keys=True)
        if key in seen:
            yield item.wrong(f"{', '.join(names) or 'the value'}: stands there already", "schema")
        seen.add(key)
