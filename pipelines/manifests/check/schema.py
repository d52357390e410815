"""Each object against its schema, strictly: a field that the schema does not list is a mistake, not an extension.

Kubernetes' own kinds come from kubernetes-validate; custom resources from their definitions (CustomResourceDefinition
files), which a cluster hands out: `kubectl get crd pytorchjobs.kubeflow.org -o yaml`. A definition leaves out
`additionalProperties`, so that a misspelt field passes it: `closed` says it.
"""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.manifests.check.documents import Document, Finding, dotted
from zhllama.errors import InputError

BUILT_IN_GROUPS = {
    "", "apps", "batch", "autoscaling", "policy", "networking.k8s.io", "rbac.authorization.k8s.io", "storage.k8s.io",
    "scheduling.k8s.io", "coordination.k8s.io", "admissionregistration.k8s.io",
}  # fmt: skip
NO_OBJECTS = ("Kustomization", "Component")
"""Kinds that kustomize reads and no cluster sees."""


Definitions = Mapping[tuple[str, str], dict[str, Any]]
"""(group, kind) → the definition's specification."""


@functools.cache  # a folder of them takes 2 s
def definitions(folder: Path) -> Definitions:
    """The custom resources whose definitions lie in a folder."""
    import yaml

    if not folder.is_dir():
        raise InputError(f"--crds {folder}: no such folder; give one with CustomResourceDefinition files")
    found = {}
    # a definition may have two megabytes: the parser in C takes 0.5 s where the other takes 6
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for path in sorted(folder.rglob("*.yaml")):
        try:
            values = list(yaml.load_all(path.read_text("utf-8"), Loader=loader))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"--crds {path}: not a readable YAML file; take it out of the folder") from error
        for value in values:
            if isinstance(value, dict) and value.get("kind") == "CustomResourceDefinition":
                found[value["spec"]["group"], value["spec"]["names"]["kind"]] = value["spec"]
    return found


def strict(definition: dict[str, Any], version: str) -> dict[str, Any] | None:
    """The strict schema of a served version, or None where that version is not served."""
    for listed in definition["versions"]:
        if listed["name"] == version and listed["served"]:
            schema: dict[str, Any] = closed(listed["schema"]["openAPIV3Schema"])
            # a definition leaves metadata open; the API server knows what is in it
            schema["properties"]["metadata"] = {"type": "object"}
            return schema
    return None


def closed(schema: Any) -> Any:
    """A definition's schema, made strict: an object that lists its properties has no others."""
    if isinstance(schema, list):
        return [closed(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: closed(inner) for name, inner in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return made


def check_schema(document: Document, known: Definitions) -> Iterator[Finding]:
    """Everything in the object that its schema does not allow."""
    import jsonschema

    yield from document.repeated
    kind, api_version = document.kind, str(document.value["apiVersion"])
    group, _, version = api_version.rpartition("/")
    if group in BUILT_IN_GROUPS:
        yield from _built_in(document, document.value)
    elif (group, kind) not in known:
        wrong = "no definition at hand, so its fields are not checked; give the folder with it as --crds"
        yield document.warning("no-schema", f"{api_version} {kind}: {wrong}", "kind")
    elif (schema := strict(known[group, kind], version)) is None:
        yield document.error("schema", f"{kind} is not served as {api_version}", "apiVersion")
    else:
        # metadata is Kubernetes' own: a ConfigMap's is as good as any
        metadata = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": document.value.get("metadata")}
        yield from _built_in(document, metadata)
        for error in jsonschema.Draft7Validator(schema).iter_errors(document.value):
            yield _finding(document, error)


def _built_in(document: Document, value: dict[str, Any]) -> Iterator[Finding]:
    import kubernetes_validate

    try:
        kubernetes_validate.validate(value, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        yield _finding(document, error)
    except kubernetes_validate.SchemaNotFoundError:
        wrong = f"there is no {document.kind} in {document.value['apiVersion']}; correct one of them"
        yield document.error("schema", wrong, "kind")


def _finding(document: Document, error: Any) -> Finding:
    place = tuple(error.path)
    return document.error("schema", f"{dotted(place) or 'the object'}: {str(error.message)[:300]}", *place)
