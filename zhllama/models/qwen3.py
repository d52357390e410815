"""Qwen3 (not its mixtures of experts): LLaMA's modules with a norm of each query and key head, whose width (head_dim)
says nothing of the model's. Windows: as in Qwen2, switched off."""

from zhllama.models.architecture import DECODER, Architecture, Module

QWEN3 = Architecture(
    model_type="qwen3",
    title="Qwen3",
    transformers="Qwen3ForCausalLM",
    gguf="qwen3",
    numbers={
        "vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 22_016, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32_768,
    },
    layer=(
        *DECODER,
        Module("self_attn.q_norm", "attn_q_norm", "head"),
        Module("self_attn.k_norm", "attn_k_norm", "head"),
    ),
    switched_window=True,
)  # fmt: skip
