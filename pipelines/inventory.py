"""What lies in a store: the published artifacts, and the data that no manifest names.

Only places of ours are looked at for data to free: `<stage>/<input key>/`, of stages that there are, and a checkpoint's
folder. Whatever else shares the bucket is nobody's business here. A place without a manifest belongs to a stage that
runs or that was given up; nothing tells the two apart but time, so its age is that of the newest file in it. What a
manifest names is never counted, and where a manifest cannot be read, nothing of its place is.
"""

import pkgutil
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import components
from zhllama import storage
from zhllama.artifacts.manifest import MANIFEST, PROVENANCE, Manifest, with_provenance
from zhllama.errors import InputError, StorageFault

_STAGE = "|".join(module.name for module in pkgutil.iter_modules(components.__path__))
_PLACE = re.compile(rf"((?:(?:{_STAGE})/[0-9a-f]{{32}})|(?:checkpoints/(?:{_STAGE})/[0-9a-f]{{32}}/step-[^/]+))/(.+)")


@dataclass
class Unreferenced:
    """Data of one place that no manifest names."""

    where: str
    published: bool
    """Whether it lies beside an artifact; else it may be a stage's that still runs and publishes."""
    files: dict[str, storage.Stored] = field(default_factory=dict)
    uploads: list[storage.Unfinished] = field(default_factory=list)

    @property
    def modified(self) -> datetime:
        """When the newest of it was written (UTC)."""
        return max([file.modified for file in self.files.values()] + [upload.began for upload in self.uploads])

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files.values()) + sum(upload.bytes for upload in self.uploads)

    @property
    def what(self) -> str:
        counts = {"file": len(self.files), "unfinished upload": len(self.uploads)}
        parts = [f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in counts.items() if count]
        return f"{' and '.join(parts)} {'beside an artifact' if self.published else 'without a manifest'}"

    def as_json(self) -> Mapping[str, Any]:
        modified = self.modified.isoformat(timespec="seconds")
        return {"where": self.where, "what": self.what, "modified": modified, "bytes": self.bytes}


def as_json(manifest: Manifest) -> Mapping[str, Any]:
    """What `zhllama ls --json` says of an artifact."""
    own = {name: getattr(manifest, name) for name in ("reference", "kind", "stage", "digest", "created")}
    return own | {"bytes": manifest.size, "summary": str(manifest.facts.get("summary", ""))}


def published(store: str) -> tuple[list[Manifest], list[str]]:
    """The artifacts of a store, oldest first, by where their manifests lie, whatever root they say: a copy of a store
    is one too; and what is wrong with manifests that cannot be read."""
    root = storage.normalise(store)
    names = [item.name for item in storage.listing(root) if item.name.split("/")[-1] == MANIFEST]
    found: list[Manifest] = []
    damaged: list[str] = []

    def read(name: str) -> None:
        uri = f"{root}/{name}"
        try:
            manifest = Manifest.from_json(storage.read_bytes(uri), uri, uri.removesuffix(f"/{MANIFEST}"))
            found.append(with_provenance(manifest))
        except InputError as error:
            damaged.append(str(error))
        except FileNotFoundError:
            # deleted since it was listed
            return

    storage.in_parallel(read, names)
    return sorted(found, key=lambda one: (one.created, one.reference)), sorted(damaged)


def unreferenced(store: str, older_than: timedelta, now: datetime) -> tuple[list[Unreferenced], list[str]]:
    """Data that no manifest names and that has not been written to for `older_than`, oldest first; and warnings."""
    root = storage.normalise(store)
    items = storage.listing(root, hidden=True)
    artifacts, damaged = published(root)
    own = (MANIFEST, PROVENANCE)
    named = {f"{one.root}/{path}" for one in artifacts for path in (*own, *(file.path for file in one.named))}
    whole = {one.root for one in artifacts}
    places: dict[str, Unreferenced] = {}

    def place(name: str) -> Unreferenced:
        return places.setdefault(name, Unreferenced(f"{root}/{name}", f"{root}/{name}" in whole))

    # without provenance nobody knows what lies beside an artifact
    unread = {one.root.removeprefix(f"{root}/") for one in artifacts if one.format > 1 and not one.created}
    for item in items:
        match = _PLACE.fullmatch(item.name)
        uri = f"{root}/{item.name}"
        if match is None or uri in named:
            continue
        if item.name.split("/")[-1] == MANIFEST:
            unread.add(match[1])
        place(match[1]).files[uri] = item
    uploads: list[storage.Unfinished] = []
    if storage.is_s3(root):
        try:
            uploads = storage.unfinished(root)
        except (InputError, StorageFault) as error:
            damaged = [*damaged, f"unfinished uploads are not looked at, the store does not list them: {error}"]
    for upload in uploads:
        if match := _PLACE.fullmatch(upload.uri.removeprefix(f"{root}/")):
            place(match[1]).uploads.append(upload)
    found = [one for name, one in places.items() if name not in unread and now - one.modified >= older_than]
    return sorted(found, key=lambda one: (one.modified, one.where)), damaged


def free(found: Iterable[Unreferenced]) -> int:
    """Deletes, and returns the bytes. A place that has got a manifest since it was looked at is left."""
    freed = 0
    for one in found:
        if not one.published and storage.exists(f"{one.where}/{MANIFEST}"):
            continue
        storage.in_parallel(storage.delete, tuple(one.files))
        for upload in one.uploads:
            storage.discard(upload.uri, upload.id)
        freed += one.bytes
    return freed


def shown_age(since: timedelta) -> str:
    """`12 min`, `5 h`, `3 d`."""
    minutes = since.total_seconds() / 60
    if minutes < 100:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.0f} h" if minutes < 48 * 60 else f"{minutes / 60 / 24:.0f} d"
