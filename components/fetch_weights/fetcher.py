"""What is fetched and which sums it must have; the copying itself is in transfer.py.

What is missing is found before the first weight is copied; a file whose sum is not the wanted one stops everything, and
nothing is published. A pickle (.pth, .bin) is never opened here.

Which SHA-256 counts: `--expect` before all; then the table of Meta's weights and of the published adapters; then a
sha256sums.txt beside the files; then what the Hugging Face hub says. Meta's checklist.chk (MD5), where the source has
it, must agree as well, unless `--expect` has said what counts. Without any sum, a file is taken as it is, and the log
says so.
"""

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from components.fetch_weights.layout import (
    CONFIG,
    Layout,
    canonical_size,
    likely_names,
    model_folder,
    recognised_size,
    size_folders,
    survey,
)
from components.fetch_weights.sources import Found, HubSource, Source, open_source, read
from components.fetch_weights.sums import CHECKLISTS, SUMS, of_folder, parse_sums, read_expected, table
from components.fetch_weights.transfer import Item, Sums, transfer
from zhllama.artifacts.manifest import Input, Manifest, digest_of
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.progress import human
from zhllama.stage.inputs import Inputs
from zhllama.stage.options import NotKeyed, StageOptions
from zhllama.tokenizer.vocabulary import Encoder, Vocabulary, padding_multiple
from zhllama.weights.meta_format import PARAMS, TOKENIZER, MetaParams

log = logging.getLogger("fetch")

_WEIGHTS = (".pth", ".bin", ".safetensors")


@dataclass(frozen=True, kw_only=True)
class FetchWeights(StageOptions):
    """Fetch weights (Meta's, a Hugging Face model's, an adapter's), verify them and publish them as they are."""

    # the address says nothing about the result; what is listed there does (more_inputs)
    source: NotKeyed[str]
    """s3://bucket/prefix, https://host/folder, a folder, or a Hugging Face repository: owner/name or hf://owner/name."""
    size: str = ""
    """7b, 13b, 30b (or 33b), 65b: checked against the published SHA-256; any other name, or none: other weights of
    Meta's layout, unless params.json is a published one. Not needed for Hugging Face models and adapters."""
    expect: NotKeyed[str] = ""
    """A sha256sums file (path, s3:// or https:// address): each file of weights must be in it and agree with it."""
    parallel: NotKeyed[int] = 8
    """Parts of 16 MiB fetched side by side, of one file and of several; two more wait in memory."""

    def __post_init__(self) -> None:
        canonical_size(self.size)
        if not self.source:
            raise InputError("--source: empty; give s3://bucket/prefix, https://host/folder, a folder, or owner/name")
        if self.parallel < 1:
            raise InputError(f"--parallel {self.parallel}: at least one part is fetched at a time; give 1 or more")

    def more_inputs(self) -> dict[str, Input]:
        plan = make_plan(self)
        listed = [[item.name, item.found.size, item.found.tag, item.sha256, item.md5] for item in plan.items]
        return {"source": Input(plan.source.address, digest_of(listed))}


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
    size = size or recognised_size(source)
    names = source.names(likely_names(source, size))
    expected: dict[str, str] = {}
    if config.expect:
        expected = of_folder(parse_sums(read_expected(config.expect), f"--expect {config.expect}"), size_folders(size))
    beside: dict[str, str] = {}
    if SUMS in names and not config.expect:
        beside = _sums_of(source, SUMS, size)
    checklists = {} if config.expect else _checklists(source, names, size)
    layout = survey(source, size, names, [*expected, *beside, *checklists])
    items = []
    for name in layout.names:
        holder = source.above() if name in layout.outside else source
        found = holder.stat(name) if holder is not None else None
        if holder is None or found is None:
            raise InputError(f"--source {source.address}: {name} is gone; complete the source")
        sha256, by = _wanted(config, layout, size, source, found, expected, beside)
        md5, checklist = checklists.get(name, (None, ""))
        items.append(Item(holder, found, sha256, by, md5, checklist))
    return Plan(source, layout, size, tuple(items))


def _sums_of(source: Source, name: str, size: str, kind: str = "sha256") -> dict[str, str]:
    """The lines of a file of sums in the source, for the files of this size."""
    return of_folder(parse_sums(read(source, name), f"--source {source.address}/{name}", kind), size_folders(size))


def _checklists(source: Source, names: Collection[str], size: str) -> dict[str, tuple[str, str]]:
    """File → MD5 and the checklist that says so. The tokenizer's may lie in the folder above, with the tokenizer."""
    found: dict[str, tuple[str, str]] = {}
    for name in CHECKLISTS:
        holder: Source | None = source
        if name not in names:
            holder = source.above() if TOKENIZER not in names and name == CHECKLISTS[1] else None
        if holder is not None and (holder is source or holder.stat(name) is not None):
            found |= {file: (md5, name) for file, md5 in _sums_of(holder, name, size, "md5").items()}
    return found


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


def fetch_weights(config: FetchWeights, inputs: Inputs, out: ArtifactWriter) -> Manifest:
    """Publishes the files. InputError for missing files and wrong sums, StorageFault for a source that fails."""
    plan = make_plan(config)
    out.vocabulary = _vocabulary(plan)
    transfer(plan.items, out, config.parallel)

    unknown = [item.name for item in plan.items if not item.verified_by]
    if unknown:
        log.warning("no sum is known for %s: taken as they are (--expect gives them)", ", ".join(unknown))
    # by content, so that the same weights from another place give an artifact of the same digest
    content = digest_of([[file.path, file.sha256] for file in out.files])
    out.inputs = {"source": Input(plan.source.address, content)}
    out.facts["size"] = plan.size
    out.facts["verified"] = {item.name: item.verified_by for item in plan.items if item.verified_by}
    total = sum(file.size for file in out.files)
    verified = len(plan.items) - len(unknown)
    out.facts["summary"] = f"{len(plan.items)} files, {human(total, 'B')}, {verified} verified"
    return out.publish(plan.layout.kind)


def _vocabulary(plan: Plan) -> Vocabulary | None:
    """The contract of the tokenizer that comes along; small files only. InputError when it does not fit the model."""
    small = {item.name: item for item in plan.items}

    def content(name: str) -> bytes:
        item = small[name]
        found = read(item.source, name)
        sums = Sums(item.md5 is not None)
        sums.add(found, [])
        sums.check(item)
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
