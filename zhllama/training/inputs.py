"""What a training reads, checked before any weight is loaded, and before any process starts: no torch here.

Equal vocabulary contracts of model, dataset and adapter; blocks no longer than the model's positions; LoRA targets
that exist; an adapter that belongs to this model. Each failure is one line and costs a second, not a node's download.
"""

from dataclasses import dataclass
from typing import Literal

from zhllama.artifacts.json_file import read_object
from zhllama.artifacts.reader import Artifact
from zhllama.data.packed import KIND, TRAIN
from zhllama.errors import InputError
from zhllama.stage.inputs import Inputs
from zhllama.tokenizer.vocabulary import Vocabulary, contract_of, has_tokenizer, load_encoder
from zhllama.training.options import LORA_TARGETS, FinetuneOptions, TrainingOptions, deepspeed_settings, zero_stage
from zhllama.weights.fit import require_equal, require_rows, require_trained_on, rows_fit
from zhllama.weights.safetensors_io import Checkpoint

EMBEDDING = "model.embed_tokens.weight"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
"""As adapters were published in the recipe's time."""
EMBEDDINGS = ("embed_tokens", "lm_head")
_NOT_KEPT = {"use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "bias": "none"}
"""Settings that mean another arithmetic than B·A·alpha/r in every layer, and the value at which they do not."""


@dataclass(frozen=True)
class TrainingInputs:
    model: Artifact
    dataset: Artifact
    adapter: Artifact | None
    vocabulary: Vocabulary


def checked_inputs(options: TrainingOptions, opened: Inputs) -> TrainingInputs:
    """Model, dataset and adapter, checked that they belong together. InputError otherwise."""
    model = opened["model"].require_kind("hf-model", option="--model")
    dataset = opened["dataset"].require_kind(KIND, option="--dataset")
    adapter = opened.get("adapter")
    names = f"--model {options.model}", f"--dataset {options.dataset}"
    vocabulary = vocabulary_of(model, "--model")
    require_equal(dataset.manifest.vocabulary, vocabulary, names[1], names[0])
    assert vocabulary is not None
    if adapter is not None:
        adapter.require_kind("adapter", option="--adapter")
        require_equal(vocabulary_of(adapter, "--adapter"), vocabulary, f"--adapter {options.adapter}", names[0])
        require_trained_on(adapter, model, f"--adapter {options.adapter}")

    try:
        config = read_object(model, "config.json")
    except (ValueError, TypeError) as error:
        said = f"--model {model.root}: config.json is no model's configuration ({error}); fetch the model again"
        raise InputError(said) from error
    if config.get("model_type") != "llama":
        raise InputError(f"--model {model.root}: model_type {config.get('model_type')!r}; only llama is supported")
    rows = config["vocab_size"]
    fit = rows_fit(vocabulary.size, rows, model.manifest.vocabulary)
    require_rows(vocabulary.size, rows, names[0], "config.json says", fit)
    facts = dataset.manifest.facts
    if TRAIN not in facts.get("splits", {}):
        raise InputError(f"{names[1]}: no blocks to train on in it; give what prepare_dataset wrote")
    block, positions = facts["block_size"], config["max_position_embeddings"]
    if block > positions:
        said = f"blocks of {block} tokens, but the model has {positions} positions"
        raise InputError(f"{names[1]}: {said}; prepare the dataset with a smaller --block-size")
    settings, tensors = deepspeed_settings(options), Checkpoint(model).tensors
    if options.gives_adapter:
        shape = lora_shape(options, model, adapter)
        if adapter is not None and ADAPTER_WEIGHTS not in adapter and PICKLED_WEIGHTS not in adapter:
            said = f"neither {ADAPTER_WEIGHTS} nor {PICKLED_WEIGHTS} in it; publish or fetch the adapter again"
            raise InputError(f"--adapter {adapter.root}: {said}")
        for target in shape.targets:
            if not any(name.endswith(f".{target}.weight") and len(one.shape) == 2 for name, one in tensors.items()):
                raise InputError(f"--lora-targets {target}: {names[0]} has no such layer; LLaMA's are q_proj, v_proj …")
        if shape.embeddings == "new" and zero_stage(settings) == 3:
            said = "under ZeRO-3 the embeddings lie in parts, and no rows of them can be trained alone"
            raise InputError(f"--embedding-rows new: {said}; give --deepspeed zero2 or none")
    packing = dataset.manifest.configuration.get("packing")
    if options.faithful and packing != "faithful":
        said = f"was packed as {packing or 'nobody says what'}, several documents to a block"
        raise InputError(f"--faithful: {names[1]} {said}; prepare it with --packing faithful")
    if EMBEDDING not in tensors:
        raise InputError(f"{names[0]}: it has no tensor {EMBEDDING}; a LLaMA model is needed")
    return TrainingInputs(model, dataset, adapter, vocabulary)


def vocabulary_of(artifact: Artifact, option: str) -> Vocabulary | None:
    """The contract in the manifest, or, in a plain folder, of its tokenizer; None without either."""
    if has_tokenizer(artifact):
        return contract_of(artifact, load_encoder(artifact, option))
    return artifact.manifest.vocabulary


@dataclass(frozen=True)
class LoraShape:
    """Of the adapter that is trained: of a new one from the options, of a continued one its own. What an option says of
    that is either what it has, or refused: a rank that is silently ignored costs a training."""

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
    rows = options.embedding_rows if options.embedding_rows != "auto" else None
    for option, given, has in (
        ("--lora-r", options.lora_r or None, have.r),
        ("--lora-alpha", options.lora_alpha or None, have.alpha),
        ("--lora-dropout", options.lora_dropout if options.lora_dropout >= 0 else None, have.dropout),
        ("--lora-targets", ",".join(sorted(options.targets)) or None, ",".join(have.targets)),
        ("--embedding-rows", rows, have.embeddings or "none that are trained"),
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
