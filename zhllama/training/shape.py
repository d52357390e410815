"""The shape of the adapter that is trained: of a new one from the options, of a continued one its own. No torch here.

What an option says of a continued adapter is either what the adapter has, or refused: a rank that is silently ignored
costs a training. Options that are not given follow the adapter.
"""

from dataclasses import dataclass
from typing import Literal

from zhllama.artifacts.json_file import read_object
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.training.options import LORA_TARGETS, FinetuneOptions, TrainingOptions

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
    """The rows of the embeddings that the model's vocabulary was extended by. InputError when it was not."""
    vocabulary = model.manifest.vocabulary
    before = model.manifest.facts.get("pieces_before")
    if vocabulary is not None and before is None and vocabulary.prefixes:
        before = min(map(int, vocabulary.prefixes))
    if vocabulary is None or before is None or before >= vocabulary.size:
        said = f"--model {model.root} does not say which rows its vocabulary was extended by"
        raise InputError(f"--embedding-rows new: {said}; give one that extend_tokenizer made, or --embedding-rows all")
    return tuple(range(before, vocabulary.size))


def new_shape(options: TrainingOptions, rows: tuple[int, ...] = ()) -> LoraShape:
    """The shape of a new adapter, the recipe's where the options say nothing."""
    return LoraShape(
        options.lora_r or 8,
        options.lora_alpha or 32.0,
        0.05 if options.lora_dropout < 0 else options.lora_dropout,
        options.targets or LORA_TARGETS.split(","),
        options.trained_rows,
        rows,
    )


def lora_shape(options: TrainingOptions, model: Artifact, adapter: Artifact | None) -> LoraShape:
    """The adapter's shape. InputError when the options contradict the adapter that is continued."""
    if adapter is None:
        return new_shape(options, new_rows(model) if options.trained_rows == "new" else ())
    have = _shape_of(adapter)
    where, mend = f"the adapter {adapter.root}", "leave the option out, or start a new adapter"
    for option, given, has in (
        ("--lora-r", options.lora_r or None, have.r),
        ("--lora-alpha", options.lora_alpha or None, have.alpha),
        ("--lora-dropout", options.lora_dropout if options.lora_dropout >= 0 else None, have.dropout),
        ("--lora-targets", ",".join(sorted(options.targets)) or None, ",".join(have.targets)),
        (
            "--embedding-rows",
            options.embedding_rows if options.embedding_rows != "auto" else None,
            have.embeddings or "none that are trained",
        ),
    ):
        if given is not None and given != has:
            said, had = (value if isinstance(value, str) else f"{value:g}" for value in (given, has))
            raise InputError(f"{option} {said}: {where} has {had}; {mend}")
    if isinstance(options, FinetuneOptions) and options.train_embeddings and not have.embeddings:
        raise InputError(f"--train-embeddings: {where} has no trained embeddings; {mend}")
    return have


def _shape_of(adapter: Artifact) -> LoraShape:
    """As adapter_config.json says. InputError when it is none of LoRA's, or of a kind that would not be kept."""
    where = f"--adapter {adapter.root}: {ADAPTER_CONFIG}"
    try:
        have = read_object(adapter, ADAPTER_CONFIG)
        if have.get("peft_type", "LORA") != "LORA":
            raise ValueError(f"its peft_type is {have['peft_type']}")
        for name in ("r", "lora_alpha", "lora_dropout", "target_modules"):
            if name not in have:
                raise ValueError(f"it has no {name}")
        rank, alpha, dropout = int(have["r"]), float(have["lora_alpha"]), float(have["lora_dropout"])
    except (ValueError, TypeError) as error:
        raise InputError(f"{where} is no LoRA configuration ({error}); fetch it again") from error
    for name, ordinary in _NOT_KEPT.items():
        if (have.get(name) or ordinary) != ordinary:
            mend = "merge the adapter and start a new one"
            raise InputError(f"{where} sets {name}, which a training here would not keep; {mend}")
    saved, targets = set(have.get("modules_to_save") or ()), have["target_modules"]
    if saved not in (set(), set(EMBEDDINGS)):
        names = ", ".join(sorted(saved))
        raise InputError(f"{where}: modules_to_save is {names}; embed_tokens and lm_head, or none, can be continued")
    if not isinstance(targets, list):
        raise InputError(f"{where}: target_modules is {targets!r}; a list of names can be continued")
    single = have.get("trainable_token_indices")
    if not single:
        return LoraShape(rank, alpha, dropout, sorted(targets), "all" if saved else "")
    same = isinstance(single, dict) and set(single) == set(EMBEDDINGS) and len(set(map(tuple, single.values()))) == 1
    if saved or not same:
        said = "trainable_token_indices must name the same rows of embed_tokens and lm_head"
        raise InputError(f"{where}: {said}; start a new adapter")
    return LoraShape(rank, alpha, dropout, sorted(targets), "new", tuple(single["embed_tokens"]))
