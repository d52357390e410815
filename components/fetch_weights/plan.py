"""What is fetched and which sums it must have, decided from names and small files before the first weight is copied.

Which SHA-256 counts: `--expect` before all; then the table of Meta's weights and of the published adapters; then a
sha256sums.txt beside the files; then what the hub says. Meta's checklist.chk (MD5), where there is one, must agree as
well, unless `--expect` has said what counts. Without any sum, a file is taken as it is, and the log says so.
"""

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from components.fetch_weights.sources import HubSource, Source, open_source, read
from components.fetch_weights.sums import CHECKLISTS, SUMS, of_folder, parse_sums, read_expected, shown, table
from components.fetch_weights.transfer import Item
from zhllama.artifacts.json_file import object_of
from zhllama.errors import InputError
from zhllama.weights.gguf_file import SUFFIX, gguf_files, parts_of
from zhllama.weights.meta_format import PARAMS, TOKENIZER, shard_name
from zhllama.weights.model_card import README, is_terms
from zhllama.weights.safetensors_io import INDEX, PICKLED, PICKLED_INDEX, SINGLE, model_files

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
CONFIG = "config.json"
GENERATION = "generation_config.json"
_TOKENIZER_FILES = (
    TOKENIZER, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja",
)  # fmt: skip
_WEIGHTS = (".pth", ".bin", ".safetensors", SUFFIX)
_SHARD = re.compile(r"consolidated\.(\d{2})\.pth")
_MOST_SHARDS = 64


@dataclass(frozen=True)
class Plan:
    source: Source
    kind: str
    """Of the artifact."""
    size: str
    items: tuple[Item, ...]


def make_plan(address: str, size: str, expect: str) -> Plan:
    """What will be fetched and checked. InputError when something is missing; no weight has been read then."""
    size = canonical_size(size)
    folder, file = split_address(address)
    source = open_source(folder) if file else _model_folder(open_source(folder), size)
    size = size or ("" if file else _recognised_size(source))
    names = source.names([*parts_of(file), SUMS] if file else _likely_names(source, size))
    folders = _size_folders(size)
    expected = of_folder(parse_sums(read_expected(expect), shown(expect)), folders) if expect else {}
    beside = _sums_of(source, SUMS, size) if SUMS in names and not expect else {}
    checklists = {} if expect else _checklists(source, names, size)
    kind, wanted = _survey(source, size, file, names, [*expected, *beside, *checklists])
    # the repositories' names are known, also as the last two parts of a mirror's address
    name = source.repository if isinstance(source, HubSource) else "/".join(source.address.split("/")[-2:])
    tables = {"meta-weights": table()["meta"].get(size), "adapter": table()["adapters"].get(name)}
    published: Mapping[str, str] = tables.get(kind) or {}
    items = []
    for name in wanted:
        holder = source if name in names else source.above()
        found = holder.stat(name) if holder else None
        if holder is None or found is None:
            raise InputError(f"--source {source.address}: {name} is gone; complete the source")
        if expect and name not in expected and name.endswith(_WEIGHTS):
            raise InputError(f"{shown(expect)}: no line for {name}; add it, or leave --expect out")
        said = [(published, "the published table"), (beside, SUMS), ({name: found.sha256}, "the hub")]
        said = [(expected, "--expect")] if expect else said
        sha256 = [(digest, by) for known, by in said if (digest := known.get(name))]
        sums = {"sha256": sha256[0]} if sha256 else {}
        if name in checklists:
            sums["md5"] = checklists[name]
        items.append(Item(holder, found, sums))
    return Plan(source, kind, size, tuple(items))


def split_address(address: str) -> tuple[str, str]:
    """The folder, and the GGUF in it where the address names one."""
    folder, _, file = address.rpartition("/")
    return (folder or ("/" if address.startswith("/") else "."), file) if file.endswith(SUFFIX) else (address, "")


def canonical_size(size: str) -> str:
    """`13B` → `13b`, `33b` → `30b` (one model, two names); other names in lower case. InputError for no name."""
    name = size.lower()
    if name and not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name):
        raise InputError(f"--size {size}: not a name; give 7b, 13b, 30b (or 33b), 65b, or a name of your own")
    return "30b" if name == "33b" else name


def _size_folders(size: str) -> tuple[str, ...]:
    """The folders that a size's files may lie in, below a folder of several sizes."""
    names = ("30B", "30b", "33B", "33b") if size == "30b" else (size.upper(), size)
    return tuple(dict.fromkeys(filter(None, names)))


def _model_folder(source: Source, size: str) -> Source:
    """The source itself, or the folder of the size in it (`13B/`) when that is where the model lies."""
    for folder in ("", *_size_folders(size)):
        place = source.below(folder) if folder else source
        if any(place.stat(name) for name in (PARAMS, CONFIG, ADAPTER_CONFIG)):
            return place
    return source


def _recognised_size(source: Source) -> str:
    """The published size whose params.json lies in the source; "" when it is none of them."""
    if source.stat(PARAMS) is None:
        return ""
    digest = hashlib.sha256(read(source, PARAMS)).hexdigest()
    return next((size for size, files in table()["meta"].items() if files[PARAMS] == digest), "")


def _shard_count(size: str) -> int | None:
    """Shards of a published LLaMA; None for a size that the table does not know."""
    return sum(map(bool, map(_SHARD.fullmatch, table()["meta"].get(size, ())))) or None


def _likely_names(source: Source, size: str) -> Iterator[str]:
    """Names to ask for where there is no listing. Lazy: what is asked for depends on what was found."""
    yield from (SUMS, *CHECKLISTS, CONFIG, GENERATION, PARAMS, ADAPTER_CONFIG, *ADAPTER_WEIGHTS, SINGLE)
    yield from _TOKENIZER_FILES
    yield PICKLED
    for index in (INDEX, PICKLED_INDEX):
        if source.stat(index) is not None:
            yield index
            yield from _indexed_shards(source, index)
    count = _shard_count(size)
    for number in range(count or _MOST_SHARDS):
        if count is None and number and source.stat(shard_name(number)) is None:
            break
        yield shard_name(number)


def _indexed_shards(source: Source, index: str) -> list[str]:
    try:
        return sorted(set(object_of(read(source, index))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        wrong = f"no index of weights ({error}); fetch another copy"
        raise InputError(f"--source {source.address}/{index}: {wrong}") from error


def _survey(
    source: Source, size: str, file: str, names: Collection[str], listed: Iterable[str]
) -> tuple[str, list[str]]:
    """The kind of artifact, and its files. file: the GGUF that is wanted; `listed`: those of files of sums. InputError
    for what is missing."""
    where = f"--source {source.address}"
    if file:
        if file not in names:
            raise InputError(f"{where}/{file}: nothing is there; correct the address")
        return "gguf", [*gguf_files([name for name in names if name in parts_of(file)], where), *_cards(names)]

    def among(*wanted: str) -> list[str]:
        return [name for name in wanted if name in names]

    if ADAPTER_CONFIG in names:
        weights = among(*ADAPTER_WEIGHTS)[:1]
        if not weights:
            raise InputError(f"{where}: {ADAPTER_CONFIG} is there, but neither {' nor '.join(ADAPTER_WEIGHTS)}")
        return "adapter", [ADAPTER_CONFIG, *weights, *among(*_TOKENIZER_FILES)]
    if PARAMS in names or any(map(_SHARD.fullmatch, names)):
        return "meta-weights", [*_meta(source, size, names, listed), *_cards(names)]
    if any(name.endswith(SUFFIX) for name in names) and not any(name.endswith(_WEIGHTS[:3]) for name in names):
        return "gguf", [*gguf_files(names, where), *_cards(names)]
    if CONFIG not in names:
        raise InputError(
            f"{where}: neither Meta's files ({PARAMS}), nor a Hugging Face model ({CONFIG}), nor an adapter "
            f"({ADAPTER_CONFIG}), nor a GGUF is there; give the folder that holds them, or the address of a GGUF"
        )
    weights, _ = model_files(names, lambda name: object_of(read(source, name)), where)
    weights = [*among(PICKLED_INDEX if weights[0].endswith(".bin") else INDEX), *weights]
    if missing := [name for name in weights if name not in names]:
        raise InputError(f"{where}: {', '.join(missing)} named by {weights[0]}, but missing; complete the source")
    return "hf-model", [CONFIG, *among(GENERATION, *_TOKENIZER_FILES), *_cards(names), *weights]


def _cards(names: Collection[str]) -> list[str]:
    """What says under which terms a model may be used."""
    return sorted(name for name in names if name == README or is_terms(name))


def _meta(source: Source, size: str, names: Collection[str], listed: Iterable[str]) -> list[str]:
    """Meta's files; the tokenizer may lie in the folder above."""

    def greatest(names: Iterable[str]) -> int:
        return max((int(found[1]) for name in names if (found := _SHARD.fullmatch(name))), default=-1)

    where = f"--source {source.address}"
    known, there = _shard_count(size), greatest(names)
    if known and there >= known:
        raise InputError(f"{where}: {there + 1} shards are there and {size} has {known}; correct --size or --source")
    count = known or max(there, greatest(listed), 0) + 1
    wanted = [PARAMS, *map(shard_name, range(count)), TOKENIZER]
    missing = [name for name in wanted if name not in names]
    if TOKENIZER in missing and (above := source.above()) and above.stat(TOKENIZER):
        missing.remove(TOKENIZER)
    if missing:
        raise InputError(
            f"{where}: {', '.join(missing)} missing; {size or 'it'} has {count} shard{'s' if count > 1 else ''}, "
            f"{PARAMS} and {TOKENIZER}; complete the source"
        )
    return wanted


def _sums_of(source: Source, name: str, size: str, kind: str = "sha256") -> dict[str, str]:
    """The lines of a file of sums in the source, for the files of this size."""
    return of_folder(parse_sums(read(source, name), f"--source {source.address}/{name}", kind), _size_folders(size))


def _checklists(source: Source, names: Collection[str], size: str) -> dict[str, tuple[str, str]]:
    """File → MD5 and the checklist that says so. The tokenizer's may lie in the folder above, with the tokenizer."""
    found: dict[str, tuple[str, str]] = {}
    for name in CHECKLISTS:
        holder: Source | None = source
        if name not in names:
            holder = source.above() if TOKENIZER not in names and name == CHECKLISTS[1] else None
        if holder and holder.stat(name):
            found |= {file: (md5, name) for file, md5 in _sums_of(holder, name, size, "md5").items()}
    return found
