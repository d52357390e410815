"""Mistral 7B and its kin of one window: LLaMA's modules. A token sees the `sliding_window` tokens up to itself: 4,096
in v0.1, and wherever config.json says nothing; all where it says null (v0.2, v0.3).

transformers keeps to the window. llama.cpp has Mistral as a LLaMA, without one: a GGUF says as many positions
as the window has, up to which both are the same."""

from zhllama.models.architecture import Architecture

MISTRAL = Architecture(
    model_type="mistral",
    title="Mistral",
    transformers="MistralForCausalLM",
    gguf="llama",
    numbers={
        "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": None, "max_position_embeddings": 131_072,
    },
    permuted=("q_proj", "k_proj"),
    gguf_ropes=("default", "linear", "yarn", "llama3"),
    window=4096,
)  # fmt: skip
