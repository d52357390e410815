"""config.json of a base model, checked in one place before a stage computes with it or copies it.

Every number is finite and in its range, the special ids are rows, the rotary positions are ones that are done
(rope.py), the tensors are those of its architecture (zhllama/models) at these sizes, no more and no fewer. Fields are
done, or harmless, or refused by name: other programs put multipliers, windows and norms of their own there, and the
architecture's code passes over them. What is given back carries the rotary base and the dtype for every reader
(transformers 4 and 5): whoever writes a config.json writes that.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from zhllama.artifacts.json_file import read_object
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.models import architecture
from zhllama.models.architecture import DROPPED, EMBEDDING, HEAD, NUMBERS, WINDOWS, Architecture
from zhllama.models.rope import DEFAULT, LENGTH, Rope
from zhllama.weights.safetensors_io import Checkpoint

CONFIG = "config.json"
GENERATION = "generation_config.json"
ADAPTER = "adapter_config.json"
_RATIOS = ("rms_norm_eps", "initializer_range", "attention_dropout")
"""Fields with numbers from 0 to 1; the first is no 0."""
_FLAGS = ("tie_word_embeddings", "use_cache")
_PRECISIONS = ("float16", "bfloat16", "float32", "float64")
_CHOICES = {"hidden_act": ("silu", "swish"), "dtype": _PRECISIONS, "torch_dtype": _PRECISIONS}
_SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty", "max_length",
    "max_new_tokens", "min_length", "min_new_tokens",
)  # fmt: skip
"""Numbers of generation_config.json, and of old config.json."""
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
DONE = {
    "model_type", *NUMBERS, *_RATIOS, *_FLAGS, *_CHOICES, *_IDS, "rope_theta", "rope_scaling", "rope_parameters",
    "partial_rotary_factor", "architectures", "quantization_config",
}  # fmt: skip
"""The last is done by vLLM alone: whoever computes with weights calls Checkpoint.refuse_quantised."""
_HARMLESS = {
    # transformers' own: sampling, heads of classifiers, what is given back
    "add_cross_attention", "auto_map", "bad_words_ids", "begin_suppress_tokens", "chunk_size_feed_forward",
    "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "id2label", "is_decoder", "is_encoder_decoder", "label2id", "length_penalty", "max_length",
    "max_new_tokens", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_labels",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "prefix", "problem_type",
    "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id",
    "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "tokenizer_class", "top_k", "top_p", "torchscript", "transformers_version", "typical_p", "use_bfloat16",
    # how it is computed, not what
    "pretraining_tp", "gradient_checkpointing", "attn_implementation", "use_flash_attn", "use_flash_attention",
    "flash_attention", "use_memory_efficient_attention", "transformers.js_config",
    # of trainers and tokenizers
    "max_sequence_length", "max_seq_length", "max_seq_len", "seq_length", "model_max_length", "neftune_noise_alpha",
    "z_loss_weight", "unk_token_id", "mask_token_id", "end_token_id", "tokenizer_model_max_length",
    "tokenizer_padding_side", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "name", "license",
    "trust_remote_code", "cls_token_id",
    # SmolLM's, and what a window that is not used would be of
    "is_llama_config", "max_window_layers",
}  # fmt: skip
_HARMLESS_AT = {"activation": ("silu", "swiglu"), "rotary_pct": (1,), "rope_type": (DEFAULT,)}
"""Names of other programs' own, which say here what is done anyway."""
_NOTES = re.compile(r"_.*|unsloth.*|.*_version")
"""Names that only say who wrote the file, and how."""
_MEND = "correct it, or fetch or publish the model again"
_MOST = 2**31
_COMPARED = 256
"""Rows of a head that must be those of the embedding where config.json says that they are one."""


def model_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """A model's config.json. InputError for what no stage can use, or is not of these tensors."""
    artifact = checkpoint.artifact
    if ADAPTER in artifact:
        said = f"{ADAPTER} lies in the model's folder, and programs differ in what they load then"
        raise InputError(f"{checkpoint.where}: {said}; give the adapter a folder of its own")
    settings = read_config(artifact, lambda name: read_object(artifact, name), checkpoint.where)
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
    _require_numbers(found[GENERATION], settings["vocab_size"], f"{where}: {GENERATION}")
    return settings


def checked_config(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The content of a config.json, with the rotary positions and the dtype in all spellings."""
    said = f"{where}: {CONFIG}"
    model = architecture(settings, said)
    whole = {name: settings.get(name, default) for name, default in model.numbers.items()}
    for name, value in whole.items():
        if not (value is None and model.numbers[name] is None) and not (type(value) is int and 0 < value < _MOST):
            raise InputError(
                f"{said} is not a {model.title} model's ({name} is {value!r:.20}, no whole number above 0); {_MEND}"
            )
    _require_numbers(settings, whole["vocab_size"], said)
    for name in (name for name in settings if settings[name] is not None):
        value = settings[name]
        if name in _RATIOS:
            right = type(value) in (int, float) and 0 <= value <= 1 and (value or name != _RATIOS[0])
            wanted = "a number from 0 to 1"
        elif name in _FLAGS or name in model.flags:
            right, wanted = type(value) is bool, "true or false"
        else:
            choices = _CHOICES.get(name)
            right = choices is None or value in choices
            wanted = f"one of {', '.join(choices or ())}"
        if not right:
            raise InputError(f"{said} has {name}={value!r:.20}, where {wanted} is needed; {_MEND}")
        if not _known(name, value, settings, model):
            raise InputError(
                f"{said} sets {name:.80} ({value!r:.40}), which is not known here; take it out if it says nothing of "
                "the arithmetic, or give another model"
            )
    heads, even = whole["num_attention_heads"], whole["head_dim"] and not model.whole_heads
    if (whole["hidden_size"] % heads and not even) or heads % (whole["num_key_value_heads"] or heads):
        mend = "hidden_size must be a multiple of num_attention_heads, and these of num_key_value_heads"
        raise InputError(f"{said}: {mend}; {_MEND}")
    if (whole["head_dim"] or whole["hidden_size"] // heads) % 2:
        raise InputError(f"{said}: its heads have an odd width, where rotary positions need an even one; {_MEND}")
    # what is null says nothing, but that there is no such token
    found = {name: value for name, value in {**whole, **settings}.items() if value is not None or name in _IDS}
    found |= Rope.of(settings, where).spelled() | model.windows(settings) | {"architectures": [model.transformers]}
    for name in (LENGTH, "pretraining_tp"):
        # the one stands among the settings of the rotary positions, the other is of a way to compute
        found.pop(name, None)
    if dtype := settings.get("dtype") or settings.get("torch_dtype"):
        found |= {"dtype": dtype, "torch_dtype": dtype}
    return found


def _known(name: str, value: Any, settings: Mapping[str, Any], model: Architecture) -> bool:
    if name in WINDOWS:
        return model.does_window(name, value, settings)
    unset = value is False or value in ("", [], {}) or value in _HARMLESS_AT.get(name, ())
    return unset or name in DONE | model.flags | _HARMLESS | {LENGTH} or _NOTES.fullmatch(name) is not None


def _require_numbers(settings: Mapping[str, Any], rows: int, where: str) -> None:
    """InputError for a number that is not finite, at any depth, and for special ids that are no rows; -1 is none."""
    for name, number in _numbers(settings):
        if not -1e300 < number < 1e300:
            raise InputError(f"{where} has {name}={number!r:.20}, which is no number to compute with; {_MEND}")
    for name in _SAMPLING:
        if (value := settings.get(name)) is not None and type(value) not in (int, float):
            raise InputError(f"{where} has {name}={value!r:.20}, where a number is needed; {_MEND}")
    for name in _IDS:
        value = settings.get(name)
        # several ends are common, several beginnings are none
        several = value if isinstance(value, list) and name == "eos_token_id" else [value]
        for index in [] if value is None else several:
            if not (type(index) is int and -1 <= index < rows):
                said = f"{name}={index!r:.20}, which is not a row, and the model has {rows}"
                raise InputError(f"{where} has {said}; {_MEND}")


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
    """InputError for tensors that are missing, of another shape, or more than the model has."""
    quantised, layers = "quantization_config" in settings, settings["num_hidden_layers"]
    if layers > len(checkpoint.tensors):
        said = f"{CONFIG} says {layers} layers, and there are {len(checkpoint.tensors)} tensors"
        raise InputError(f"{checkpoint.where}: {said}; publish or fetch the model again")
    model = architecture(settings, checkpoint.where)
    wanted = {place.hf: place.shape for place in model.places(settings)}
    for name, shape in wanted.items():
        if name not in checkpoint.tensors and (name == HEAD or quantised):
            continue
        info = checkpoint.info(name)
        # quantised weights have shapes of their own
        if info.shape != shape and info.dtype.startswith(("float", "bfloat")):
            raise InputError(
                f"{checkpoint.where}: {name} is {info.shape} where {CONFIG} says {shape}; publish or fetch the model "
                "again"
            )
    more = (name for name in checkpoint.tensors if name not in wanted and not DROPPED.search(name))
    if not quantised and (odd := min(more, default=None)):
        said = f"tensor {odd} is none of a {model.title} model with {layers} layers, as {CONFIG} says"
        raise InputError(f"{checkpoint.where}: {said}; publish or fetch the model again")
    if settings.get("tie_word_embeddings") and HEAD in checkpoint.tensors and not quantised:
        first, other = (checkpoint.read(name, 0, min(_COMPARED, wanted[name][0])) for name in (EMBEDDING, HEAD))
        # one of zeros was never a head
        if not bool((first == other).all()) and bool(other.any()):
            raise InputError(
                f"{checkpoint.where}: {CONFIG} says tie_word_embeddings, but {HEAD} is not {EMBEDDING}: engines take "
                f"the one or the other; set it to false, or remove {HEAD}"
            )
