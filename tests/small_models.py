"""A small random model of each architecture, made by transformers' own class: what a stage gives for it is held against
what that class gives. Biases and norms are random too, so that one that is lost shows."""

from pathlib import Path
from typing import Any

SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.1,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "biased-llama": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 24}),
    "mistral-v0.3": (
        "Mistral",
        {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
}
"""Name → transformers' class, and what differs from SHAPE."""


def config_of(kind: str, **more: Any) -> Any:
    import transformers

    name, own = KINDS[kind]
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    return getattr(transformers, f"{name}Config")(**{"vocab_size": 800, **SHAPE, **ids, **own, **more})


def model_of(kind: str, **more: Any) -> Any:
    """In float32, seeded, in evaluation mode."""
    import torch
    import transformers

    torch.manual_seed(64)
    model = getattr(transformers, f"{KINDS[kind][0]}ForCausalLM")(config_of(kind, **more)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight) * 0.2)
    return model


def save(folder: Path, kind: str, tokenizer: bytes, **more: Any) -> Path:
    """As save_pretrained leaves it, in float16, with this tokenizer.model."""
    from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder

    model_of(kind, **more).half().save_pretrained(folder)
    for name, content in SentencePieceEncoder(tokenizer).files(256).items():
        (folder / name).write_bytes(content)
    return folder
