"""Copying an artifact: its files, verified on the way, and last its manifest."""

from contextlib import closing
from dataclasses import replace

from zhllama import storage
from zhllama.artifacts.manifest import MANIFEST, Manifest
from zhllama.artifacts.reader import Artifact
from zhllama.errors import StorageFault
from zhllama.progress import Progress
from zhllama.storage.prefetch import prefetch


def copy_artifact(artifact: Artifact, root: str) -> Manifest:
    """All files to another place, verified on the way (or server-side within S3), and last the manifest there.

    The digest stays: it leaves out the place. FileExistsError when another manifest is there already.
    """
    root = storage.normalise(root)
    before = storage.read_or_none(f"{root}/{MANIFEST}")
    if before is not None and Manifest.from_json(before, root).digest != artifact.digest:
        # said before a file of that artifact is written over
        raise FileExistsError(root)
    server_side = storage.is_s3(artifact.root) and storage.is_s3(root)
    with Progress(f"copying {artifact.title}", artifact.manifest.size) as bar:
        for file in artifact.manifest.files:
            target = storage.join(root, file.path)
            if server_side:
                storage.copy(storage.join(artifact.root, file.path), target)
                bar.advance(file.size)
                continue
            with (
                storage.committed(storage.open_writer(target)) as writer,
                closing(prefetch(artifact.blocks(file.path))) as blocks,
            ):
                for block in blocks:
                    writer.write(block)
                    bar.advance(len(block))
    copied = replace(artifact.manifest, root=root)
    there = {item.name: item.size for item in storage.listing(root, hidden=True)}
    for file in copied.files:
        if there.get(file.path) != file.size:
            raise StorageFault(f"{root}/{file.path}: {there.get(file.path)} bytes of {file.size} came; try again")
    if not artifact.verified:
        return copied
    # what the server copied by itself has passed nobody's digest yet
    for wrong in Artifact(copied, verified=True).find_corruption() if server_side else ():
        raise StorageFault(f"the copy is not as it should be, try again: {wrong}")
    try:
        storage.write_bytes(copied.reference, copied.to_json(), if_absent=True)
    except FileExistsError:
        if Manifest.from_json(storage.read_bytes(copied.reference), copied.reference).digest != artifact.digest:
            raise
    return copied
