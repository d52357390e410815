"""Qwen2 and Qwen2.5: LLaMA's modules with biases of queries, keys and values, always. The windows that its config.json
can have for some of the layers are switched off in every published one, and not done."""

from zhllama.models.architecture import Architecture

QWEN2 = Architecture(
    model_type="qwen2",
    title="Qwen2",
    transformers="Qwen2ForCausalLM",
    gguf="qwen2",
    numbers={
        "vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 22_016, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": None, "max_position_embeddings": 32_768,
    },
    biases=dict.fromkeys(("q_proj", "k_proj", "v_proj"), ""),
    switched_window=True,
)  # fmt: skip
