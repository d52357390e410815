"""What an artifact came from: its inputs, their inputs, up to the weights and texts that somebody brought.

Only manifests are read, one small object each. An input is where provenance.json says, or, where that knows nothing of
it or the store was moved, it is found by its digest in the artifact's own store. One that is gone, or is not what was
read then, is said to be so.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from zhllama import storage
from zhllama.artifacts.manifest import MANIFEST, Manifest, read_manifest
from zhllama.errors import InputError

_PLACE = re.compile(r"(.+)/[^/]+/[0-9a-f]{32}")


@dataclass(frozen=True)
class Ancestor:
    """An input of an artifact. `state`: "" as it was read, else what has become of it."""

    name: str
    reference: str
    digest: str
    kind: str = ""
    stage: str = ""
    summary: str = ""
    state: str = ""
    inputs: tuple["Ancestor", ...] = ()


def manifest_of(reference: str) -> Manifest:
    """The manifest behind a reference. InputError when there is none, or it was changed."""
    uri = storage.normalise(reference)
    uri = uri if uri.endswith(f"/{MANIFEST}") else storage.join(uri, MANIFEST)
    manifest = read_manifest(uri, reference)
    if manifest is None:
        mend = "give the reference that a stage wrote (zhllama ls lists them)"
        raise InputError(f"{reference}: no {MANIFEST} is there; {mend}")
    return manifest


def store_of(manifest: Manifest) -> Callable[[str], str]:
    """Digest → the reference of that artifact in the store where this one lies, "" where none is. The store is looked
    through once, when it is first asked."""

    @cache
    def known() -> Mapping[str, str]:
        place = _PLACE.fullmatch(manifest.root)
        names = [item.name for item in storage.listing(place[1])] if place else []
        found: dict[str, str] = {}

        def read(name: str) -> None:
            try:
                one = read_manifest(f"{place[1]}/{name}" if place else "")
            except InputError:
                return
            if one is not None:
                found.setdefault(one.digest, one.reference)

        storage.in_parallel(read, [name for name in names if re.fullmatch(rf"[^/]+/[0-9a-f]{{32}}/{MANIFEST}", name)])
        return found

    return lambda digest: known().get(digest, "")


def lineage(manifest: Manifest) -> Ancestor:
    """The artifact with everything it came from, deepest last. What several inputs share is read once."""
    seen: dict[str, Manifest | str] = {manifest.reference: manifest}
    in_store = store_of(manifest)

    def read(reference: str) -> Manifest | str:
        if reference not in seen:
            try:
                found = read_manifest(reference)
                seen[reference] = "gone" if found is None else found
            except InputError as error:
                seen[reference] = str(error)
        return seen[reference]

    def node(name: str, reference: str, digest: str) -> Ancestor:
        if reference and not reference.endswith(f"/{MANIFEST}"):
            # a user's own folder, or an address that was fetched: nothing stands there that could be compared cheaply
            return Ancestor(name, reference, digest, kind="source")
        found = read(reference) if reference else "not in this store"
        if (isinstance(found, str) or found.digest != digest) and (other := in_store(digest)):
            reference, found = other, read(other)
        if isinstance(found, str):
            return Ancestor(name, reference, digest, state=found)
        if found.digest != digest:
            return Ancestor(name, reference, digest, found.kind, found.stage, state="replaced since")
        above = tuple(node(key, given.reference, given.digest) for key, given in sorted(found.inputs.items()))
        summary = str(found.facts.get("summary", ""))
        return Ancestor(name, reference, digest, found.kind, found.stage, summary, inputs=above)

    return node("", manifest.reference, manifest.digest)


def find_input(manifest: Manifest, name: str) -> str:
    """The reference of an input. InputError when no provenance says it, and the artifact's store has it not."""
    given = manifest.inputs[name]
    if given.reference and not given.reference.endswith(f"/{MANIFEST}"):
        return given.reference
    try:
        found = read_manifest(given.reference) if given.reference else None
    except InputError:
        found = None
    if found is not None and found.digest == given.digest:
        return found.reference
    if reference := store_of(manifest)(given.digest) or given.reference:
        return reference
    raise InputError(f"{manifest.root}: the {name} that it was made with is not in its store; copy the whole store")
