"""The rotary positions of config.json, in both spellings; held against transformers' own frequencies."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from zhllama.errors import InputError
from zhllama.models.rope import Rope

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SHAPE = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 256}
SAID: dict[str, dict[str, Any]] = {
    "nothing": {},
    "base alone": {"rope_theta": 1e6},
    "transformers 5, base": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "transformers 5, linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e3}},
    "transformers 5, base beside it": {"rope_parameters": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 5e3},
    "transformers 4, linear": {"rope_scaling": {"type": "linear", "factor": 4}, "rope_theta": 1e6},
    "transformers 4.45, dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "LLaMA-Factory, dynamic": {
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}
    },
    "vLLM's yarn": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attn_factor": 1}
    },
    "yarn": {
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "finetuned": True}
    },
    "yarn, length beside it": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "attention_factor": 1.5},
        "original_max_position_embeddings": 32,
    },
    "llama3": {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 5e5},
    "both, which agree": {"rope_theta": 1e6, "rope_scaling": None, "rope_parameters": {"rope_theta": 1e6}},
    "both, which differ": {"rope_theta": 1e5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "two stretchings": {
        "rope_scaling": {"type": "linear", "factor": 4.0},
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
    },
}


def frequencies(folder: Path, config: dict[str, Any]) -> tuple[list[float], float]:
    """As transformers computes them of a config.json."""
    (folder / "config.json").write_text(json.dumps(SHAPE | config))
    read = AutoConfig.from_pretrained(folder)
    assert isinstance(read, LlamaConfig)
    rotary = LlamaRotaryEmbedding(read)
    return torch.as_tensor(rotary.inv_freq).tolist(), rotary.attention_scaling


@pytest.mark.parametrize("said", SAID.values(), ids=SAID)
def test_what_we_write_gives_the_frequencies_of_what_we_read(tmp_path: Path, said: dict[str, Any]) -> None:
    spelled = Rope.of(SHAPE | said, "it").spelled()
    wanted = frequencies(tmp_path, said)
    assert frequencies(tmp_path, spelled) == wanted
    # each spelling alone, too: of transformers 4 and of transformers 5
    assert frequencies(tmp_path, {name: spelled[name] for name in ("rope_theta", "rope_scaling")}) == wanted
    assert frequencies(tmp_path, {"rope_parameters": spelled["rope_parameters"]}) == wanted
    assert Rope.of(SHAPE | spelled, "it") == Rope.of(SHAPE | said, "it")


@pytest.mark.parametrize("name", ["both, which differ", "two stretchings"])
def test_spellings_that_differ_are_said(name: str, caplog: pytest.LogCaptureFixture) -> None:
    Rope.of(SHAPE | SAID[name], "it")
    assert "as for transformers" in caplog.text


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "longrope": ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, r"\(longrope\), which is not done"),
    "unknown": ({"rope_parameters": {"rope_type": "ntk", "factor": 4.0}}, r"\(ntk\), which is not done"),
    "of a layer": ({"rope_parameters": {"full_attention": {"rope_type": "linear"}}}, "sets full_attention"),
    "setting": ({"rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 1e3}}, "sets alpha"),
    "interpolated in part": (
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "extrapolation_factor": 0.5}},
        "sets extrapolation_factor",
    ),
    "setting of another type": ({"rope_parameters": {"rope_type": "default", "factor": 4.0}}, "sets factor"),
    "part of a head": ({"partial_rotary_factor": 0.5}, "sets partial_rotary_factor"),
    "no factor": ({"rope_scaling": {"type": "linear"}}, "factor of its rope is None"),
    "factor of nothing": ({"rope_scaling": {"type": "linear", "factor": 0.0}}, "factor of its rope is 0.0"),
    "factor that is not finite": ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, "is inf"),
    "factor that is a text": ({"rope_scaling": {"type": "linear", "factor": "4"}}, "is '4'"),
    "huge": ({"rope_theta": 10**400}, "rope_theta of its rope is 1000"),
    "base of nothing": ({"rope_theta": 0}, "rope_theta of its rope is 0"),
    "no base": ({"rope_theta": float("nan")}, "rope_theta of its rope is nan"),
    "no object": ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
    "two types": ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}, "type linear and"),
    "a type that is a list": ({"rope_scaling": {"type": ["x"], "rope_type": "linear", "factor": 2.0}}, r"type \['x'\]"),
    "half a position": (
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64.5}},
        "is 64.5, and a whole number",
    ),
    "half of it": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor of its rope is None"),
}


@pytest.mark.parametrize(("said", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_done_is_refused_by_name(said: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Rope.of(SHAPE | said, "it")
