"""What a base model is, as data: an `Architecture` says what its config.json means, which tensors it has, of which
shapes, and what they are called in a GGUF. Whoever reads, trains, merges, exports or plans asks it and names none.

All that are done here are decoders of the same modules; they differ in biases, norms of queries and keys, windows, and
in the order in which a GGUF has the rows of q and k. No torch here, and no file is read.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
DROPPED = re.compile(r"(^|\.)(rope\.freqs|inv_freq)$")
"""Tensors that say nothing: the rotary frequencies, which the configuration gives."""


NUMBERS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
"""The whole numbers of config.json."""
WINDOWS = ("sliding_window", "use_sliding_window", "layer_types")
"""Fields of config.json that say how far attention sees."""


class Module(NamedTuple):
    """A module of a layer: transformers' name, GGUF's, and by their names in `Architecture.sizes` its weight's rows
    and columns (none: a norm)."""

    hf: str
    gguf: str
    rows: str
    columns: str = ""

    @property
    def name(self) -> str:
        return self.hf.rpartition(".")[2]


DECODER = (
    Module("self_attn.q_proj", "attn_q", "queries", "width"),
    Module("self_attn.k_proj", "attn_k", "keys", "width"),
    Module("self_attn.v_proj", "attn_v", "keys", "width"),
    Module("self_attn.o_proj", "attn_output", "width", "queries"),
    Module("mlp.gate_proj", "ffn_gate", "wide", "width"),
    Module("mlp.down_proj", "ffn_down", "width", "wide"),
    Module("mlp.up_proj", "ffn_up", "wide", "width"),
    Module("input_layernorm", "attn_norm", "width"),
    Module("post_attention_layernorm", "ffn_norm", "width"),
)
"""A layer of LLaMA, and of all that follow it."""


@dataclass(frozen=True)
class Place:
    """A tensor of a model: transformers' name and shape, what it is, and its name in a GGUF."""

    hf: str
    shape: tuple[int, ...]
    kind: Literal["embedding", "head", "linear", "bias", "norm"]
    gguf: str
    heads: int = 0
    """Of q and k where a GGUF turns neighbouring pairs: there the rows are permuted within each head. 0: they stay."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One kind of model. Everything is asked with a config.json as `checked_config` gives it."""

    model_type: str
    title: str
    """As messages and model cards say it."""
    transformers: str
    """The class of transformers' that computes it."""
    gguf: str
    """llama.cpp's name of it."""
    numbers: Mapping[str, int | None]
    """NUMBERS, and what transformers takes where config.json does not say them (None: it follows from others)."""
    layer: tuple[Module, ...] = DECODER
    biases: Mapping[str, str] = field(default_factory=dict)
    """Module → the field of config.json that says whether it has a bias; empty: it always has one."""
    permuted: tuple[str, ...] = ()
    """Modules of whose rows a GGUF has neighbouring pairs side by side."""
    whole_heads: bool = False
    """Whether transformers wants the width to be a multiple of the heads even where head_dim says something else."""
    window: int | None = None
    """Tokens that attention sees where config.json has no sliding_window (null: all). None: it has no such windows, and
    one that would change nothing is passed over."""
    switched_window: bool = False
    """Whether windows count where use_sliding_window says so alone, which is not done."""
    gguf_ropes: tuple[str, ...] = ("default", "linear", "yarn")
    """The rotary positions that llama.cpp does for it."""

    @property
    def flags(self) -> set[str]:
        """Fields of config.json, true or false, that say something of this architecture alone."""
        return {flag for flag in self.biases.values() if flag}

    @property
    def lora_modules(self) -> tuple[str, ...]:
        """What an adapter is put beside where nothing is said: every matrix of a layer."""
        return tuple(module.name for module in self.layer if module.columns)

    def window_of(self, config: Mapping[str, Any]) -> int | None:
        """Tokens that attention sees, where there are fewer than positions."""
        window = config.get("sliding_window", self.window) if self.window else None
        positions: Any = config.get("max_position_embeddings") or self.numbers["max_position_embeddings"]
        return window if type(window) is int and window < positions else None

    def windows(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that say to every program which windows there are: where nothing is said, some take their own."""
        if self.window:
            return {"sliding_window": config.get("sliding_window", self.window)}
        return {"use_sliding_window": False} if self.switched_window else {}

    def does_window(self, name: str, value: Any, config: Mapping[str, Any]) -> bool:
        """Whether a field of windows (config.json's sliding_window, layer_types …) says what is done here."""
        if name == "layer_types":
            plain = isinstance(value, list) and all(one == "full_attention" for one in value)
            return plain and self.window_of(config) is None
        whole = type(value) is int and value > 0
        if self.window:
            return whole if name == "sliding_window" else value is True or self.window_of(config) is None
        positions = config.get("max_position_embeddings") or self.numbers["max_position_embeddings"]
        said = config.get("use_sliding_window")
        off = said is False or (said is None and self.switched_window)
        return value is False if name == "use_sliding_window" else off or (whole and value >= positions)

    def sizes(self, config: Mapping[str, Any]) -> dict[str, int]:
        """By the names that modules have: pieces, width, wide (of the feed-forward half), head, queries, keys."""
        width, heads = config["hidden_size"], config["num_attention_heads"]
        head = config.get("head_dim") or self.numbers["head_dim"] or width // heads
        key_heads = config.get("num_key_value_heads") or heads
        return {
            "pieces": config["vocab_size"], "width": width, "wide": config["intermediate_size"], "head": head,
            "heads": heads, "key_heads": key_heads, "queries": heads * head, "keys": key_heads * head,
        }  # fmt: skip

    def places(self, config: Mapping[str, Any]) -> Iterator[Place]:
        """Every tensor of a model: embedding and head first, then layer by layer, then the last norm."""
        size = self.sizes(config)
        table = (size["pieces"], size["width"])
        yield Place(EMBEDDING, table, "embedding", "token_embd.weight")
        yield Place(HEAD, table, "head", "output.weight")
        heads = {"queries": size["heads"], "keys": size["key_heads"]}
        for layer in range(config["num_hidden_layers"]):
            for module in self.layer:
                hf, gguf = f"model.layers.{layer}.{module.hf}", f"blk.{layer}.{module.gguf}"
                turned = heads[module.rows] if module.name in self.permuted else 0
                if not module.columns:
                    yield Place(f"{hf}.weight", (size[module.rows],), "norm", f"{gguf}.weight")
                    continue
                shape = (size[module.rows], size[module.columns])
                yield Place(f"{hf}.weight", shape, "linear", f"{gguf}.weight", turned)
                flag = self.biases.get(module.name)
                if flag == "" or (flag and config.get(flag)):
                    yield Place(f"{hf}.bias", shape[:1], "bias", f"{gguf}.bias", turned)
        yield Place("model.norm.weight", (size["width"],), "norm", "output_norm.weight")

    def parameters(self, config: Mapping[str, Any]) -> int:
        """Of the whole model, the one table of a tied one counted once."""
        tied = bool(config.get("tie_word_embeddings"))
        return sum(math.prod(place.shape) for place in self.places(config) if not (tied and place.kind == "head"))
