"""Where finished work lies, whether it is there, and its copy at another place.

`<store>/<stage>/<input key>/`: the same work lands at the same place, so that a stage sees that it has nothing to do.
"""

import logging
from dataclasses import replace

from zhllama import storage
from zhllama.artifacts.manifest import MANIFEST, Manifest, read_manifest
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError, StorageFault
from zhllama.progress import Progress

log = logging.getLogger("artifact")


def place(store: str, stage: str, key: str) -> str:
    """Where the artifact of this work lies."""
    return storage.join(storage.normalise(store), f"{stage}/{key}")


def find_published(store: str, stage: str, key: str) -> Manifest | None:
    """The manifest of finished work; None when it is damaged, or a file that it names is missing or of another size."""
    where = storage.join(place(store, stage, key), MANIFEST)
    try:
        manifest = read_manifest(where)
    except InputError as error:
        # what is wrong with our own output is mended by doing the work again
        log.warning("%s", error)
        return None
    if manifest is None or not manifest.named:
        return None
    wanted = {file.path: file.size for file in manifest.named}
    return None if any(storage.not_as_wanted(manifest.root, wanted)) else manifest


def copy_artifact(artifact: Artifact, root: str) -> Manifest:
    """All files of an artifact with a manifest to another place, verified on the way (or server-side within S3), and
    last the manifest. The digest stays: it leaves out the place. FileExistsError when another one is there already."""
    root = storage.normalise(root)
    before = storage.read_or_none(f"{root}/{MANIFEST}")
    if before is not None and Manifest.from_json(before, root).digest != artifact.digest:
        # said before a file of that artifact is written over
        raise FileExistsError(root)
    storage.require_room(root, artifact.manifest.size, "the copy at")
    server_side = storage.is_s3(artifact.root) and storage.is_s3(root)
    with Progress(f"copying {artifact.title}", artifact.manifest.size) as bar:
        for file in artifact.manifest.files:
            target = storage.join(root, file.path)
            if server_side:
                storage.copy(storage.join(artifact.root, file.path), target)
                bar.advance(file.size)
                continue
            with storage.committed(storage.open_writer(target)) as writer:
                artifact.pour(file.path, writer.write, bar.advance)
        for file in artifact.manifest.beside:
            storage.write_bytes(storage.join(root, file.path), artifact.read(file.path))
            bar.advance(file.size)
    copied = replace(artifact.manifest, root=root)
    wanted = {file.path: file.size for file in copied.named}
    for name, size in storage.not_as_wanted(root, wanted):
        raise StorageFault(f"{root}/{name}: {size} bytes of {wanted[name]} came; try again")
    # what the server copied by itself has passed nobody's digest yet
    for wrong in Artifact(copied, verified=True).find_corruption() if server_side else ():
        raise StorageFault(f"the copy is not as it should be, try again: {wrong}")
    try:
        copied.publish(if_absent=True)
    except FileExistsError:
        if Manifest.from_json(storage.read_bytes(copied.reference), copied.reference).digest != artifact.digest:
            raise
    return copied
