"""Meta's shards, a GGUF or a Hugging Face folder → safetensors as every stage reads them, streaming: a few tensors in
memory (one is written while the next is read and joined; of a GGUF, some rows), no local copy, float16 stays float16.
Peak beyond the program's own: under 3 times the largest tensor, and of a GGUF what a few chunks of rows take.

The embeddings (embed_tokens and lm_head) get a file of their own, because extending the vocabulary and the first stage
of training change nothing else: those stages rewrite that file and copy the others within the store.
"""

import math
from collections.abc import Mapping
from contextlib import closing

from components.convert_weights.options import ConvertWeights
from components.convert_weights.source import WeightSource
from zhllama import storage
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.reader import Artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.models.architecture import EMBEDDING, HEAD
from zhllama.progress import Progress, human
from zhllama.stage.inputs import Inputs
from zhllama.storage.prefetch import prefetch
from zhllama.tokenizer.special_ids import special_ids
from zhllama.tokenizer.vocabulary import load_encoder, padding_multiple
from zhllama.weights.chat_template import chosen
from zhllama.weights.gguf_file import SUFFIX
from zhllama.weights.meta_format import PARAMS, TOKENIZER
from zhllama.weights.model_card import write_card
from zhllama.weights.model_config import CONFIG, GENERATION
from zhllama.weights.safetensors_io import INDEX, SafetensorsStream, index_json, shard_file
from zhllama.weights.settings import write_settings

FILE_LIMIT = 2 * 10**9
"""Bytes per safetensors file, embeddings apart: what changes together stays together, what fails is sent again."""


def convert_weights(config: ConvertWeights, inputs: Inputs, out: ArtifactWriter) -> Manifest:
    """Publishes the model. InputError for shards that are damaged, incomplete or do not fit params.json."""
    import torch

    weights = inputs["weights"].require_kind("meta-weights", "exported", "gguf", "hf-model", option="--weights")
    model = _open(weights, config.dtype)
    encoder = load_encoder(model.tokenizer, "--weights")
    if encoder.size > model.vocabulary_rows or (encoder.size < model.vocabulary_rows and not model.padded):
        raise InputError(
            f"--weights {weights.root}: {TOKENIZER} has {encoder.size} pieces and the weights have "
            f"{model.vocabulary_rows} rows; give the tokenizer that belongs to these weights"
        )
    out.vocabulary = encoder.vocabulary(
        tied=model.tied, dtype=model.dtype, padding_multiple=padding_multiple(encoder.size, model.vocabulary_rows)
    )
    # Meta's own files have no template; what export_model wrote, and a GGUF, may
    template, why = chosen(model.tokenizer, option="--weights")
    ids = special_ids(encoder, {GENERATION: model.generation} if model.generation else {}, f"--weights {weights.root}")
    positions = model.positions(config.max_positions)

    elements = {name: math.prod(joined.shape) for name, joined in model.tensors.items()}
    sizes = {name: count * getattr(torch, model.tensors[name].dtype).itemsize for name, count in elements.items()}
    total, parameters = sum(sizes.values()), sum(elements.values())
    files = files_of(sizes)
    storage.require_room(out.root, total)
    with Progress("converting", total) as bar:
        for file, names in files.items():
            declared = {name: (model.tensors[name].dtype, model.tensors[name].shape) for name in names}
            read = ((name, piece) for name in names for piece in model.pieces(name))
            with out.writer(file) as stream, closing(prefetch(read)) as ready:
                tensors = SafetensorsStream(stream, declared)
                for name, piece in ready:
                    tensors.write(name, piece)
                    bar.advance(piece.nbytes)
                tensors.close()
    place_of = {name: file for file, names in files.items() for name in names}
    out.add_bytes(INDEX, index_json(place_of, total))
    write_settings(out, model.config(out.vocabulary, config.max_positions), model.generation, ids)
    for name, content in encoder.files(positions, template).items():
        out.add_bytes(name, content)

    said = {"Parameters": f"{parameters:,}", "Chat template": why}
    write_card(out, weights, f"A {model.title} model converted from {model.made_of}.", said)
    out.facts["chat_template"] = why

    out.facts["parameters"] = parameters
    out.facts["shards"] = len(model.shards)
    out.facts["summary"] = f"{parameters:,} parameters, {model.dtype}, {human(total, 'B')}"
    return out.publish("hf-model")


def files_of(sizes: Mapping[str, int], limit: int = FILE_LIMIT) -> dict[str, list[str]]:
    """File → tensors: the embeddings apart, in the first, the rest in order, each filled up to `limit` bytes."""
    files: list[list[str]] = [[]]
    used = limit + 1
    for name, size in sizes.items():
        if name in (EMBEDDING, HEAD):
            files[0].append(name)
            continue
        if used + size > limit:
            files.append([])
            used = 0
        files[-1].append(name)
        used += size
    return {shard_file(number, len(files)): names for number, names in enumerate(files, 1)}


def _open(weights: Artifact, dtype: str) -> WeightSource:
    """A GGUF, a Hugging Face folder or Meta's files, whichever lies there. InputError for what is none of them, or
    cannot be converted."""
    if any(name.endswith(SUFFIX) for name in weights.names):
        from components.convert_weights.gguf_model import GgufModel

        return GgufModel(weights, "--weights", dtype)
    if CONFIG in weights and PARAMS not in weights:
        from components.convert_weights.hf_model import HfModel

        return HfModel(weights, "--weights", dtype)
    from components.convert_weights.meta_model import MetaModel

    if dtype:
        raise InputError(f"--dtype {dtype}: Meta's weights keep their own; leave it out, it is for what is quantised")
    return MetaModel(weights, "--weights")
