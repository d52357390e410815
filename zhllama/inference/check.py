"""Do a model's weights, its tokenizer, its manifest and its adapters belong together: known from headers, before a
weight is read."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from zhllama.artifacts.cache import materialize
from zhllama.artifacts.json_file import read_object
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.tokenizer.vocabulary import Encoder, Relation, Vocabulary, load_encoder
from zhllama.weights.fit import Step, contracts_of, require_fit, require_rows, rows_fit, trained_on
from zhllama.weights.safetensors_io import Checkpoint

ADAPTER = "adapter_model.safetensors"


def check_model(artifact: Artifact, option: str) -> tuple[Encoder, Vocabulary]:
    """The tokenizer of a model and its contract, after every shard's header was read. InputError when a shard is
    missing or damaged, or the embedding's rows are not the tokenizer's pieces."""
    encoder, vocabulary = open_encoder(artifact, option)
    if "config.json" not in artifact:
        raise InputError(f"{option} {artifact.root}: no config.json in it; a Hugging Face model folder is needed")
    rows = Checkpoint(artifact, option).info("model.embed_tokens.weight").shape[0]
    fit = rows_fit(encoder.size, rows, artifact.manifest.vocabulary)
    require_rows(encoder.size, rows, f"{option} {artifact.root}", "the embedding", fit)
    return encoder, vocabulary


def open_encoder(artifact: Artifact, option: str) -> tuple[Encoder, Vocabulary]:
    """The tokenizer of a model or adapter, and its contract; InputError when it is not the manifest's."""
    encoder = load_encoder(artifact, option)
    stated = artifact.manifest.vocabulary
    if stated is None:
        return encoder, encoder.vocabulary()
    found = encoder.vocabulary(also_at=(int(size) for size in stated.prefixes))
    if found.relation_to(stated) is not Relation.EQUAL:
        raise InputError(
            f"{option} {artifact.root}: its tokenizer.model has {found}, its manifest says {stated}; publish it again"
        )
    return encoder, stated


class PlannedAdapter(NamedTuple):
    folder: Path
    encoder: Encoder
    rows: int | None
    """Rows of the embedding that this adapter brings, where they are more than the model has."""


def plan_adapters(model: Artifact, encoder: Encoder, adapters: Sequence[Artifact]) -> list[PlannedAdapter]:
    """The adapters in the order of merging. InputError for those that do not fit the model, or one another."""
    encoders: list[Encoder | None] = [encoder]
    found, brings_rows = [], []
    for adapter in adapters:
        adapter.require_kind("adapter", option="--adapters")
        where = f"--adapters {adapter.root}"
        if "adapter_config.json" not in adapter:
            raise InputError(f"{where}: no adapter_config.json in it; give a peft adapter folder")
        try:
            saved = read_object(adapter, "adapter_config.json").get("modules_to_save") or []
        except ValueError as error:
            raise InputError(f"{where}: adapter_config.json is damaged ({error}); fetch it again") from error
        rows, own = None, None
        if "tokenizer.model" in adapter:
            own, vocabulary = open_encoder(adapter, "--adapters")
            rows = vocabulary.rows if vocabulary.size > encoder.size else None
            encoder = own
        encoders.append(own)
        brings_rows.append("embed_tokens" in saved)
        found.append((adapter, encoder, rows))
    first, *others = contracts_of([model, *adapters], encoders)
    # what is without a manifest may be what a later adapter names: its digest is of whatever files lie there
    known, steps = model.verified, []
    for adapter, contract, brings in zip(adapters, others, brings_rows, strict=True):
        named = trained_on(adapter) if known else None
        steps.append(Step(adapter.root, adapter.digest, contract, brings, named))
        known = known and adapter.verified
    require_fit(model, first, steps)
    base = Checkpoint(model, "--model") if adapters else None
    for adapter in adapters:
        if base and ADAPTER in adapter:
            _check_fit(Checkpoint(adapter, "--adapters", single=ADAPTER), base, f"--adapters {adapter.root}")
    return [PlannedAdapter(materialize(adapter), encoder, rows) for adapter, encoder, rows in found]


def _check_fit(adapter: Checkpoint, base: Checkpoint, where: str) -> None:
    """InputError for an adapter of another architecture: a matrix whose weight the model has not, or in another shape.
    A pickle's shapes are peft's to hold against the model, when it loads it."""
    for name, info in adapter.tensors.items():
        stem, _, matrix = name.rpartition(".lora_")
        side = {"A.weight": 1, "B.weight": 0}.get(matrix)
        if side is None or len(info.shape) != 2:
            continue
        weight = f"{stem.removeprefix('base_model.model.')}.weight"
        if weight not in base.tensors:
            raise InputError(f"{where}: it changes {weight}, which the model has not; give an adapter for this model")
        shape = base.tensors[weight].shape
        # the embedding's rows may be more in the adapter; transposed layers are not LLaMA's
        if info.shape[side] != shape[side] and "embed_tokens" not in weight and "lm_head" not in weight:
            raise InputError(
                f"{where}: it changes {weight} with {info.shape[side]} along axis {side}, the model's is "
                f"{' × '.join(map(str, shape))}; give an adapter for a model of this size"
            )
