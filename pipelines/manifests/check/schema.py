"""Each object against its schema, strictly: a field that the schema does not list is a mistake, not an extension.

Kubernetes' own kinds come from kubernetes-validate; custom resources from their definitions (CustomResourceDefinition
files), which a cluster hands out: `kubectl get crd pytorchjobs.kubeflow.org -o yaml`. A definition leaves out
`additionalProperties`, so that a misspelt field passes it: `closed` says it.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.manifests.check.documents import Document, Finding, Place
from zhllama.errors import InputError

BUILT_IN_GROUPS = {"", "apps", "batch", "autoscaling", "policy", "networking.k8s.io", "rbac.authorization.k8s.io"}
BUILT_IN_GROUPS |= {"storage.k8s.io", "scheduling.k8s.io", "coordination.k8s.io", "admissionregistration.k8s.io"}
NO_OBJECTS = ("Kustomization", "Component")
"""Kinds that kustomize reads and no cluster sees."""


class Definitions:
    """The custom resources whose definitions lie in a folder, by (group, kind)."""

    def __init__(self, folder: Path | None) -> None:
        self._found: dict[tuple[str, str], dict[str, Any]] = {}
        if folder is None:
            return
        if not folder.is_dir():
            raise InputError(f"--crds {folder}: no such folder; give one with CustomResourceDefinition files")
        for path in sorted(folder.rglob("*.yaml")):
            for value in _read(path, path.stat().st_mtime_ns):
                if isinstance(value, dict) and value.get("kind") == "CustomResourceDefinition":
                    names = value["spec"]["names"]
                    self._found[value["spec"]["group"], names["kind"]] = value

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._found

    def schema(self, group: str, kind: str, version: str) -> dict[str, Any] | None:
        """The strict schema of a served version, or None where that version is not served."""
        for listed in self._found[group, kind]["spec"]["versions"]:
            if listed["name"] == version and listed["served"]:
                schema: dict[str, Any] = closed(listed["schema"]["openAPIV3Schema"])
                # a definition leaves metadata open; the API server knows what is in it
                schema["properties"]["metadata"] = {"type": "object"}
                return schema
        return None


@functools.cache
def _read(path: Path, changed: int) -> list[Any]:
    """The documents of a file of that age: once for all checks of a process, since a folder of them takes 2 s."""
    import yaml

    # a definition may have two megabytes: the parser in C takes 0.5 s where the other takes 6
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return list(yaml.load_all(path.read_text("utf-8"), Loader=loader))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--crds {path}: not a readable YAML file; take it out of the folder") from error


def closed(schema: Any) -> Any:
    """A definition's schema, made strict: an object that lists its properties has no others."""
    if isinstance(schema, list):
        return [closed(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {name: closed(inner) for name, inner in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        strict.pop("type", None)
        strict["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return strict


def check_schema(document: Document, definitions: Definitions) -> Iterator[Finding]:
    """Everything in the object that its schema does not allow."""
    import jsonschema

    for place, line in document.repeated:
        yield Finding(document.file, line, "error", "yaml", f"{dotted(place)} is given twice; keep one")
    api_version = str(document.value["apiVersion"])
    group, _, version = api_version.rpartition("/")
    if group in BUILT_IN_GROUPS:
        yield from _built_in(document)
        return
    if document.kind in NO_OBJECTS:
        return
    if (group, document.kind) not in definitions:
        yield document.warning(
            ("kind",), "no-schema", f"{api_version} {document.kind}: no definition at hand, so its fields are not "
            "checked; give the folder with it as --crds",
        )  # fmt: skip
        return
    schema = definitions.schema(group, document.kind, version)
    if schema is None:
        yield document.error(("apiVersion",), "schema", f"{document.kind} is not served as {api_version}")
        return
    # metadata is Kubernetes' own: a ConfigMap's is as good as any
    yield from _built_in(document, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": document.value["metadata"]})
    for error in jsonschema.Draft7Validator(schema).iter_errors(document.value):
        yield _finding(document, error)


def _built_in(document: Document, value: dict[str, Any] | None = None) -> Iterator[Finding]:
    import kubernetes_validate

    try:
        kubernetes_validate.validate(value or document.value, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        yield _finding(document, error)
    except kubernetes_validate.SchemaNotFoundError:
        yield document.error(
            ("kind",), "schema", f"there is no {document.kind} in {document.value['apiVersion']}; correct one of them"
        )


def _finding(document: Document, error: Any) -> Finding:
    place: Place = tuple(error.path)
    message = str(error.message)
    return document.error(place, "schema", f"{dotted(place) or 'the object'}: {message[:300]}")


def dotted(place: Place) -> str:
    """`spec.containers[0].image`."""
    text = ""
    for step in place:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text
