"""Server-side apply, as a real API server answered it (tests/recordings/responses/deploy.json): who owns which field.

Lists are whole values here; the real server merges some of them by key, so another manager of a part of one is refused.
"""

import json
from collections.abc import Iterator
from typing import Any

from tests.kubernetes_request import not_served, refused, status

Path = tuple[str, ...]
IDENTITY = ("name", "namespace", "uid", "resourceVersion", "generation", "creationTimestamp", "managedFields")


def leaves(value: dict[str, Any], prefix: Path = ()) -> Iterator[tuple[Path, Any]]:
    for key, inner in value.items():
        path = (*prefix, key)
        if path in (("apiVersion",), ("kind",), ("status",)) or (prefix == ("metadata",) and key in IDENTITY):
            continue
        if isinstance(inner, dict) and inner:
            yield from leaves(inner, path)
        else:
            yield path, inner


def fields_of(paths: set[Path]) -> dict[str, Any]:
    """As managedFields writes them."""
    made: dict[str, Any] = {}
    for path in sorted(paths):
        here = made
        for step in path:
            here = here.setdefault(f"f:{step}", {})
    return made


def paths_of(fields: dict[str, Any], prefix: Path = ()) -> set[Path]:
    found = set()
    for key, inner in fields.items():
        path = (*prefix, key.removeprefix("f:"))
        found |= paths_of(inner, path) if inner else {path}
    return found


def _get(thing: dict[str, Any], path: Path) -> Any:
    here: Any = thing
    for step in path:
        here = here.get(step) if isinstance(here, dict) else None
    return here


def _set(thing: dict[str, Any], path: Path, value: Any) -> None:
    if value == {} and isinstance(_get(thing, path), dict):
        return
    for step in path[:-1]:
        if not isinstance(thing.get(step), dict):
            thing[step] = {}
        thing = thing[step]
    thing[path[-1]] = value


def _drop(thing: dict[str, Any], path: Path) -> None:
    parent = _get(thing, path[:-1])
    if isinstance(parent, dict) and not (isinstance(parent.get(path[-1]), dict) and parent[path[-1]]):
        parent.pop(path[-1], None)
        if not parent and len(path) > 2:
            _drop(thing, path[:-1])


def applied(
    found: dict[str, Any] | None, wanted: dict[str, Any], manager: str, force: bool
) -> tuple[int, dict[str, Any]]:
    """A status, and the object as it is then, or a Status that says why not."""
    wanted = json.loads(json.dumps(wanted))
    if wanted["metadata"].get("managedFields"):
        raise refused(400, "BadRequest", "metadata.managedFields must be nil")
    asked = dict(leaves(wanted))
    made = json.loads(json.dumps(found)) if found else {
        "apiVersion": wanted["apiVersion"], "kind": wanted["kind"], "metadata": {"name": wanted["metadata"]["name"]},
    }  # fmt: skip
    owned = [dict(entry, paths=paths_of(entry["fieldsV1"])) for entry in made["metadata"].pop("managedFields", ())]
    ours = [entry for entry in owned if (entry["manager"], entry["operation"]) == (manager, "Apply")]
    others = [entry for entry in owned if entry not in ours]
    if any(step.startswith("k:") for entry in others for path in entry["paths"] for step in path):
        raise not_served("to merge lists by their keys")
    conflicts = [
        (entry, path) for entry in others for path in sorted(entry["paths"]) if path in asked
        if _get(made, path) != asked[path]
    ]  # fmt: skip
    if conflicts and not force:
        causes = []
        for entry, path in conflicts:
            through = f' with subresource "{entry["subresource"]}"' if entry.get("subresource") else ""
            # what was applied has no version of its own
            using = "" if entry["operation"] == "Apply" else f" using {entry['apiVersion']}"
            said = f'conflict with "{entry["manager"]}"{through}{using}'
            causes.append({"reason": "FieldManagerConflict", "message": said, "field": "." + ".".join(path)})
        message = "; ".join(f"{one['message']}: {one['field']}" for one in causes)
        return status(409, "Conflict", f"Apply failed with {len(causes)} conflict: {message}", causes=causes)
    for entry, path in conflicts:
        entry["paths"].discard(path)
    theirs = {path for entry in others for path in entry["paths"]}
    for path in {path for entry in ours for path in entry["paths"]} - set(asked) - theirs:
        _drop(made, path)
    for path, value in asked.items():
        _set(made, path, value)
    if made["kind"] == "Deployment":
        made["spec"].setdefault("replicas", 1)
    entry = {"manager": manager, "operation": "Apply", "apiVersion": made["apiVersion"], "paths": set(asked)}
    _managed(made, [entry, *others])
    return 200 if found else 201, made


def scaled(found: dict[str, Any], replicas: int, manager: str) -> dict[str, Any]:
    """The object after another manager has set its replicas through the scale subresource."""
    made: dict[str, Any] = json.loads(json.dumps(found))
    path = ("spec", "replicas")
    entries = [dict(entry, paths=paths_of(entry["fieldsV1"])) for entry in made["metadata"].pop("managedFields", ())]
    if made["spec"].get("replicas") != replicas:
        for entry in entries:
            entry["paths"].discard(path)
    made["spec"]["replicas"] = replicas
    entries = [entry for entry in entries if (entry["manager"], entry.get("subresource")) != (manager, "scale")]
    scaling = {"manager": manager, "operation": "Update", "apiVersion": made["apiVersion"], "subresource": "scale"}
    _managed(made, [*entries, scaling | {"paths": {path}}])
    return made


def _managed(thing: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    thing["metadata"]["managedFields"] = [
        {key: value for key, value in entry.items() if key != "paths"}
        | {"fieldsType": "FieldsV1", "fieldsV1": fields_of(entry["paths"])}
        for entry in entries
        if entry["paths"]
    ]
