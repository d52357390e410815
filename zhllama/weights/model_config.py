"""config.json of a base model, checked in one place before a stage computes with it or copies it.

Every number is finite and in its range, the special ids are rows, the rotary positions are ones that are done
(rope.py), and a LLaMA's sizes are those of its tensors. What is given back carries the rotary base and the dtype for
every reader (transformers 4 and 5): whoever writes a config.json writes that.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from zhllama.artifacts.json_file import read_object
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.weights.meta_format import HEAD, places
from zhllama.weights.rope import Rope
from zhllama.weights.safetensors_io import Checkpoint

CONFIG = "config.json"
GENERATION = "generation_config.json"
LLAMA = {
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048,
}  # fmt: skip
"""Whole numbers, and what transformers takes for a LLaMA that does not say them (None: it follows from others)."""
_RATIOS = ("rms_norm_eps", "initializer_range", "attention_dropout")
"""Fields with numbers from 0 to 1; the first is no 0."""
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_MEND = "correct it, or fetch or publish the model again"
_MOST = 2**31


def model_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """A model's config.json. InputError for what no stage can use, or is not of these tensors."""
    artifact = checkpoint.artifact
    settings = read_config(artifact, lambda name: read_object(artifact, name), checkpoint.where)
    if settings.get("model_type") == "llama":
        _require_shapes(settings, checkpoint)
    return settings


def read_config(
    names: Artifact | Mapping[str, Any], read: Callable[[str], dict[str, Any]], where: str
) -> dict[str, Any]:
    """As model_config, where the tensors are not looked at. The generation_config.json beside it is checked as well.
    `names`: of the model's files; `read`: the object in one, or ValueError."""
    if CONFIG not in names:
        raise InputError(f"{where}: no {CONFIG} in it; a Hugging Face model folder is needed")
    found = {}
    for name in (CONFIG, GENERATION):
        try:
            found[name] = read(name) if name in names else {}
        except (ValueError, TypeError) as error:
            raise InputError(f"{where}: {name} is no JSON object ({error}); fetch the model again") from error
    settings = checked_config(found[CONFIG], where)
    require_numbers(found[GENERATION], settings.get("vocab_size"), f"{where}: {GENERATION}")
    return settings


def checked_config(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The content of a config.json, with the rotary positions and the dtype in all spellings."""
    said = f"{where}: {CONFIG}"
    llama = settings.get("model_type") == "llama"
    whole = {name: settings.get(name, LLAMA[name] if llama else None) for name in LLAMA}
    for name, value in whole.items():
        optional = LLAMA[name] is None or not llama
        if not (value is None and optional) and not (type(value) is int and 0 < value < _MOST):
            whose = "a LLaMA model's" if llama else "a model's"
            raise InputError(f"{said} is not {whose} ({name} is {value!r:.20}, no whole number above 0); {_MEND}")
    require_numbers(settings, whole["vocab_size"], said)
    for name in _RATIOS:
        value = settings.get(name, 0.1)
        if type(value) not in (int, float) or not 0 <= value <= 1 or (name == _RATIOS[0] and not value):
            raise InputError(f"{said} has {name}={value!r:.20}, where a number from 0 to 1 is needed; {_MEND}")
    found = dict(settings)
    if llama:
        found = {**{name: value for name, value in whole.items() if value is not None}, **settings}
        heads = whole["num_attention_heads"]
        if whole["hidden_size"] % heads or heads % (whole["num_key_value_heads"] or heads):
            mend = "hidden_size must be a multiple of num_attention_heads, and these of num_key_value_heads"
            raise InputError(f"{said}: {mend}; {_MEND}")
        if (whole["head_dim"] or whole["hidden_size"] // heads) % 2:
            raise InputError(f"{said}: its heads have an odd width, where rotary positions need an even one; {_MEND}")
        found |= Rope.of(settings, where).spelled()
    if dtype := settings.get("dtype") or settings.get("torch_dtype"):
        found |= {"dtype": dtype, "torch_dtype": dtype}
    return found


def require_numbers(settings: Mapping[str, Any], rows: int | None, where: str) -> None:
    """InputError for a number that is not finite, at any depth, and for special ids that are no rows; -1 is none."""
    for name, number in _numbers(settings):
        if not -1e300 < number < 1e300:
            raise InputError(f"{where} has {name}={number!r:.20}, which is no number to compute with; {_MEND}")
    for name in _IDS:
        value = settings.get(name)
        for index in value if isinstance(value, list) else [value]:
            if index is not None and not (type(index) is int and -1 <= index < (rows or _MOST)):
                said = f"a row, and the model has {rows}" if rows else "an id"
                raise InputError(f"{where} has {name}={index!r:.20}, which is not {said}; {_MEND}")


def _numbers(settings: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Every number at any depth, and the names on the way to it."""
    left: list[tuple[str, Any]] = list(settings.items())
    while left:
        name, value = left.pop()
        if isinstance(value, int | float):
            yield name, value
        elif isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            left += [(f"{name}.{key}", inner) for key, inner in items]


def _require_shapes(settings: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    whole = {name: settings.get(name, default) for name, default in LLAMA.items()}
    width, wide, heads = whole["hidden_size"], whole["intermediate_size"], whole["num_attention_heads"]
    key_heads, each = whole["num_key_value_heads"] or heads, whole["head_dim"] or width // heads
    wanted = {
        "q_proj": (heads * each, width), "k_proj": (key_heads * each, width), "v_proj": (key_heads * each, width),
        "o_proj": (width, heads * each), "gate_proj": (wide, width), "up_proj": (wide, width),
        "down_proj": (width, wide), **dict.fromkeys(("embed_tokens", "lm_head"), (whole["vocab_size"], width)),
    }  # fmt: skip
    for place in places(whole["num_hidden_layers"], heads, key_heads):
        info = checkpoint.tensors.get(place.hf)
        if info is None and (place.hf == HEAD or "quantization_config" in settings):
            continue
        info = checkpoint.info(place.hf)
        shape = wanted.get(place.hf.split(".")[-2], (width,))
        # quantised weights have shapes of their own
        if info.shape != shape and info.dtype.startswith(("float", "bfloat")):
            raise InputError(
                f"{checkpoint.where}: {place.hf} is {info.shape} where {CONFIG} says {shape}; publish or fetch the "
                "model again"
            )
    if beyond := sorted(name for name in checkpoint.tensors if _layer(name) >= whole["num_hidden_layers"]):
        said = f"tensor {beyond[0]} is none of a LLaMA model with {whole['num_hidden_layers']} layers"
        raise InputError(f"{checkpoint.where}: {said}, as {CONFIG} says; publish or fetch the model again")


def _layer(name: str) -> int:
    """The number of the layer that a tensor is of; -1 for none."""
    parts = name.split(".")
    return int(parts[2]) if name.startswith("model.layers.") and parts[2].isdecimal() else -1
