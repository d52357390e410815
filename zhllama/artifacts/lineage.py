"""What an artifact came from: its inputs, their inputs, up to the weights and texts that somebody brought.

Only manifests are read, one small object each. An input that is gone, or is not what was read then, is said to be so.
"""

from dataclasses import dataclass

from zhllama import storage
from zhllama.artifacts.manifest import MANIFEST, Manifest
from zhllama.errors import InputError


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


def read_manifest(reference: str) -> Manifest:
    """The manifest behind a reference. InputError when there is none, or it was changed."""
    uri = storage.normalise(reference)
    uri = uri if uri.endswith(f"/{MANIFEST}") else storage.join(uri, MANIFEST)
    try:
        return Manifest.from_json(storage.read_bytes(uri), reference)
    except (FileNotFoundError, NotADirectoryError) as error:
        mend = "give the reference that a stage wrote (zhllama ls lists them)"
        raise InputError(f"{reference}: no {MANIFEST} is there; {mend}") from error


def lineage(manifest: Manifest) -> Ancestor:
    """The artifact with everything it came from, deepest last. What several inputs share is read once."""
    seen: dict[str, Manifest | str] = {manifest.reference: manifest}

    def node(name: str, reference: str, digest: str) -> Ancestor:
        if not reference.endswith(f"/{MANIFEST}"):
            # a user's own folder, or an address that was fetched: nothing stands there that could be compared cheaply
            return Ancestor(name, reference, digest, kind="source")
        if reference not in seen:
            try:
                seen[reference] = read_manifest(reference)
            except InputError as error:
                gone = isinstance(error.__cause__, FileNotFoundError | NotADirectoryError)
                seen[reference] = "gone" if gone else str(error)
        found = seen[reference]
        if isinstance(found, str):
            return Ancestor(name, reference, digest, state=found)
        if found.digest != digest:
            return Ancestor(name, reference, digest, found.kind, found.stage, state="replaced since")
        above = tuple(node(key, given.reference, given.digest) for key, given in sorted(found.inputs.items()))
        summary = str(found.facts.get("summary", ""))
        return Ancestor(name, reference, digest, found.kind, found.stage, summary, inputs=above)

    return node("", manifest.reference, manifest.digest)
