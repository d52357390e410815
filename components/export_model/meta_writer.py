"""Hugging Face safetensors → Meta's shards, in one pass: each tensor is read once, cut, and written to all shards.

Memory: one tensor, its cut copy, and the upload buffers of the shards. Names and axes: zhllama/weights/meta_format.py.
Rows that only pad the vocabulary are left out, since Meta's programs take its size from the tokenizer.
"""

import json
import math
from contextlib import ExitStack
from dataclasses import replace

from components.export_model.model import Exported, open_model, require_rope
from zhllama import storage
from zhllama.artifacts.reader import Artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.models.architecture import EMBEDDING, HEAD
from zhllama.models.llama import LLAMA
from zhllama.progress import Progress, human
from zhllama.tokenizer.byte_level import ByteLevelEncoder
from zhllama.tokenizer.tiktoken_file import beside as tiktoken_names
from zhllama.tokenizer.tiktoken_file import tiktoken_file_of
from zhllama.weights import meta_format as meta
from zhllama.weights.chat_template import CONFIG as TOKENIZER_CONFIG
from zhllama.weights.chat_template import chosen
from zhllama.weights.meta_format import MetaParams, Place
from zhllama.weights.model_config import GENERATION
from zhllama.weights.settings import ids_of
from zhllama.weights.torch_zip import PthStream

META_SHARDS = {4096: 1, 5120: 2, 6656: 4, 8192: 8}
"""Width of LLaMA 7B, 13B, 30B and 65B → shards of Meta's own files."""


def write_meta(model: Artifact, shards: int, out: ArtifactWriter) -> None:
    """Writes the shards, params.json, tokenizer.model, what convert_weights reads beside them, and sha256sums.txt.
    `shards` 0: as Meta's own files."""
    exported = open_model(model)
    if (kind := exported.architecture) is not LLAMA:
        raise InputError(f"{exported.where}: a {kind.title} model, and Meta's format holds {LLAMA.title} models alone")
    require_rope(exported, "Meta's format", ("default", "llama3"))
    params = _params(exported)
    if (width := exported.config.get("head_dim", params.head_dim)) != params.head_dim:
        raise InputError(f"{exported.where}: config.json has head_dim={width}, which Meta's format cannot say")
    places = tuple(meta.places(params.n_layers, params.n_heads, params.kv_heads))
    encoder, beside = exported.encoder, {}
    if isinstance(encoder, ByteLevelEncoder):
        tokenizer, beside = tiktoken_file_of(json.loads(encoder.content), exported.where), tiktoken_names(encoder)
        # Llama 3's program cuts its embedding by rows
        places = tuple(replace(place, axis=0) if place.hf == EMBEDDING else place for place in places)
    else:
        tokenizer = encoder.files()[meta.TOKENIZER]
    if more := {place.hf for place in LLAMA.places(exported.config)} - {place.hf for place in places}:
        raise InputError(f"{exported.where}: it has {min(more)}, for which Meta's format has no place")
    count = shards or META_SHARDS.get(params.dim, 1)
    parts = {place: _parts(exported, place, count) for place in places}
    sizes = [0] * count
    for place, shapes in parts.items():
        info = exported.info(place.hf)
        for index, shape in enumerate(shapes):
            sizes[index] += info.length // max(1, math.prod(info.shape)) * math.prod(shape)
    storage.require_room(out.root, sum(sizes))
    storage.check_size(out.root, max(sizes))
    total = 0
    with ExitStack() as files:
        streams = []
        for index in range(count):
            declared = {place.meta: (exported.info(place.hf).dtype, shapes[index]) for place, shapes in parts.items()}
            streams.append(PthStream(files.enter_context(out.writer(meta.shard_name(index))), declared))
        with Progress("exporting", sum(info.length for info in exported.checkpoint.tensors.values())) as bar:
            for place in places:
                rows = exported.encoder.size if place.hf in (EMBEDDING, HEAD) else None
                weight = exported.checkpoint.read(exported.info(place.hf).name, 0, rows)
                if place.heads:
                    weight = meta.unpermute(weight, place.heads)
                for stream, part in zip(streams, meta.split(weight, place.axis, count, place.uneven)):
                    stream.write(place.meta, part)
                bar.advance(weight.nbytes)
                total += weight.nbytes
        for stream in streams:
            stream.close()
    out.add_bytes(meta.PARAMS, with_width(params, exported.config["intermediate_size"]).to_json())
    out.add_bytes(meta.TOKENIZER, tokenizer)
    # no program of Meta's reads these two; convert_weights does, so that template and ends come back
    out.add_json(TOKENIZER_CONFIG, {**beside, "chat_template": chosen(model)[0]})
    out.add_json(GENERATION, ids_of(exported.checkpoint, exported.encoder).generation({}))
    out.add_bytes(meta.SUMS, "".join(f"{file.sha256}  {file.path}\n" for file in out.files).encode())

    vocabulary = model.manifest.vocabulary or exported.encoder.vocabulary(
        dtype=exported.checkpoint.info(EMBEDDING).dtype
    )
    out.vocabulary = replace(vocabulary, tied=False, padding_multiple=1)
    out.facts["shards"] = count
    out.facts["summary"] = f"Meta, {count} shard{'s' if count > 1 else ''}, {human(total, 'B')}"


def _params(model: Exported) -> MetaParams:
    config, rope = model.config, model.rope
    params = MetaParams(
        config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"],
        config.get("rms_norm_eps", 1e-6), n_kv_heads=config.get("num_key_value_heads"), rope_theta=rope.theta,
        use_scaled_rope=rope.kind == "llama3",
    )  # fmt: skip
    if (params.rope_scaling or {}).get("factor") != rope.settings.get("factor"):
        params = replace(params, rope_scaling_factor=rope.settings["factor"])
    if params.use_scaled_rope and {"rope_type": rope.kind, **rope.settings} != params.rope_scaling:
        said = f"its llama3 rope is {dict(rope.settings)}, and Meta's format knows Llama 3.1's alone ({meta.SCALED})"
        raise InputError(f"{model.where}: {said}")
    return params


def _parts(model: Exported, place: Place, count: int) -> list[tuple[int, ...]]:
    """The shapes of a tensor's parts; InputError when the shards do not divide it."""
    shape = list(model.info(place.hf).shape)
    if place.hf in (EMBEDDING, HEAD):
        shape[0] = model.encoder.size
    if place.axis is None:
        return [tuple(shape)] * count
    try:
        if place.heads:
            meta.extents(place.heads, count)
        sizes = meta.extents(shape[place.axis], count, place.uneven)
    except ValueError as error:
        what = f"{place.heads} heads" if place.heads else f"axis {place.axis} of {place.hf}"
        raise InputError(
            f"{model.where}: {count} shards do not divide {what} ({error}); give another --shards"
        ) from error
    return [tuple(size if axis == place.axis else n for axis, n in enumerate(shape)) for size in sizes]


def with_width(params: MetaParams, width: int) -> MetaParams:
    """The params whose feed-forward width is `width`: Meta's multiple_of 256 if that gives it, else what does."""
    for multiple in (256, *(2**power for power in range(16, -1, -1))):
        tried = replace(params, multiple_of=multiple, ffn_dim_multiplier=None)
        if tried.width == width:
            return tried
    # a width of another proportion: LLaMA 2's multiplier, and no rounding beyond it
    exact = replace(params, multiple_of=1, ffn_dim_multiplier=(width + 0.5) / (8 * params.dim // 3))
    assert exact.width == width
    return exact
