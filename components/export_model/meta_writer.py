"""Hugging Face safetensors → Meta's shards, in one pass: each tensor is read once, cut, and written to all shards.

Memory: one tensor, its cut copy, and the upload buffers of the shards. Names and axes: zhllama/weights/meta_format.py.
Rows that only pad the vocabulary are left out, since Meta's programs take its size from the tokenizer.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from zhllama.artifacts.json_file import read_object
from zhllama.artifacts.reader import Artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.progress import Progress, human
from zhllama.tokenizer.vocabulary import load_encoder
from zhllama.weights.meta_format import (
    EMBEDDING,
    HEAD,
    PARAMS,
    ROPE_THETA,
    SUMS,
    TOKENIZER,
    MetaParams,
    Place,
    extents,
    places,
    shard_name,
    split,
    unpermute,
)
from zhllama.weights.quantised import refuse_quantised
from zhllama.weights.safetensors_io import Checkpoint
from zhllama.weights.torch_zip import PthStream

META_SHARDS = {4096: 1, 5120: 2, 6656: 4, 8192: 8}
"""Width of LLaMA 7B, 13B, 30B and 65B → shards of Meta's own files."""


def write_meta(model: Artifact, shards: int, out: ArtifactWriter) -> None:
    """Writes the shards, params.json, tokenizer.model and sha256sums.txt. `shards` 0: as Meta's own files."""
    where = f"--model {model.root}"
    encoder = load_encoder(model, "--model")
    params = params_of(model, where)
    count = shards or META_SHARDS.get(params.dim, 1)
    checkpoint = Checkpoint(model)
    refuse_quantised(checkpoint, where)
    rows = checkpoint.info(EMBEDDING).shape[0]
    if rows < encoder.size:
        raise InputError(
            f"{where}: {TOKENIZER} has {encoder.size} pieces and the model {rows} rows; they do not belong together"
        )
    plan = [
        (place, *_parts(checkpoint, place, encoder.size, count, where))
        for place in places(params.n_layers, params.n_heads, params.kv_heads)
    ]
    unknown = sorted(set(checkpoint.tensors) - {place.hf for place, *_ in plan})
    if unknown:
        raise InputError(f"{where}: tensor {unknown[0]} is none of a LLaMA model; Meta's format has no place for it")

    total = 0
    with ExitStack() as files:
        streams = []
        for index in range(count):
            declared = {place.meta: (dtype, shapes[index]) for place, dtype, shapes in plan}
            streams.append(PthStream(files.enter_context(out.writer(shard_name(index))), declared))
        with Progress("exporting", sum(info.length for info in checkpoint.tensors.values())) as bar:
            for place, _, _ in plan:
                weight = _whole(checkpoint, place, encoder.size)
                for stream, part in zip(streams, split(weight, place.axis, count, place.uneven)):
                    stream.write(place.meta, part)
                bar.advance(weight.numel() * weight.element_size())
                total += weight.numel() * weight.element_size()
        for stream in streams:
            stream.close()
    out.add_bytes(PARAMS, params.to_json())
    out.add_bytes(TOKENIZER, encoder.model)
    out.add_bytes(SUMS, "".join(f"{file.sha256}  {file.path}\n" for file in out.files).encode())

    given = model.manifest.vocabulary
    dtype = checkpoint.info(EMBEDDING).dtype
    out.vocabulary = (
        replace(given, tied=False, padding_multiple=1) if given else encoder.vocabulary(tied=False, dtype=dtype)
    )
    out.facts["shards"] = count
    out.facts["summary"] = f"Meta, {count} shard{'s' if count > 1 else ''}, {human(total, 'B')}"


def _source_name(checkpoint: Checkpoint, place: Place) -> str:
    # a tied model has no head of its own; Meta's format always has one
    return EMBEDDING if place.hf == HEAD and HEAD not in checkpoint.tensors else place.hf


def _parts(
    checkpoint: Checkpoint, place: Place, pieces: int, count: int, where: str
) -> tuple[str, list[tuple[int, ...]]]:
    """dtype and the shapes of a tensor's parts; InputError when the shards do not divide it."""
    info = checkpoint.info(_source_name(checkpoint, place))
    shape = list(info.shape)
    if place.hf in (EMBEDDING, HEAD):
        shape[0] = pieces
    if place.axis is None:
        return info.dtype, [tuple(shape)] * count
    try:
        if place.heads:
            extents(place.heads, count)
        sizes = extents(shape[place.axis], count, place.uneven)
    except ValueError as error:
        what = f"{place.heads} heads" if place.heads else f"axis {place.axis} of {place.hf}"
        raise InputError(f"{where}: {count} shards do not divide {what} ({error}); give another --shards") from error
    return info.dtype, [tuple(size if axis == place.axis else n for axis, n in enumerate(shape)) for size in sizes]


def _whole(checkpoint: Checkpoint, place: Place, pieces: int) -> Any:
    """A tensor in Meta's order of rows."""
    name = _source_name(checkpoint, place)
    if place.hf in (EMBEDDING, HEAD):
        return checkpoint.read_rows(name, 0, pieces)
    weight = checkpoint.read(name)
    return unpermute(weight, place.heads) if place.heads else weight


def params_of(model: Artifact, where: str) -> MetaParams:
    """params.json's values from config.json. InputError for settings that Meta's format cannot say."""
    try:
        settings = read_object(model, "config.json")
        dim, heads = int(settings["hidden_size"]), int(settings["num_attention_heads"])
        params = MetaParams(
            dim=dim,
            n_layers=int(settings["num_hidden_layers"]),
            n_heads=heads,
            n_kv_heads=int(settings.get("num_key_value_heads") or heads),
            norm_eps=float(settings["rms_norm_eps"]),
            rope_theta=_rope_theta(settings, where),
        )
        width = int(settings["intermediate_size"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where}: config.json is not a LLaMA model's ({error}); give another model") from error
    if settings.get("model_type") != "llama":
        raise InputError(f"{where}: a {settings.get('model_type')} model; Meta's format holds LLaMA models")
    for name, wanted in (("attention_bias", False), ("mlp_bias", False), ("head_dim", dim // heads)):
        if settings.get(name) not in (None, wanted):
            raise InputError(f"{where}: config.json has {name}={settings[name]}, which Meta's format cannot say")
    return with_width(params, width)


def _rope_theta(settings: Mapping[str, Any], where: str) -> float:
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default":
        raise InputError(
            f"{where}: config.json stretches the rotary positions ({kind}), which Meta's format cannot say"
        )
    return float(rope.get("rope_theta") or settings.get("rope_theta") or ROPE_THETA)


def with_width(params: MetaParams, width: int) -> MetaParams:
    """The params whose feed-forward width is `width`: Meta's multiple_of 256 if that gives it, else what does."""
    multiples = [256, *(2**power for power in range(16, -1, -1))]
    for multiple in multiples:
        tried = replace(params, multiple_of=multiple, ffn_dim_multiplier=None)
        if tried.width == width:
            return tried
    # a width of another proportion: LLaMA 2's multiplier, and no rounding beyond it
    hidden = 8 * params.dim // 3
    exact = replace(params, multiple_of=1, ffn_dim_multiplier=(width + 0.5) / hidden)
    assert exact.width == width
    return exact
