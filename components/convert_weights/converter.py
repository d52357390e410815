"""Meta's shards → Hugging Face safetensors, streaming: a few tensors in memory (one is written while the next is read
and joined), no local copy, float16 stays float16. Peak beyond the program's own: under 3 times the largest tensor.

The embeddings (embed_tokens and lm_head) get a file of their own, because extending the vocabulary and the first stage
of training change nothing else: those stages rewrite that file and copy the others within the store.
"""

import math
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from components.convert_weights.options import ConvertWeights
from zhllama import storage
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.progress import Progress, human
from zhllama.stage.inputs import Inputs
from zhllama.storage.prefetch import prefetch
from zhllama.tokenizer.special_ids import special_ids
from zhllama.tokenizer.vocabulary import Vocabulary, load_encoder
from zhllama.weights.chat_template import chosen
from zhllama.weights.meta_format import EMBEDDING, HEAD, PARAMS, TOKENIZER, MetaParams
from zhllama.weights.model_card import write_card
from zhllama.weights.model_config import GENERATION, checked_config
from zhllama.weights.safetensors_io import INDEX, SafetensorsStream, index_json, shard_file
from zhllama.weights.settings import write_settings

FILE_LIMIT = 2 * 10**9
"""Bytes per safetensors file, embeddings apart: what changes together stays together, what fails is sent again."""


def convert_weights(config: ConvertWeights, inputs: Inputs, out: ArtifactWriter) -> Manifest:
    """Publishes the model. InputError for shards that are damaged, incomplete or do not fit params.json."""
    import torch

    from components.convert_weights.meta_model import MetaModel

    weights = inputs["weights"].require_kind("meta-weights", "exported", option="--weights")
    encoder = load_encoder(weights, "--weights")
    model = MetaModel(weights, "--weights")
    if encoder.size != model.vocabulary_rows:
        raise InputError(
            f"--weights {weights.root}: {TOKENIZER} has {encoder.size} pieces and the weights have "
            f"{model.vocabulary_rows} rows; give the tokenizer that belongs to these weights"
        )
    out.vocabulary = encoder.vocabulary(tied=False, dtype=model.dtype)
    # Meta's own files have neither; what export_model wrote has both
    template, why = chosen(weights, option="--weights")
    try:
        said_ids = {GENERATION: weights.read_object(GENERATION)} if GENERATION in weights else {}
    except ValueError as error:
        raise InputError(f"--weights {weights.root}: {GENERATION} is no JSON object ({error}); take it away") from error
    ids = special_ids(encoder, said_ids, f"--weights {weights.root}")

    elements = {name: math.prod(joined.shape) for name, joined in model.tensors.items()}
    sizes = {name: count * getattr(torch, model.tensors[name].dtype).itemsize for name, count in elements.items()}
    total, parameters = sum(sizes.values()), sum(elements.values())
    files = files_of(sizes)
    storage.require_room(out.root, total)
    with Progress("converting", total) as bar:
        for file, names in files.items():
            declared = {name: (model.tensors[name].dtype, model.tensors[name].shape) for name in names}
            read = ((name, model.read(name)) for name in names)
            with out.writer(file) as stream, closing(prefetch(read)) as ready:
                tensors = SafetensorsStream(stream, declared)
                for name, tensor in ready:
                    tensors.write(name, tensor)
                    bar.advance(sizes[name])
                tensors.close()
    place_of = {name: file for file, names in files.items() for name in names}
    out.add_bytes(INDEX, index_json(place_of, total))
    settings = hf_config(model.params, model.width, out.vocabulary, config.max_positions)
    write_settings(out, settings, {}, ids)
    for name, content in encoder.files(config.max_positions, template).items():
        out.add_bytes(name, content)

    said = {"Parameters": f"{parameters:,}", "Chat template": why}
    write_card(out, weights, "A LLaMA model converted from Meta's checkpoint.", said)
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


def hf_config(params: MetaParams, width: int, vocabulary: Vocabulary, max_positions: int) -> dict[str, Any]:
    """config.json of a LLaMA model."""
    return checked_config({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary.rows,
        "hidden_size": params.dim,
        "intermediate_size": width,
        "num_hidden_layers": params.n_layers,
        "num_attention_heads": params.n_heads,
        "num_key_value_heads": params.kv_heads,
        "head_dim": params.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": params.norm_eps,
        "max_position_embeddings": max_positions,
        "rope_theta": params.rope_theta,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "dtype": vocabulary.dtype,
        "use_cache": True,
    }, PARAMS)  # fmt: skip
