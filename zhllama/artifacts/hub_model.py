"""Models and adapters of the Hugging Face Hub as inputs: `hf://OWNER/NAME[@REVISION][/FOLDER]`.

A repository is read by ranges, tensor by tensor, as a prefix of S3 is. The revision is resolved to a commit when the
reference is opened; the digest is of the content that the Hub names (SHA-256 of large files, git's digest of small
ones). huggingface_hub's settings hold (HF_ENDPOINT, HF_TOKEN). A copy of one's own, verified: fetch_weights.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from zhllama import storage
from zhllama.artifacts.blocks import Source
from zhllama.artifacts.hub_bounds import bound_hub
from zhllama.artifacts.manifest import File, Manifest, digest_of
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError, StorageFault

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

HUB_NAME = r"[\w-][\w.-]*/[\w-][\w.-]*"
"""`owner/name` on the Hugging Face Hub."""
PREFIX = "hf://"
_SHAPE = "hf://OWNER/NAME[@REVISION][/FOLDER]"
TIMEOUT = 60.0
"""Seconds without a byte."""


def open_hub_model(reference: str, where: str) -> Artifact:
    """The artifact that stands for a repository. InputError when there is none; `where` begins the message."""
    found = parse_address(PREFIX + reference.removeprefix(PREFIX))
    if found is None:
        raise InputError(f"{where}: no repository of the Hub; write {_SHAPE}")
    repository, revision, folder = found
    commit, entries = hub_files(repository, revision, folder, where)
    files, identity = [], []
    for name, entry in sorted(entries.items()):
        if entry.size is not None:
            sha256 = entry.lfs.sha256 if entry.lfs else ""
            files.append(File(name, entry.size, sha256))
            identity.append([name, entry.size, sha256 or entry.blob_id])
    if not files:
        raise InputError(f"{where}: nothing is in this repository or folder; correct the address")
    root = f"{PREFIX}{repository}@{commit}" + (f"/{folder}" if folder else "")
    manifest = Manifest(kind="files", stage="", root=root, files=tuple(files), digest=digest_of(identity))
    return Artifact(manifest, False, hub_source(root, repository, commit, f"{folder}/" if folder else ""))


def parse_address(address: str) -> tuple[str, str | None, str] | None:
    """Repository, revision (None: its main branch) and folder ("": the whole) of an address; None when it is none."""
    found = re.fullmatch(rf"{PREFIX}({HUB_NAME})(?:@([\w.-]+))?(?:/([\w./-]+?))?/?", address)
    return (found[1], found[2], found[3] or "") if found else None


def hub_files(repository: str, revision: str | None, folder: str, where: str) -> tuple[str, dict[str, "RepoSibling"]]:
    """The commit, and what the Hub says of each file below a folder, by its name there. Errors as hub_errors."""
    from huggingface_hub import HfApi

    with hub_errors(where):
        info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=TIMEOUT)
    prefix = f"{folder}/" if folder else ""
    listed = [item for item in info.siblings or [] if item.rfilename.startswith(prefix)]
    return info.sha or "main", {item.rfilename[len(prefix) :]: item for item in listed}


def hub_source(root: str, repository: str, commit: str, folder: str) -> Source:
    """The files of a repository's folder at a commit: by range."""

    def read(name: str, start: int, length: int, buffer: memoryview, take: storage.Take | None) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

        if not length:
            return
        with hub_errors(f"{root}/{name}"):
            url = hf_hub_url(repository, f"{folder}{name}", revision=commit)
            # (which asks the Hub something, too)
            headers = {**build_hf_headers(), "Range": f"bytes={start}-{start + length - 1}"}
            answer: Any = http_backoff("GET", url, headers=headers, timeout=TIMEOUT, follow_redirects=True)
            hf_raise_for_status(answer)
        content = answer.content
        if len(content) != length:
            raise StorageFault(f"{root}/{name}: {len(content)} bytes came of {length}; try again")
        if take:
            take(0, memoryview(content))
        else:
            buffer[:length] = content

    return read


@contextmanager
def hub_errors(where: str) -> Iterator[None]:
    """Turns the hub library's exceptions into ours; `where` begins the message. What it is answered has bounds."""
    from huggingface_hub import errors as hub
    from huggingface_hub.utils import httpx

    bound_hub()
    try:
        yield
    except hub.GatedRepoError as error:
        raise InputError(f"{where}: access has to be granted; ask for it on the hub and set HF_TOKEN") from error
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError) as error:
        wrong = "no such folder here, and no such repository or revision on the hub"
        raise InputError(f"{where}: {wrong}; correct the name, or set HF_TOKEN if it is private") from error
    except hub.OfflineModeIsEnabled as error:
        raise InputError(f"{where}: no such folder here, and HF_HUB_OFFLINE keeps the hub from being asked") from error
    except (hub.EntryNotFoundError, FileNotFoundError) as error:
        raise InputError(f"{where}: the file is listed but not there; give another revision") from error
    except (hub.HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise StorageFault(f"{where}: the hub does not answer ({error}); check the network and try again") from error
