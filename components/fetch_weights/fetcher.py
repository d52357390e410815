"""Fetching as a stream: bytes are hashed while they pass from the source to the store, a few files side by side.

No file is held in memory and none is kept on this machine. What is missing is found before the first weight is
copied; a file whose SHA-256 is not the wanted one stops everything, and nothing is published. A pickle (.pth, .bin)
is never opened here.

Which SHA-256 counts: `--expect` before all; then the table of Meta's weights and of the published adapters; then a
sha256sums.txt beside the files; then what the Hugging Face hub says. Without any, a file is taken as it is, and the
log says so.
"""

import hashlib
import json
import logging
import threading
from collections.abc import Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from components.fetch_weights.layout import (
    CONFIG,
    Layout,
    canonical_size,
    likely_names,
    model_folder,
    size_folders,
    survey,
)
from components.fetch_weights.sources import Found, HubSource, Source, open_source, read
from components.fetch_weights.sums import SUMS, of_folder, parse_sums, read_expected, table
from components.shared.artifact import ArtifactWriter, Input, Manifest, digest_of
from components.shared.cli import StageOptions, not_keyed
from components.shared.errors import InputError, StorageFault
from components.shared.meta_format import PARAMS, TOKENIZER, MetaParams
from components.shared.progress import Progress, human
from components.shared.vocabulary import Encoder, Vocabulary, padding_multiple

log = logging.getLogger("fetch")

_WEIGHTS = (".pth", ".bin", ".safetensors")


@dataclass(frozen=True, kw_only=True)
class FetchWeights(StageOptions):
    """Fetch weights (Meta's, a Hugging Face model's, an adapter's), verify them and publish them as they are."""

    # the address says nothing about the result; what is listed there does (more_inputs)
    source: not_keyed(str)  # type: ignore[valid-type]
    """s3://bucket/prefix, https://host/folder, a folder, or a Hugging Face repository: owner/name or hf://owner/name."""
    size: str = ""
    """7b, 13b, 30b (or 33b), 65b: checked against the published SHA-256; any other name: other weights of Meta's
    layout. Not needed for Hugging Face models and adapters."""
    expect: not_keyed(str) = ""  # type: ignore[valid-type]
    """A sha256sums file (path, s3:// or https:// address): each file of weights must be in it and agree with it."""
    parallel: not_keyed(int) = 4  # type: ignore[valid-type]
    """Files fetched side by side."""

    def __post_init__(self) -> None:
        canonical_size(self.size)
        if not self.source:
            raise InputError("--source: empty; give s3://bucket/prefix, https://host/folder, a folder, or owner/name")
        if self.parallel < 1:
            raise InputError(f"--parallel {self.parallel}: at least one file is fetched at a time; give 1 or more")

    def more_inputs(self) -> dict[str, Input]:
        plan = make_plan(self)
        listed = [[item.found.name, item.found.size, item.found.tag, item.wanted] for item in plan.items]
        return {"source": Input(plan.source.address, digest_of(listed))}


@dataclass(frozen=True)
class Item:
    """A file to fetch: from where, and the SHA-256 it must have (None: not known) with who says so."""

    source: Source
    found: Found
    wanted: str | None
    said_by: str


@dataclass(frozen=True)
class Plan:
    source: Source
    layout: Layout
    size: str
    items: tuple[Item, ...]


def make_plan(config: FetchWeights) -> Plan:
    """What will be fetched and checked. InputError when something is missing; no weight has been read then."""
    size = canonical_size(config.size)
    source = model_folder(open_source(config.source), size)
    names = source.names(likely_names(source, size))
    expected: dict[str, str] = {}
    if config.expect:
        expected = of_folder(parse_sums(read_expected(config.expect), f"--expect {config.expect}"), size_folders(size))
    beside: dict[str, str] = {}
    if SUMS in names and not config.expect:
        where = f"--source {source.address}/{SUMS}"
        beside = of_folder(parse_sums(read(source, SUMS), where), size_folders(size))
    layout = survey(source, size, names, expected or beside)
    items = []
    for name in layout.names:
        holder = source.above() if name in layout.outside else source
        found = holder.stat(name) if holder is not None else None
        if holder is None or found is None:
            raise InputError(f"--source {source.address}: {name} is gone; complete the source")
        items.append(Item(holder, found, *_wanted(config, layout, size, source, found, expected, beside)))
    return Plan(source, layout, size, tuple(items))


def _wanted(
    config: FetchWeights,
    layout: Layout,
    size: str,
    source: Source,
    found: Found,
    expected: Mapping[str, str],
    beside: Mapping[str, str],
) -> tuple[str | None, str]:
    if config.expect:
        if found.name not in expected and found.name.endswith(_WEIGHTS):
            raise InputError(f"--expect {config.expect}: no line for {found.name}; add it, or leave --expect out")
        return expected.get(found.name), "--expect"
    published: Mapping[str, str] = {}
    if layout.kind == "meta-weights":
        published = table()["meta"].get(size, {})
    elif layout.kind == "adapter":
        # the repositories' names are known, also as the last two parts of a mirror's address
        name = source.repository if isinstance(source, HubSource) else "/".join(source.address.split("/")[-2:])
        published = table()["adapters"].get(name, {})
    if found.name in published:
        return published[found.name], "the published table"
    if found.name in beside:
        return beside[found.name], SUMS
    return found.sha256, "the hub"


def fetch_weights(config: FetchWeights, out: ArtifactWriter) -> Manifest:
    """Publishes the files. InputError for missing files and wrong sums, StorageFault for a source that fails."""
    plan = make_plan(config)
    out.vocabulary = _vocabulary(plan)
    _fetch(plan, out, config.parallel)

    unknown = [item.found.name for item in plan.items if item.wanted is None]
    if unknown:
        log.warning("no SHA-256 is known for %s: taken as they are (--expect gives them)", ", ".join(unknown))
    # by content, so that the same weights from another place give an artifact of the same digest
    content = digest_of([[file.path, file.sha256] for file in out.files])
    out.inputs = {"source": Input(plan.source.address, content)}
    verified = len(plan.items) - len(unknown)
    out.facts["size"] = plan.size
    out.facts["verified"] = {item.found.name: item.said_by for item in plan.items if item.wanted is not None}
    total = sum(file.size for file in out.files)
    out.facts["summary"] = f"{len(plan.items)} files, {human(total, 'B')}, {verified} verified by SHA-256"
    return out.publish(plan.layout.kind)


def _vocabulary(plan: Plan) -> Vocabulary | None:
    """The contract of the tokenizer that comes along; small files only. InputError when it does not fit the model."""
    small = {item.found.name: item for item in plan.items}

    def content(name: str) -> bytes:
        item = small[name]
        found = read(item.source, name)
        _check(item, len(found), hashlib.sha256(found).hexdigest())
        return found

    where = f"--source {plan.source.address}"
    if plan.layout.kind == "meta-weights":
        MetaParams.from_json(content(PARAMS), f"{where}/{PARAMS}")
    if TOKENIZER not in small:
        return None
    encoder = Encoder(content(TOKENIZER), f"{where}/{TOKENIZER}")
    if plan.layout.kind != "hf-model":
        return encoder.vocabulary()
    try:
        settings: dict[str, Any] = dict(json.loads(content(CONFIG)))
        rows = int(settings["vocab_size"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where}/{CONFIG}: no configuration of a model ({error}); fetch another copy") from error
    if rows < encoder.size:
        raise InputError(
            f"{where}: {TOKENIZER} has {encoder.size} pieces and {CONFIG} says {rows} rows; give model and tokenizer "
            "that belong together"
        )
    return encoder.vocabulary(
        padding_multiple=padding_multiple(encoder.size, rows),
        tied=bool(settings.get("tie_word_embeddings", False)),
        dtype=settings.get("dtype") or settings.get("torch_dtype"),
    )


def _fetch(plan: Plan, out: ArtifactWriter, parallel: int) -> None:
    """Copies all files; the first failure stops the others at their next chunk and is raised."""
    stop = threading.Event()
    lock = threading.Lock()
    sizes = [item.found.size for item in plan.items]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    with Progress("fetching", total) as bar, ThreadPoolExecutor(parallel) as pool:

        def fetch(item: Item) -> None:
            with out.writer(item.found.name) as stream:
                for chunk in item.source.chunks(item.found.name):
                    if stop.is_set():
                        raise _Stopped
                    stream.write(chunk)
                    with lock:
                        bar.advance(len(chunk))
                _check(item, stream.size, stream.sha256())

        try:
            tasks = [pool.submit(fetch, item) for item in plan.items]
            wait(tasks, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    failures = [error for task in tasks if not task.cancelled() and (error := task.exception()) is not None]
    for error in sorted(failures, key=lambda error: isinstance(error, _Stopped)):
        raise error


class _Stopped(Exception):
    """Another file failed."""


def _check(item: Item, size: int, sha256: str) -> None:
    where = f"{item.source.address}/{item.found.name}"
    if item.found.size is not None and size != item.found.size:
        raise StorageFault(f"{where}: {size} bytes came of {item.found.size}; it was cut short or changed, try again")
    if item.wanted is not None and sha256 != item.wanted:
        raise InputError(
            f"{where}: sha256 {item.wanted} expected (by {item.said_by}), {sha256} found; fetch it again, or pass "
            "--expect if these are other weights"
        )
