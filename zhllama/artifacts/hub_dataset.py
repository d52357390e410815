"""Datasets of the Hugging Face Hub as inputs: `hf://datasets/OWNER/NAME[@REVISION][?config=C&split=S&column=COLUMN]`.

Rows are streamed, nothing is kept on this machine. The revision is resolved to a commit when the reference is opened,
and the digest is of that commit and of what is read of it: a dataset that has changed is another input. Only plain data
is read (Parquet, Arrow, JSON, CSV, text); code in a dataset is never run. huggingface_hub's settings hold.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any
from urllib.parse import parse_qsl, urlencode

from zhllama.artifacts.hub_bounds import bound_hub
from zhllama.artifacts.manifest import Manifest, digest_of
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError, StorageFault
from zhllama.retries import with_retries

KIND = "hub-dataset"
PREFIX = "hf://datasets/"
_FORMATS = ("arrow", "csv", "json", "parquet", "text")
_SHAPE = "hf://datasets/OWNER/NAME[@REVISION][?config=C&split=S&column=COLUMN]"


@dataclass(frozen=True)
class HubDataset:
    """Which rows of which dataset; `revision` is a branch, a tag or a commit."""

    name: str
    revision: str = "main"
    config: str = ""
    split: str = "train"
    column: str = "text"

    @staticmethod
    def parse(address: str) -> "HubDataset":
        """InputError for an address that is not of the shape above."""
        path, _, query = address.removeprefix(PREFIX).partition("?")
        name, _, revision = path.partition("@")
        options = dict(parse_qsl(query, keep_blank_values=True))
        unknown = sorted(set(options) - {"config", "split", "column"})
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or unknown:
            raise InputError(f"{address}: not the address of a dataset; write {_SHAPE}")
        return HubDataset(name, revision or "main", **options)

    @property
    def address(self) -> str:
        chosen = {key: getattr(self, key) for key in ("config", "split", "column")}
        options = urlencode({key: value for key, value in chosen.items() if value != getattr(HubDataset, key)})
        return f"{PREFIX}{self.name}@{self.revision}" + (f"?{options}" if options else "")


def open_hub_dataset(address: str, where: str) -> Artifact:
    """The artifact that stands for a dataset: no files, its commit in address and digest. Errors as _mapped(where)."""
    from huggingface_hub import HfApi

    asked = HubDataset.parse(address)

    def commit() -> str:
        with _mapped(where):
            return str(HfApi().dataset_info(asked.name, revision=asked.revision).sha)

    found = replace(asked, revision=with_retries(commit, lambda error: isinstance(error, StorageFault), tries=4))
    manifest = Manifest(kind=KIND, stage="", root=found.address, files=(), digest=digest_of(asdict(found)))
    return Artifact(manifest, verified=False)


def hub_rows(artifact: Artifact) -> Iterator[Mapping[str, Any]]:
    """The rows of a dataset that `open_hub_dataset` opened, in order, as they arrive."""
    import datasets

    asked = HubDataset.parse(artifact.root)
    with _mapped(artifact.root):
        try:
            builder = datasets.load_dataset_builder(asked.name, asked.config or None, revision=asked.revision)
            rows = builder.as_streaming_dataset(split=asked.split)
        except (datasets.exceptions.DatasetsError, ValueError, RuntimeError) as error:
            # an unknown configuration or split, or a program where data should be: the text says what there is
            raise InputError(f"{artifact.root}: {error}; correct the address") from error
        form = type(builder).__module__.split(".")[-1]
        if form not in _FORMATS:
            raise InputError(f"{artifact.root}: its data is {form}; {', '.join(_FORMATS)} can be read")
        yield from rows


@contextmanager
def _mapped(where: str) -> Iterator[None]:
    """The libraries' errors as ours: what the user can mend, and a Hub that does not answer. What it answers has
    bounds."""
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    bound_hub()
    try:
        yield
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        wrong = "the Hub has no such dataset or revision, or it wants a token (HF_TOKEN)"
        raise InputError(f"{where}: {wrong}; correct the address") from error
    except errors.OfflineModeIsEnabled as error:
        raise InputError(f"{where}: HF_HUB_OFFLINE is set; unset it, or give the text as files") from error
    except errors.HFValidationError as error:
        raise InputError(f"{where}: not the name of a dataset ({error}); write {_SHAPE}") from error
    except (errors.HfHubHTTPError, httpx.HTTPError, ConnectionError, TimeoutError) as error:
        raise StorageFault(f"{where}: the Hub does not answer ({error}); try again") from error
