"""Where finished work lies, and whether it is there: `<store>/<stage>/<input key>/`.

The key is the digest of all that decides the result, so the same work lands at the same place, which is how a stage
sees that it has nothing to do.
"""

import logging

from zhllama import storage
from zhllama.artifacts.manifest import MANIFEST, Manifest
from zhllama.errors import InputError

log = logging.getLogger("artifact")


def place(store: str, stage: str, key: str) -> str:
    """Where the artifact of this work lies: `<store>/<stage>/<key>`."""
    return storage.join(storage.normalise(store), f"{stage}/{key}")


def find_published(store: str, stage: str, key: str) -> Manifest | None:
    """The manifest of finished work; None when it is damaged, or a file that it names is missing or of another size."""
    return published_at(place(store, stage, key))


def published_at(root: str) -> Manifest | None:
    """As find_published, by the artifact's root."""
    where = storage.join(root, MANIFEST)
    content = storage.read_or_none(where)
    if content is None:
        return None
    try:
        manifest = Manifest.from_json(content, where)
    except InputError as error:
        # what is wrong with our own output is mended by doing the work again
        log.warning("%s", error)
        return None
    there = {item.name: item.size for item in storage.listing(manifest.root)}
    if any(there.get(file.path) != file.size for file in manifest.files):
        return None
    return manifest
