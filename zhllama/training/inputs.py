"""What a training reads, checked before any weight is loaded, and before any process starts: no torch here.

Equal vocabulary contracts of model, dataset and adapter; blocks no longer than the model's positions; LoRA targets
that exist; an adapter that belongs to this model. Each failure is one line and costs a second, not a node's download.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from zhllama.artifacts.reader import Artifact
from zhllama.data.packed import KIND, TRAIN, VALIDATION
from zhllama.errors import InputError
from zhllama.models import architecture
from zhllama.models.architecture import EMBEDDING, HEAD
from zhllama.stage.inputs import Inputs
from zhllama.tokenizer.prompt import RECIPE
from zhllama.tokenizer.vocabulary import Vocabulary, contract_of, has_tokenizer, load_encoder
from zhllama.training.options import FinetuneOptions, PretrainOptions, TrainingOptions, deepspeed_settings, zero_stage
from zhllama.weights.adapter import Adapter
from zhllama.weights.adapter_config import AdapterConfig
from zhllama.weights.beside import require_known_tokens
from zhllama.weights.chat_template import prompt_of
from zhllama.weights.fit import contracts_of, require_equal, require_rows, require_trained_on, rows_fit, trained_on
from zhllama.weights.merge_plan import encoder_of
from zhllama.weights.model_config import model_config
from zhllama.weights.safetensors_io import Checkpoint
from zhllama.weights.ties import is_tied, stays_tied

EMBEDDINGS = ("embed_tokens", "lm_head")
BASE_FIGURE = "base_replay_loss"
"""Among a training's metrics: the loss of held-out replay text that its budget counts from."""

log = logging.getLogger("training")


@dataclass(frozen=True)
class TrainingInputs:
    model: Artifact
    dataset: Artifact
    adapter: Artifact | None
    vocabulary: Vocabulary
    replay: Artifact | None = None
    base_loss: float | None = None
    """Of the held-out replay text: what an earlier training counts its budget from, and this one too."""


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
        says = _require_same_tokens(adapter, model, vocabulary, names[0])

    checkpoint = Checkpoint(model)
    config = model_config(checkpoint)
    checkpoint.refuse_quantised()
    rows = config["vocab_size"]
    fit = rows_fit(vocabulary.size, rows, model.manifest.vocabulary)
    require_rows(vocabulary.size, rows, names[0], "config.json says", fit)
    # what cannot be published is not trained
    prompt_of(dataset, RECIPE.name)
    facts = dataset.manifest.facts
    if TRAIN not in facts.get("splits", {}):
        raise InputError(f"{names[1]}: no blocks to train on in it; give what prepare_dataset wrote")
    block, positions = facts["block_size"], config["max_position_embeddings"]
    if block > positions:
        said = f"blocks of {block} tokens, but the model has {positions} positions"
        raise InputError(f"{names[1]}: {said}; prepare the dataset with a smaller --block-size")
    settings, tensors = deepspeed_settings(options), checkpoint.tensors
    if options.gives_adapter:
        own = architecture(config, names[0]).lora_modules
        shape = lora_shape(options, model, adapter, own)
        if adapter is not None:
            _require_fitting(adapter, checkpoint, vocabulary, says)
        for target in shape.targets if adapter is None else ():
            if not any(name.endswith(f".{target}.weight") and len(one.shape) == 2 for name, one in tensors.items()):
                said = f"{names[0]} has no such layer; its own are {', '.join(own)}"
                raise InputError(f"--lora-targets {target}: {said}")
        if shape.embeddings == "new" and zero_stage(settings) == 3:
            said = "under ZeRO-3 the embeddings lie in parts, and no rows of them can be trained alone"
            raise InputError(f"--embedding-rows new: {said}; give --deepspeed zero2 or none")
    packing = dataset.manifest.configuration.get("packing")
    if options.faithful and packing != "faithful":
        said = f"was packed as {packing or 'nobody says what'}, several documents to a block"
        raise InputError(f"--faithful: {names[1]} {said}; prepare it with --packing faithful")
    if EMBEDDING not in tensors:
        raise InputError(f"{names[0]}: it has no tensor {EMBEDDING}; a whole model is needed")
    replay = opened.get("replay")
    if replay is not None:
        _require_replayable(options, replay, dataset, vocabulary, names[0])
    if options.ema and zero_stage(settings) == 3:
        said = "under ZeRO-3 the weights lie in parts, and no average of them is kept"
        raise InputError(f"--ema {options.ema:g}: {said}; give --deepspeed zero2 or none")
    return TrainingInputs(
        model, dataset, adapter, vocabulary, replay, _base_loss(opened.get("forgetting_base"), replay)
    )


def _require_replayable(
    options: TrainingOptions, replay: Artifact, dataset: Artifact, vocabulary: Vocabulary, model: str
) -> None:
    """InputError for a replay dataset whose blocks cannot stand beside the dataset's."""
    where = f"--replay {replay.root}"
    require_equal(replay.require_kind(KIND, option="--replay").manifest.vocabulary, vocabulary, where, model)
    facts, own = replay.manifest.facts, dataset.manifest.facts
    if TRAIN not in facts.get("splits", {}):
        raise InputError(f"{where}: no blocks to train on in it; give what prepare_dataset wrote")
    if facts["block_size"] != own["block_size"]:
        said = f"blocks of {facts['block_size']} tokens, and the dataset's have {own['block_size']}"
        raise InputError(f"{where}: {said}; prepare it with --block-size {own['block_size']}")
    if options.forgetting_budget and VALIDATION not in facts["splits"]:
        said = "nothing of it is held out to measure --forgetting-budget on"
        raise InputError(f"{where}: {said}; prepare it with --validation-fraction or --validation")
    prompts = [prompt_of(one, RECIPE.name) for one in (replay, dataset) if _teaches_prompt(one)]
    if len(prompts) == 2 and prompts[0] != prompts[1]:
        raise InputError(f"{where}: its items ask otherwise than the dataset's; prepare both with the same --template")


def _teaches_prompt(dataset: Artifact) -> bool:
    return bool(dataset.manifest.facts["splits"][TRAIN].get("columns", 1) > 1)


def _base_loss(before: Artifact | None, replay: Artifact | None) -> float | None:
    """What an earlier training says of its base. InputError for one that replayed something else, or nothing."""
    if before is None or replay is None:
        return None
    where, replayed = f"--forgetting-base {before.root}", before.manifest.inputs.get("replay")
    if replayed is None or replayed.digest != replay.digest:
        said = "it was trained with another --replay" if replayed else "it was trained without --replay"
        raise InputError(f"{where}: {said}, so its figure says nothing here; give a training with this one, or none")
    if (loss := before.manifest.metrics.get(BASE_FIGURE, 0.0)) <= 0:
        raise InputError(f"{where}: it names no {BASE_FIGURE}; leave it out")
    return loss


def opened_adapter(adapter: Artifact, tied: bool) -> Adapter:
    """An adapter that is continued. InputError for what a training here cannot go on with."""
    reader = Adapter(adapter, "--adapter")
    if tied and not stays_tied(reader):
        said = "its embedding and head are two, and the model's are one; merge the adapter, and start a new one"
        raise InputError(f"{reader.where}: {said}")
    if tables := reader.updates.keys() & {EMBEDDING, HEAD}:
        # the loss is made within the head, which LoRA would be added to
        said = f"it has LoRA on {min(tables)}, which is trained by rows here; merge the adapter, and start a new one"
        raise InputError(f"{reader.where}: {said}")
    return reader


def _require_same_tokens(adapter: Artifact, model: Artifact, vocabulary: Vocabulary, model_name: str) -> str:
    """What an adapter says of its vocabulary. InputError for another one, by what lies beside it, and for an adapter of
    another model, by its manifest."""
    where = f"--adapter {adapter.root}"
    encoder = load_encoder(model, "--model") if has_tokenizer(model) else None
    own = encoder_of(adapter, "--adapter", encoder, vocabulary.size)
    contract, _ = contracts_of([adapter, model], [own, encoder])
    if contract is not None:
        require_equal(contract, vocabulary, where, model_name)
    elif encoder is None:
        require_known_tokens(model, adapter, vocabulary.size)
    require_trained_on(adapter, model, where)
    return "it names no vocabulary" if contract is None else "its vocabulary is the model's"


def _require_fitting(adapter: Artifact, checkpoint: Checkpoint, vocabulary: Vocabulary, says: str) -> None:
    """InputError for an adapter of other shapes than the model's. says: of its vocabulary, what is known."""
    tied = is_tied(checkpoint)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items() if not tied or name != HEAD}
    reader = opened_adapter(adapter, tied)
    reader.fitted(shapes, checkpoint.artifact.root, None)
    if trained_on(adapter) is None:
        base = f", though it names {reader.config.base}" if reader.config.base else ""
        log.info("%s: %s; its tensors fit: taken as trained on this model, with its %d pieces%s",
                 reader.where, says, vocabulary.size, base)  # fmt: skip


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


def new_shape(options: TrainingOptions, modules: Sequence[str], rows: tuple[int, ...] = ()) -> LoraShape:
    """The shape of a new adapter, the recipe's where the options say nothing. modules: the architecture's own."""
    return LoraShape(
        options.lora_r or 8,
        options.lora_alpha or 32.0,
        0.05 if options.lora_dropout < 0 else options.lora_dropout,
        options.targets or list(modules),
        options.trained_rows,
        rows,
    )


def lora_shape(
    options: TrainingOptions, model: Artifact, adapter: Artifact | None, modules: Sequence[str] = ()
) -> LoraShape:
    """The adapter's shape; a new one's on the architecture's `modules` where no layers are named. InputError when the
    options contradict the adapter that is continued."""
    if adapter is None:
        return new_shape(options, modules, new_rows(model) if options.trained_rows == "new" else ())
    have = _shape_of(AdapterConfig(adapter, "--adapter"), Checkpoint(model))
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
    if isinstance(options, PretrainOptions) and options.freeze_embeddings and have.embeddings:
        raise InputError(f"--freeze-embeddings: {where} has trained embeddings; {mend}")
    return have


def _shape_of(have: AdapterConfig, checkpoint: Checkpoint) -> LoraShape:
    """As adapter_config.json says; of an expression for layers, the names that it matches in the model."""
    targets = have.targets or []
    if isinstance(targets, str):
        matrices = [name.removesuffix(".weight") for name, info in checkpoint.tensors.items() if len(info.shape) == 2]
        targets = sorted({name.rpartition(".")[2] for name in matrices if have.targeted(name)})
    tables = [name.removesuffix(".weight") for name in (EMBEDDING, HEAD)]
    rows = next((rows for table in tables if (rows := have.rows_of(table))), [])
    saved = any(map(have.saves, tables))
    embeddings: Literal["", "all", "new"] = "new" if rows else "all" if saved else ""
    return LoraShape(have.rank, have.alpha, have.dropout, sorted(targets), embeddings, tuple(rows))
