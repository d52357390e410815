"""Small GGUFs as other programs write them, by the `gguf` package: of transformers' random models, in any type."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

ROPE_FREQS = "rope_freqs.weight"


def turned(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp's converter permutes them, written after it."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def write_gguf(
    path: Path,
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    kind: str = "F32",
    architecture: str = "llama",
    more: Mapping[str, Any] | None = None,
    embedding: str = "",
    tensors: Mapping[str, np.ndarray] | None = None,
    split: int = 0,
) -> Path:
    """A state dict (name → tensor) of this config.json. kind: of the matrices (embedding: of it); tokenizer, more:
    fields by their whole names; tensors: more of them, in float32; split: tensors in a file, 0 for all."""
    arch = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}[
        architecture
    ]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(str(path), architecture, split_max_tensors=split)
    heads = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads[0]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads[0])
    writer.add_head_count_kv(heads[1])
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta", 10_000.0))
    for name, value in {**tokenizer, **(more or {})}.items():
        add(writer, name, value)
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor.astype(np.float32))
    for name, tensor in state.items():
        module, _, suffix = name.rpartition(".")
        array = tensor.float().numpy()
        if architecture == "llama" and module.endswith(("q_proj", "k_proj")):
            array = turned(array, heads[module.endswith("k_proj")])
        kind_of = embedding if embedding and "embed" in name else kind
        wanted = gguf.GGMLQuantizationType["F32" if array.ndim == 1 else kind_of]
        packed = gguf.quants.quantize(array, wanted)
        writer.add_tensor(f"{names.get_name(module)}.{suffix}", packed, raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    """A field of the type that its value has."""
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(name, value)


def sentencepiece_fields(model: bytes, **more: Any) -> dict[str, Any]:
    """Of a tokenizer.model."""
    from zhllama.tokenizer.sentencepiece_model import parse_model

    pieces = parse_model(model).pieces
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [piece.piece for piece in pieces],
        "tokenizer.ggml.scores": [piece.score for piece in pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **more,
    }
