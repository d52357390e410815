"""Builds the kustomizations of k8s/ here, so that `zhllama render base` needs no kubectl.

It knows the part of kustomize that they use and refuses, by name, what it does not: resources, components, labels (on
objects alone), namespace, patches (lists of operations, and `$patch: delete`) and a NamespaceTransformer. A test holds
it against `kubectl kustomize`, object by object.
"""

import copy
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from zhllama.errors import InputError

Object = dict[str, Any]
FIELDS = {"apiVersion", "kind", "resources", "components", "labels", "namespace", "patches", "transformers"}
NO_NAMESPACE = ("Namespace", "ClusterQueue", "ResourceFlavor")


def build(folder: Path, components: Iterable[Path] | None = None) -> list[Object]:
    """The objects of a kustomization, in the order of its files; `components`: others than it names. InputError for
    what cannot be read, or is not known here."""
    wanted = _read(folder / "kustomization.yaml")
    objects: list[Object] = []
    _apply(objects, wanted, folder, components)
    return objects


def _read(path: Path) -> Object:
    import yaml

    try:
        value = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not a readable kustomization; run it from a clone of the repository") from error
    if unknown := sorted(set(value) - FIELDS):
        raise InputError(f"{path}: {', '.join(unknown)}: not known here; use kubectl kustomize {path.parent}")
    return dict(value)


def _apply(objects: list[Object], wanted: Object, folder: Path, components: Iterable[Path] | None = None) -> None:
    """Adds a kustomization's objects to those that are there, then changes all as it says, in kustomize's order."""
    for name in wanted.get("resources") or ():
        objects += build(folder / name) if (folder / name).is_dir() else _objects(folder / name)
    named = (folder / name for name in wanted.get("components") or ())
    for component in named if components is None else components:
        _apply(objects, _read(component / "kustomization.yaml"), component)
    for patch in wanted.get("patches") or ():
        _patch(objects, patch, folder)
    if "namespace" in wanted:
        set_namespace(objects, wanted["namespace"], _accounts(objects))
    for labels in wanted.get("labels") or ():
        if set(labels) != {"pairs"}:
            raise InputError(f"{folder}: labels with {', '.join(sorted(set(labels) - {'pairs'}))}: not known here")
        for value in objects:
            value["metadata"].setdefault("labels", {}).update(labels["pairs"])
    for text in wanted.get("transformers") or ():
        _transform(objects, text, folder)


def _objects(path: Path) -> list[Object]:
    import yaml

    try:
        return [dict(value) for value in yaml.safe_load_all(path.read_text("utf-8")) if value]
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not a readable manifest; run it from a clone of the repository") from error


# --- namespaces -------------------------------------------------------------------------------------------------------


def _accounts(objects: Iterable[Object]) -> set[str]:
    return {value["metadata"]["name"] for value in objects if value["kind"] == "ServiceAccount"}


def set_namespace(objects: Iterable[Object], namespace: str, accounts: set[str] | None = None) -> None:
    """Puts the objects into a namespace, names a Namespace so, and says where the accounts of bindings are: of these
    names, or all."""
    for value in objects:
        if value["kind"] == "Namespace":
            value["metadata"]["name"] = namespace
        elif value["kind"] not in NO_NAMESPACE:
            value["metadata"]["namespace"] = namespace
        for subject in value.get("subjects") or ():
            if subject["kind"] == "ServiceAccount" and (accounts is None or subject["name"] in accounts):
                subject["namespace"] = namespace


def _transform(objects: list[Object], text: str, folder: Path) -> None:
    import yaml

    value = yaml.safe_load(text)
    whole = {"kind": "NamespaceTransformer", "setRoleBindingSubjects": "allServiceAccounts"}
    if not whole.items() <= value.items():
        raise InputError(f"{folder}: transformer {value.get('kind')}: not known here")
    # unlike `namespace:`, it names no Namespace
    set_namespace([one for one in objects if one["kind"] != "Namespace"], value["metadata"]["namespace"])


# --- patches ----------------------------------------------------------------------------------------------------------


def _patch(objects: list[Object], patch: Mapping[str, Any], folder: Path) -> None:
    import yaml

    target = patch.get("target", {})
    if set(patch) != {"target", "patch"} or not set(target) <= {"kind", "name"}:
        raise InputError(f"{folder}: a patch with {sorted({*patch, *target})}: not known here")
    chosen = [value for value in objects if _targeted(value, target)]
    change = yaml.safe_load(patch["patch"])
    if isinstance(change, list):
        for value in chosen:
            for operation in change:
                _operate(value, operation, folder)
    elif change.get("$patch") == "delete":
        objects[:] = [value for value in objects if not any(value is one for one in chosen)]
    else:
        raise InputError(f"{folder}: a patch that merges: not known here; write a list of operations")


def _targeted(value: Object, target: Mapping[str, str]) -> bool:
    found = {"kind": value["kind"], "name": value["metadata"]["name"]}
    return all(re.fullmatch(pattern, found[name]) for name, pattern in target.items())


def _operate(value: Any, operation: Mapping[str, Any], folder: Path) -> None:
    """One operation of RFC 6902. InputError where its path leads nowhere."""
    *way, last = [step.replace("~1", "/").replace("~0", "~") for step in operation["path"].split("/")[1:]]
    op, new = operation["op"], copy.deepcopy(operation.get("value"))
    try:
        for step in way:
            value = value[int(step)] if isinstance(value, list) else value[step]
        if isinstance(value, list):
            place = len(value) if last == "-" else int(last)
            if op == "add":
                value.insert(place, new)
            elif op == "replace":
                value[place] = new
            else:
                del value[place]
        elif op == "remove":
            del value[last]
        elif op == "add" or last in value:
            value[last] = new
        else:
            raise KeyError(last)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise InputError(f"{folder}: patch {op} {operation['path']}: there is no such place") from error
