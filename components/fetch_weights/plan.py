"""What is fetched, and which sums it must have: known before the first weight is copied.

Which SHA-256 counts: `--expect` before all; then the table of Meta's weights and of the published adapters; then a
sha256sums.txt beside the files; then what the Hugging Face hub says. Meta's checklist.chk (MD5), where the source has
it, must agree as well, unless `--expect` has said what counts. Without any sum, a file is taken as it is, and the log
says so.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from components.fetch_weights.layout import (
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
from components.fetch_weights.transfer import Item
from zhllama.errors import InputError
from zhllama.weights.meta_format import TOKENIZER

_WEIGHTS = (".pth", ".bin", ".safetensors")


@dataclass(frozen=True)
class Plan:
    source: Source
    layout: Layout
    size: str
    items: tuple[Item, ...]


def make_plan(address: str, size: str, expect: str) -> Plan:
    """What will be fetched and checked. InputError when something is missing; no weight has been read then."""
    size = canonical_size(size)
    source = model_folder(open_source(address), size)
    size = size or recognised_size(source)
    names = source.names(likely_names(source, size))
    expected: dict[str, str] = {}
    if expect:
        expected = of_folder(parse_sums(read_expected(expect), f"--expect {expect}"), size_folders(size))
    beside: dict[str, str] = {}
    if SUMS in names and not expect:
        beside = _sums_of(source, SUMS, size)
    checklists = {} if expect else _checklists(source, names, size)
    layout = survey(source, size, names, [*expected, *beside, *checklists])
    items = []
    for name in layout.names:
        holder = source.above() if name in layout.outside else source
        found = holder.stat(name) if holder is not None else None
        if holder is None or found is None:
            raise InputError(f"--source {source.address}: {name} is gone; complete the source")
        sha256, by = _wanted(expect, layout, size, source, found, expected, beside)
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
    expect: str,
    layout: Layout,
    size: str,
    source: Source,
    found: Found,
    expected: Mapping[str, str],
    beside: Mapping[str, str],
) -> tuple[str | None, str]:
    if expect:
        if found.name not in expected and found.name.endswith(_WEIGHTS):
            raise InputError(f"--expect {expect}: no line for {found.name}; add it, or leave --expect out")
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
