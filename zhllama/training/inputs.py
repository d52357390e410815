"""What a training reads, checked before any weight is loaded, and before any process starts: no torch here.

Equal vocabulary contracts of model, dataset and adapter; blocks no longer than the model's positions; LoRA targets
that exist; an adapter that belongs to this model. Each failure is one line and costs a second, not a node's download.
"""

import logging
from dataclasses import dataclass
from typing import Literal

from zhllama.artifacts.reader import Artifact
from zhllama.data.packed import KIND, TRAIN
from zhllama.errors import InputError
from zhllama.stage.inputs import Inputs
from zhllama.tokenizer.vocabulary import Vocabulary, contract_of, has_tokenizer, load_encoder
from zhllama.training.options import LORA_TARGETS, FinetuneOptions, TrainingOptions, deepspeed_settings, zero_stage
from zhllama.weights.adapter import Adapter
from zhllama.weights.adapter_config import CONFIG, AdapterConfig
from zhllama.weights.beside import require_known_tokens
from zhllama.weights.fit import require_equal, require_rows, require_trained_on, rows_fit, trained_on
from zhllama.weights.meta_format import EMBEDDING, HEAD
from zhllama.weights.model_config import model_config
from zhllama.weights.safetensors_io import Checkpoint
from zhllama.weights.ties import is_tied, stays_tied

EMBEDDINGS = ("embed_tokens", "lm_head")

log = logging.getLogger("training")


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
        if (contract := vocabulary_of(adapter, "--adapter")) is not None:
            require_equal(contract, vocabulary, f"--adapter {options.adapter}", names[0])
        require_trained_on(adapter, model, f"--adapter {options.adapter}")

    checkpoint = Checkpoint(model)
    config = model_config(checkpoint)
    checkpoint.refuse_quantised()
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
    settings, tensors = deepspeed_settings(options), checkpoint.tensors
    if options.gives_adapter:
        shape = lora_shape(options, model, adapter)
        if adapter is not None:
            _require_fitting(adapter, checkpoint, vocabulary)
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


def opened_adapter(adapter: Artifact, tied: bool) -> Adapter:
    """An adapter that is continued. InputError when it has two tables for the one of a tied model."""
    reader = Adapter(adapter, "--adapter")
    if tied and not stays_tied(reader):
        said = "its embedding and head are two, and the model's are one; merge the adapter, and start a new one"
        raise InputError(f"{reader.where}: {said}")
    return reader


def _require_fitting(adapter: Artifact, checkpoint: Checkpoint, vocabulary: Vocabulary) -> None:
    """InputError for an adapter of other shapes or, by what lies beside it, other tokens than the model's."""
    model, tied = checkpoint.artifact, is_tied(checkpoint)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items() if not tied or name != HEAD}
    reader = opened_adapter(adapter, tied)
    reader.fitted(shapes, model.root, None)
    alone = vocabulary_of(adapter, "--adapter") is None
    if alone:
        encoder = load_encoder(model, "--model") if has_tokenizer(model) else None
        require_known_tokens([model, adapter], [encoder, None], shapes[EMBEDDING][0])
    if trained_on(adapter) is None:
        pieces = "it names no vocabulary" if alone else "its vocabulary is the model's"
        base = f", though it names {reader.config.base}" if reader.config.base else ""
        log.info("%s: %s; its tensors fit: taken as trained on this model, with its %d pieces%s",
                 reader.where, pieces, vocabulary.size, base)  # fmt: skip


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
    return have


def _shape_of(have: AdapterConfig, checkpoint: Checkpoint) -> LoraShape:
    """As adapter_config.json says. InputError for what a training here would not keep."""
    where, tied = f"{have.where}: {CONFIG}", is_tied(checkpoint)
    for name, value in (
        ("use_rslora", have.rank_stabilised),
        ("rank_pattern", have.ranks),
        ("alpha_pattern", have.alphas),
        ("layers_to_transform", have.layers is not None),
        ("exclude_modules", have.excluded),
    ):
        if value:
            mend = "merge the adapter and start a new one"
            raise InputError(f"{where} sets {name}, which a training here would not keep; {mend}")
    saved, both = {name.rpartition(".")[2] for name in have.saved}, set(EMBEDDINGS)
    if tied and have.keeps_tied and saved:
        saved |= both
    if saved not in (set(), both):
        names = ", ".join(sorted(saved))
        raise InputError(f"{where}: modules_to_save is {names}; embed_tokens and lm_head, or none, can be continued")
    targets = _targets(have, checkpoint, where)
    rows = [tuple(have.rows_of(name)) for name in EMBEDDINGS]
    if not any(rows):
        return LoraShape(have.rank, have.alpha, have.dropout, targets, "all" if saved else "")
    if saved or (rows[0] != rows[1] and not (tied and rows[0] and not rows[1])):
        said = "trainable_token_indices must name the same rows of embed_tokens and lm_head"
        raise InputError(f"{where}: {said}; start a new adapter")
    return LoraShape(have.rank, have.alpha, have.dropout, targets, "new", rows[0])


def _targets(have: AdapterConfig, checkpoint: Checkpoint, where: str) -> list[str]:
    """The layers that have LoRA weights, of an expression the names that it matches in the model."""
    found = have.targets or []
    if isinstance(found, str):
        matrices = [name.removesuffix(".weight") for name, info in checkpoint.tensors.items() if len(info.shape) == 2]
        found = sorted({name.rpartition(".")[2] for name in matrices if have.targeted(name)})
        if not all(have.targeted(name) for name in matrices if name.rpartition(".")[2] in found):
            said = f"target_modules is {have.targets!r}, which takes some layers and leaves others of the same name"
            raise InputError(f"{where}: {said}; names, or an expression for all layers, can be continued")
    if tables := {name.rpartition(".")[2] for name in found}.intersection(EMBEDDINGS):
        said = f"target_modules has {', '.join(sorted(tables))}, which is trained by rows here, not by LoRA"
        raise InputError(f"{where}: {said}; merge the adapter and start a new one")
    return sorted(found)
