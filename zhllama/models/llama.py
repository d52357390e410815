"""LLaMA 1, 2 and 3.x, and what calls itself one (SmolLM2): key-value heads shared by several queries, tied heads and
stretched rotary positions are said by config.json. A GGUF has q and k in Meta's order."""

from zhllama.models.architecture import Architecture

_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")

LLAMA = Architecture(
    model_type="llama",
    title="LLaMA",
    transformers="LlamaForCausalLM",
    gguf="llama",
    numbers={
        "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048,
    },
    biases=dict.fromkeys(_NAMES, "attention_bias")
    | dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp_bias"),
    permuted=("q_proj", "k_proj"),
    whole_heads=True,
    gguf_ropes=("default", "linear", "yarn", "llama3"),
)  # fmt: skip
