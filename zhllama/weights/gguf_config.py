"""config.json of a GGUF's fields.

llama.cpp computes by the fields that begin with the architecture's name. Those are a list of what is done and of what
says nothing at its value; any other is refused by name. Llama 3's stretched positions are in no field but in the tensor
`rope_freqs.weight`: a factor for each frequency, from which the settings that config.json has are found again.
"""

import math
import re
import struct
from collections.abc import Mapping
from itertools import product
from typing import Any

from zhllama.errors import InputError
from zhllama.models import ARCHITECTURES, architecture, by_gguf
from zhllama.models.architecture import HEAD, Place
from zhllama.models.rope import LENGTH, Rope
from zhllama.weights.gguf_file import GgufFile, GgufTensor
from zhllama.weights.model_config import checked_config

ROPE_FREQS = "rope_freqs.weight"
_DROPPED = re.compile(rf"{re.escape(ROPE_FREQS)}|blk\.\d+\.attn_rot_embd\.weight")
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_WHOLE = {
    "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size", "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads", "context_length": "max_position_embeddings",
}  # fmt: skip
"""Fields that must be there → config.json's."""
_DONE = {
    *_WHOLE, "attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count",
    "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    "rope.scale_linear", "attention.sliding_window",
}  # fmt: skip
_HARMLESS = {"vocab_size", "rope.scaling.finetuned", "tensor_data_layout"}
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,), "expert_used_count": (0,), "attention.causal": (True,), "use_parallel_residual": (False,),
    "rope.scaling.attn_factor": (0.0, 1.0), "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,), "logit_scale": (0.0, 1.0), "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0), "attention.scale": (0.0,), "pooling_type": (0,),
}  # fmt: skip
"""What says nothing at one of these values."""
_KINDS = {"none": "default", "linear": "linear", "yarn": "yarn"}
_MEND = "fetch another copy, or the model as a folder of transformers'"
_LENGTHS = tuple(2**power for power in range(13, 4, -1)) + tuple(2**power for power in range(14, 21))
"""Positions that a model was stretched from: Llama's own 8,192 first."""


def gguf_places(gguf: GgufFile) -> tuple[dict[str, Any], dict[str, Place]]:
    """A model's config.json, and by Hugging Face name where its tensors are. InputError for one that is missing, of
    another shape, or none of such a model, and as gguf_config."""
    where, tensors = gguf.where, gguf.tensors
    config = gguf_config(gguf)
    places = {place.hf: place for place in architecture(config, where).places(config)}
    if config["tie_word_embeddings"]:
        del places[HEAD]
    for place in places.values():
        if place.gguf not in tensors or tensors[place.gguf].shape != place.shape:
            found = f"is {tensors[place.gguf].shape}" if place.gguf in tensors else "is not there"
            raise InputError(f"{where}: {place.gguf} {found}, where its fields say {place.shape}; fetch it again")
    known = {place.gguf for place in places.values()}
    if more := sorted(name for name in tensors if name not in known and not _DROPPED.fullmatch(name)):
        title = architecture(config, where).title
        raise InputError(f"{where}: tensor {more[0]:.80} is none of a {title} model; give another one")
    return config, places


def gguf_config(gguf: GgufFile) -> dict[str, Any]:
    """As checked_config gives it, without special ids. InputError for an architecture, or a setting, that is not
    done."""
    where, fields = gguf.where, gguf.fields
    if (kind := fields.get("general.type", "model")) != "model":
        raise InputError(f"{where}: this GGUF is no model but of the kind {kind!s:.40}; give the model's own file")
    model = by_gguf(str(fields.get("general.architecture")), where)
    begin = f"{model.gguf}."
    said = {name.removeprefix(begin): value for name, value in fields.items() if name.startswith(begin)}
    if _EMBEDDING not in gguf.tensors:
        raise InputError(f"{where}: no tensor {_EMBEDDING} in it, as a vocabulary alone has none; give the model")
    for name, value in said.items():
        if name not in _DONE | _HARMLESS and value not in _WITHOUT_EFFECT.get(name, ()):
            raise InputError(f"{where} sets {name:.80} ({value!r:.40}), which is not done here; {_MEND}")
    found: dict[str, Any] = {"model_type": model.model_type, "vocab_size": gguf.tensors[_EMBEDDING].shape[0]}
    found |= {theirs: _whole(said.get(name), name, where) for name, theirs in _WHOLE.items()}
    heads = found["num_attention_heads"]
    found["num_key_value_heads"] = _whole(said.get("attention.head_count_kv", heads), "attention.head_count_kv", where)
    width = said.get("attention.key_length", found["hidden_size"] // heads)
    for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        if said.get(name, width) != width:
            raise InputError(f"{where}: its heads are {width!r:.20} wide and {name} is {said[name]!r:.20}; {_MEND}")
    eps = said.get("attention.layer_norm_rms_epsilon")
    if type(eps) is not float:
        raise InputError(f"{where}: it has no attention.layer_norm_rms_epsilon; {_MEND}")
    found |= {
        "head_dim": _whole(width, "attention.key_length", where),
        "hidden_act": "silu",
        # of float32, the shortest number that is the same one: 1e-05 and not 9.999999747378752e-06
        "rms_norm_eps": _shortest(eps),
        "tie_word_embeddings": _HEAD not in gguf.tensors,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    if (window := said.get("attention.sliding_window")) and window != found["max_position_embeddings"]:
        # of those that share an architecture there, the one that has windows
        with_windows = (one for one in ARCHITECTURES.values() if one.gguf == model.gguf and one.window)
        found |= {"sliding_window": window, "model_type": next(with_windows, model).model_type}
    found |= {
        flag: True for flag, name in (("attention_bias", "attn_output"), ("mlp_bias", "ffn_down"))
        if flag in model.flags and f"blk.0.{name}.bias" in gguf.tensors
    }  # fmt: skip
    theta = _shortest(said.get("rope.freq_base", 10_000.0))
    return checked_config({**found, "rope_theta": theta, "rope_scaling": _scaling(gguf, said, theta, width)}, where)


def _whole(value: Any, name: str, where: str) -> int:
    if isinstance(value, list) and value and value.count(value[0]) == len(value):
        value = value[0]  # one for each layer
    if type(value) is not int or not 0 < value < 2**31:
        raise InputError(f"{where}: {name} is {value!r:.20}, where a whole number above 0 is needed; {_MEND}")
    return value


def _shortest(value: Any) -> Any:
    """Of a float32, the shortest decimal that is the same one."""
    import numpy as np

    return float(str(np.float32(value))) if type(value) is float and math.isfinite(value) else value


def _scaling(gguf: GgufFile, said: Mapping[str, Any], theta: float, width: int) -> dict[str, Any] | None:
    """`rope_scaling` of config.json."""
    kind = said.get("rope.scaling.type", "linear" if "rope.scaling.factor" in said else "none")
    factor = said.get("rope.scaling.factor", said.get("rope.scale_linear", 1.0))
    kind = "linear" if kind == "none" and "rope.scale_linear" in said else kind
    if kind not in _KINDS:
        raise InputError(f"{gguf.where}: rope.scaling.type is {kind!s:.40}, which is not done here; {_MEND}")
    if tensor := gguf.tensors.get(ROPE_FREQS):
        if kind != "none" and factor != 1.0:
            raise InputError(f"{gguf.where}: it has {ROPE_FREQS} and stretches its positions ({kind}) too; {_MEND}")
        return _llama3(gguf, tensor, theta, width)
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return None
    found = {"rope_type": kind, "factor": _shortest(factor)}
    if kind == "yarn":
        names = {
            "original_context_length": "original_max_position_embeddings",
            "yarn_beta_fast": "beta_fast",
            "yarn_beta_slow": "beta_slow",
        }
        settings = {theirs: said.get(f"rope.scaling.{name}") for name, theirs in names.items()}
        found |= {name: _shortest(value) for name, value in settings.items() if value is not None}
    return found


def _llama3(gguf: GgufFile, tensor: GgufTensor, theta: float, width: int) -> dict[str, Any] | None:
    """The settings of `llama3` that give these factors. None where they are all 1."""
    if tensor.shape != (width // 2,) or tensor.type != "F32":
        raise InputError(f"{gguf.where}: {ROPE_FREQS} is {tensor.type} {tensor.shape}; {_MEND}")
    content = gguf.artifact.read_range(tensor.file, tensor.start, tensor.length)
    factors = struct.unpack(f"<{width // 2}f", content)
    greatest = max(factors)
    if all(one == 1.0 for one in factors):
        return None
    low, *highs = 1.0, 4.0, 2.0, 8.0, 16.0, 32.0
    for length, high, factor in product(_LENGTHS, highs, dict.fromkeys((greatest, 8.0, 32.0))):
        settings = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high, LENGTH: length}
        wanted = Rope("llama3", theta, settings).factors(width)
        if all(math.isclose(one, other, rel_tol=1e-4) for one, other in zip(factors, wanted)):
            return {"rope_type": "llama3", **settings}
    raise InputError(
        f"{gguf.where}: {ROPE_FREQS} holds other factors than Llama 3's way of stretching gives, which is not done; "
        f"{_MEND}"
    )
