"""What lies in a source, and whether it is complete: decided from names alone, before the first weight is copied."""

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from components.fetch_weights.sources import Source, read
from components.fetch_weights.sums import CHECKLISTS, SUMS, table
from zhllama.artifacts.json_file import object_of
from zhllama.errors import InputError
from zhllama.weights.meta_format import PARAMS, TOKENIZER, shard_name

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_TOKENIZER_FILES = (
    TOKENIZER,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_SHARD = re.compile(r"consolidated\.(\d{2})\.pth")
_SIZE = re.compile(r"[a-z0-9][a-z0-9._-]*")
_MOST_SHARDS = 64


@dataclass(frozen=True)
class Layout:
    """The kind of artifact and its files. `outside`: those that lie in the folder above (Meta's tokenizer)."""

    kind: str
    names: tuple[str, ...]
    outside: tuple[str, ...] = ()


def canonical_size(size: str) -> str:
    """`13B` → `13b`, `33b` → `30b` (one model, two names); other names in lower case. InputError for no name."""
    name = size.lower()
    if name and not _SIZE.fullmatch(name):
        raise InputError(f"--size {size}: not a name; give 7b, 13b, 30b (or 33b), 65b, or a name of your own")
    return "30b" if name == "33b" else name


def size_folders(size: str) -> tuple[str, ...]:
    """The folders that a size's files may lie in, below a folder of several sizes."""
    names = {"30b": ("30B", "30b", "33B", "33b")}.get(size, (size.upper(), size))
    return tuple(dict.fromkeys(name for name in names if name))


def model_folder(source: Source, size: str) -> Source:
    """The source itself, or the folder of the size in it (`13B/`) when that is where the model lies."""
    if any(source.stat(name) for name in (PARAMS, CONFIG, ADAPTER_CONFIG)):
        return source
    for folder in size_folders(size):
        below = source.below(folder)
        if any(below.stat(name) for name in (PARAMS, CONFIG, ADAPTER_CONFIG)):
            return below
    return source


def recognised_size(source: Source) -> str:
    """The published size whose params.json lies in the source; "" when it is none of them."""
    if source.stat(PARAMS) is None:
        return ""
    digest = hashlib.sha256(read(source, PARAMS)).hexdigest()
    return next((size for size, files in table()["meta"].items() if files[PARAMS] == digest), "")


def shard_count(size: str) -> int | None:
    """Shards of a published LLaMA; None for a size that the table does not know."""
    known = table()["meta"].get(size)
    return None if known is None else sum(bool(_SHARD.fullmatch(name)) for name in known)


def likely_names(source: Source, size: str) -> Iterator[str]:
    """Names to ask for where there is no listing. Lazy: what is asked for depends on what was found."""
    yield from (SUMS, *CHECKLISTS, CONFIG, "generation_config.json", PARAMS, ADAPTER_CONFIG, *ADAPTER_WEIGHTS, SINGLE)
    yield from _TOKENIZER_FILES
    if source.stat(INDEX) is not None:
        yield INDEX
        yield from indexed_shards(source)
    count = shard_count(size)
    for number in range(count or _MOST_SHARDS):
        if count is None and number and source.stat(shard_name(number)) is None:
            break
        yield shard_name(number)


def indexed_shards(source: Source) -> list[str]:
    where = f"--source {source.address}/{INDEX}"
    try:
        return sorted(set(object_of(read(source, INDEX))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: no index of safetensors ({error}); fetch another copy") from error


def survey(source: Source, size: str, names: Collection[str], listed: Collection[str]) -> Layout:
    """What is there. `listed`: the files that have a line in files of sums. InputError for what is missing."""
    where = f"--source {source.address}"
    if ADAPTER_CONFIG in names:
        weights = next((name for name in ADAPTER_WEIGHTS if name in names), None)
        if weights is None:
            raise InputError(f"{where}: {ADAPTER_CONFIG} is there, but neither {' nor '.join(ADAPTER_WEIGHTS)}")
        return Layout("adapter", (ADAPTER_CONFIG, weights, *_among(_TOKENIZER_FILES, names)))
    if PARAMS in names or any(_SHARD.fullmatch(name) for name in names):
        return _meta(source, size, names, listed)
    if CONFIG in names:
        return _hugging_face(source, names)
    raise InputError(
        f"{where}: neither Meta's files ({PARAMS}), nor a Hugging Face model ({CONFIG}), nor an adapter "
        f"({ADAPTER_CONFIG}) is there; give the folder that holds them"
    )


def _meta(source: Source, size: str, names: Collection[str], listed: Collection[str]) -> Layout:
    where = f"--source {source.address}"
    known = shard_count(size)
    there = _greatest(names)
    if known and there >= known:
        raise InputError(f"{where}: {there + 1} shards are there and {size} has {known}; correct --size or --source")
    count = known or max(there, _greatest(listed), 0) + 1
    wanted = [PARAMS, *(shard_name(number) for number in range(count))]
    missing = [name for name in wanted if name not in names]
    outside: tuple[str, ...] = ()
    if TOKENIZER not in names:
        above = source.above()
        if above is not None and above.stat(TOKENIZER) is not None:
            outside = (TOKENIZER,)
        else:
            missing.append(TOKENIZER)
    if missing:
        raise InputError(
            f"{where}: {', '.join(missing)} missing; {size or 'it'} has {count} shard{'s' if count > 1 else ''}, "
            f"{PARAMS} and {TOKENIZER}; complete the source"
        )
    return Layout("meta-weights", (*wanted, TOKENIZER), outside)


def _greatest(names: Iterable[str]) -> int:
    """The greatest number of a shard; -1 without one."""
    return max((int(found[1]) for name in names if (found := _SHARD.fullmatch(name))), default=-1)


def _hugging_face(source: Source, names: Collection[str]) -> Layout:
    where = f"--source {source.address}"
    files = [CONFIG, *_among(("generation_config.json", *_TOKENIZER_FILES), names)]
    if INDEX in names:
        shards = indexed_shards(source)
        missing = [name for name in shards if name not in names]
        if missing:
            raise InputError(f"{where}: {', '.join(missing)} named by {INDEX}, but missing; complete the source")
        return Layout("hf-model", (*files, INDEX, *shards))
    if SINGLE in names:
        return Layout("hf-model", (*files, SINGLE))
    pickled = any(name.endswith(".bin") for name in names)
    raise InputError(
        f"{where}: {CONFIG} is there, but no {SINGLE} and no {INDEX}"
        + ("; weights in .bin files are not taken, save the model as safetensors" if pickled else "")
    )


def _among(wanted: Iterable[str], names: Collection[str]) -> list[str]:
    return [name for name in wanted if name in names]
