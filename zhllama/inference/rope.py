"""A longer context than the model's positions: a stretched rotary base, the same for a prompt and all of its answer.

A base that grew with the answer, as in the recipe's patch, would leave the cached keys at another.
"""

from typing import TYPE_CHECKING

from zhllama.inference.load import LoadedModel

if TYPE_CHECKING:
    pass

STRETCH = 1.1
"""The recipe's coefficient of `auto`."""


def rope_alpha_of(length: int, positions: int) -> float:
    """The recipe's `auto`: (length/1024 − 1)·1.1 beyond 2048 tokens, else 1; 1024 being half of LLaMA's positions."""
    return 1.0 if length <= positions else (length / (positions / 2) - 1) * STRETCH


def stretched_base(base: float, alpha: float, head_dim: int) -> float:
    """The rotary base base·α^(d/(d−2)): the slowest frequency falls by α, the fastest stays (NTK-aware stretching)."""
    return float(base * alpha ** (head_dim / (head_dim - 2)))


def stretch(loaded: LoadedModel, length: int) -> None:
    """Makes the model read and say `length` tokens: its rotary base for that length, or for the given alpha."""
    import torch

    config = loaded.model.config
    dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    alpha = loaded.rope_alpha or rope_alpha_of(length, int(config.max_position_embeddings))
    base = stretched_base(float(config.rope_parameters["rope_theta"]), alpha, dim)
    rotary = loaded.model.model.rotary_emb
    inverse = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))
    rotary.inv_freq.copy_(inverse.to(rotary.inv_freq.device))
