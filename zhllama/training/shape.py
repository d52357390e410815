"""The shape of the adapter that is trained: of a new one from the options, of a continued one its own. No torch here.

What an option says of a continued adapter is either what the adapter has, or refused: a rank that is silently ignored
costs a training. Options that are not given follow the adapter.
"""

from dataclasses import dataclass
from typing import Any, Literal

from zhllama.artifacts.json_file import read_object
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.training.options import LORA_TARGETS, LoraOptions

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
"""As adapters were published in the recipe's time."""
EMBEDDINGS = ("embed_tokens", "lm_head")
_NOT_KEPT = {"use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "bias": "none"}
"""Settings that mean another arithmetic than B·A·alpha/r in every layer, and the value at which they do not."""


@dataclass(frozen=True)
class LoraShape:
    r: int
    alpha: float
    dropout: float
    targets: list[str]
    embeddings: Literal["", "all", "new"] = ""
    """Of embed_tokens and lm_head: nothing is trained, all rows (and saved in full), or the rows `rows`."""
    rows: tuple[int, ...] = ()


def new_rows(model: Artifact) -> tuple[int, ...]:
    """The rows of the embeddings that the model's vocabulary has beyond the one it was extended from.

    InputError when it was not extended.
    """
    vocabulary = model.manifest.vocabulary
    before = model.manifest.facts.get("pieces_before")
    if vocabulary is not None and before is None and vocabulary.prefixes:
        before = min(map(int, vocabulary.prefixes))
    if vocabulary is None or before is None or before >= vocabulary.size:
        raise InputError(
            f"--embedding-rows new: --model {model.root} does not say which rows its vocabulary was extended by; "
            "give a model that extend_tokenizer made, or --embedding-rows all"
        )
    return tuple(range(before, vocabulary.size))


def new_shape(options: LoraOptions, rows: tuple[int, ...] = ()) -> LoraShape:
    """The shape of a new adapter, the recipe's where the options say nothing."""
    return LoraShape(
        options.lora_r or 8,
        options.lora_alpha or 32.0,
        0.05 if options.lora_dropout < 0 else options.lora_dropout,
        options.targets or LORA_TARGETS.split(","),
        options.trained_rows,
        rows,
    )


def lora_shape(options: LoraOptions, model: Artifact, adapter: Artifact | None) -> LoraShape:
    """The adapter's shape. InputError when the options contradict the adapter that is continued."""
    if adapter is None:
        return new_shape(options, new_rows(model) if options.trained_rows == "new" else ())
    have = _settings_of(adapter)
    embeddings, rows = _embeddings_of(have, adapter)
    targets = have["target_modules"]
    if not isinstance(targets, list):
        raise InputError(f"--adapter {adapter.root}: target_modules is {targets!r}; a list of names can be continued")
    _agree("--lora-r", options.lora_r or None, have["r"], adapter)
    _agree("--lora-alpha", options.lora_alpha or None, have["lora_alpha"], adapter)
    _agree("--lora-dropout", options.lora_dropout if options.lora_dropout >= 0 else None, have["lora_dropout"], adapter)
    _agree("--lora-targets", ",".join(sorted(options.targets)) or None, ",".join(sorted(targets)), adapter)
    said = options.embedding_rows if options.embedding_rows != "auto" else None
    _agree("--embedding-rows", said, embeddings or "none that are trained", adapter)
    if options.asks_for_embeddings and not embeddings:
        raise InputError(
            f"--train-embeddings: the adapter {adapter.root} has no trained embeddings; leave the option out, "
            "or start a new adapter"
        )
    return LoraShape(have["r"], have["lora_alpha"], have["lora_dropout"], sorted(targets), embeddings, rows)


def _settings_of(adapter: Artifact) -> dict[str, Any]:
    """What adapter_config.json says. InputError when it is none of LoRA's, or of a kind that would not be kept."""
    where = f"--adapter {adapter.root}: {ADAPTER_CONFIG}"
    try:
        have = read_object(adapter, ADAPTER_CONFIG)
        if have.get("peft_type", "LORA") != "LORA":
            raise ValueError(f"its peft_type is {have['peft_type']}")
        for name in ("r", "lora_alpha", "lora_dropout", "target_modules"):
            if name not in have:
                raise ValueError(f"it has no {name}")
        have |= {"r": int(have["r"]), **{name: float(have[name]) for name in ("lora_alpha", "lora_dropout")}}
    except (ValueError, TypeError) as error:
        raise InputError(f"{where} is no LoRA configuration ({error}); fetch it again") from error
    for name, ordinary in _NOT_KEPT.items():
        if (have.get(name) or ordinary) != ordinary:
            raise InputError(
                f"{where} sets {name}, which a training here would not keep; merge the adapter and start a new one"
            )
    return have


def _agree(option: str, given: Any, has: Any, adapter: Artifact) -> None:
    if given is not None and given != has:
        said, had = (f"{value:g}" if isinstance(value, (int, float)) else value for value in (given, has))
        raise InputError(
            f"{option} {said}: the adapter {adapter.root} has {had}; leave the option out, or start a new adapter"
        )


def _embeddings_of(have: dict[str, Any], adapter: Artifact) -> tuple[Literal["", "all", "new"], tuple[int, ...]]:
    saved = set(have.get("modules_to_save") or ())
    if saved not in (set(), set(EMBEDDINGS)):
        raise InputError(
            f"--adapter {adapter.root}: modules_to_save is {', '.join(sorted(saved))}; "
            "embed_tokens and lm_head, or none, can be continued"
        )
    single = have.get("trainable_token_indices")
    if not single:
        return ("all" if saved else ""), ()
    same = isinstance(single, dict) and set(single) == set(EMBEDDINGS) and len(set(map(tuple, single.values()))) == 1
    if saved or not same:
        raise InputError(
            f"--adapter {adapter.root}: trainable_token_indices must name the same rows of embed_tokens and lm_head; "
            "start a new adapter"
        )
    return "new", tuple(single["embed_tokens"])
