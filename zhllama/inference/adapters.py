"""Adapters that are merged into a loaded model, in order, in memory, by peft; what does not fit is refused before.

Each adapter's vocabulary must equal the one before it, or extend it with rows of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zhllama.artifacts.cache import materialize
from zhllama.artifacts.json_file import read_object
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.inference.check import open_encoder
from zhllama.tokenizer.vocabulary import Encoder, Relation, Vocabulary
from zhllama.weights.safetensors_io import Checkpoint

ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True)
class PlannedAdapter:
    folder: Path
    encoder: Encoder
    rows: int | None
    """Rows of the embedding that this adapter brings, where they are more than the model has."""


def plan_adapters(
    artifact: Artifact, encoder: Encoder, vocabulary: Vocabulary, adapters: Sequence[Artifact]
) -> list[PlannedAdapter]:
    plan: list[PlannedAdapter] = []
    checkpoint = Checkpoint(artifact, "--model") if adapters else None
    for adapter in adapters:
        adapter.require_kind("adapter", option="--adapters")
        where = f"--adapters {adapter.root}"
        if "adapter_config.json" not in adapter:
            raise InputError(f"{where}: no adapter_config.json in it; give a peft adapter folder")
        base = adapter.manifest.facts.get("base_digest")
        if not plan and base is not None and artifact.verified and base != artifact.digest:
            raise InputError(
                f"{where}: it was trained on the model {base[:8]}, but --model is {artifact.digest[:8]}; give that "
                "model, and several adapters in the order they were trained in"
            )
        rows = None
        if "tokenizer.model" in adapter:
            own_encoder, own = open_encoder(adapter, "--adapters")
            relation = own.relation_to(vocabulary)
            if relation is Relation.FOREIGN:
                # a plain folder's contract records no digest at the size before it: take it there
                relation = own_encoder.vocabulary(also_at=(vocabulary.size,)).relation_to(vocabulary)
            try:
                saved = read_object(adapter, "adapter_config.json").get("modules_to_save") or []
            except ValueError as error:
                raise InputError(f"{where}: adapter_config.json is damaged ({error}); fetch it again") from error
            if relation is Relation.EXTENDS and "embed_tokens" in saved:
                rows = own.rows
            elif relation is not Relation.EQUAL:
                raise InputError(
                    f"{where}: its vocabulary, {own}, and the one before it, {vocabulary}: {relation.value}; it must "
                    "be equal, or extend it and bring the embedding rows (are the adapters in the right order?)"
                )
            encoder, vocabulary = own_encoder, own
        _check_fit(adapter, checkpoint, where)
        plan.append(PlannedAdapter(materialize(adapter), encoder, rows))
    return plan


def _check_fit(adapter: Artifact, base: Checkpoint | None, where: str) -> None:
    """InputError for an adapter of another architecture: a matrix whose weight the model has not, or in another shape.

    A pickle's shapes are peft's to hold against the model, when it loads it.
    """
    if base is None or ADAPTER not in adapter:
        return
    tensors = Checkpoint(adapter, "--adapters", single=ADAPTER).tensors
    for name, info in tensors.items():
        for matrix, side in ((".lora_A.weight", 1), (".lora_B.weight", 0)):
            if not name.endswith(matrix) or len(info.shape) != 2:
                continue
            weight = f"{name.removesuffix(matrix).removeprefix('base_model.model.')}.weight"
            if weight not in base.tensors:
                raise InputError(
                    f"{where}: it changes {weight}, which the model has not; give an adapter for this model"
                )
            shape = base.tensors[weight].shape
            # the embedding's rows may be more in the adapter; transposed layers are not LLaMA's
            if info.shape[side] != shape[side] and "embed_tokens" not in weight and "lm_head" not in weight:
                raise InputError(
                    f"{where}: it changes {weight} with {info.shape[side]} along axis {side}, the model's is "
                    f"{' × '.join(map(str, shape))}; give an adapter for a model of this size"
                )


def merge(model: Any, adapter: PlannedAdapter) -> Any:
    from peft import PeftModel

    if adapter.rows is not None:
        # modules_to_save overwrite every row: how the new ones begin does not matter, the default would take minutes
        model.resize_token_embeddings(adapter.rows, mean_resizing=False)
    return PeftModel.from_pretrained(model, str(adapter.folder)).merge_and_unload()
