"""The model that is trained: a LLaMA whose forward pass gives the loss, with what is not trained frozen.

Attention does not cross documents: with restarting position_ids, no attention mask and no cache (the cache must be off
in so many words, or the documents see each other silently) transformers makes the block-diagonal mask itself.

Trainable weights are float32 whatever the base is in: after 50 AdamW steps at 2e-5 in bf16, 70% of the values of an
embedding had not moved. DeepSpeed in bf16 casts them for the computation and keeps the float32 masters itself.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM
from transformers.utils import ModelOutput
from transformers.utils import logging as transformers_logging

from components.shared.artifact import Artifact
from components.shared.errors import InputError
from components.shared.training.inputs import LoraShape
from components.shared.training.loss import labelled, score, summed_loss

ADAPTER_WEIGHTS = "adapter_model.safetensors"
EMBEDDINGS = ("embed_tokens", "lm_head")


class PackedLlama(LlamaForCausalLM):
    """A LLaMA that takes packed blocks and gives their loss; never logits.

    The name must not contain `ForCausalLM`: by it the Trainer tells that labels are yet to be shifted.
    """

    accepts_loss_kwargs = True

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | None = None,
        **unused: Any,
    ) -> ModelOutput:
        """All three [batch, block]; labels[i, t] is the token that follows t, or -100.

        In training: `loss`, the sum over labels divided by `num_items_in_batch` (those of the whole step, on all
        processes; by default this batch's). In evaluation: `loss`, `correct`, `labels`: sums over this batch's labels.
        """
        hidden = self.model(
            input_ids=input_ids, attention_mask=None, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        rows, wanted = labelled(hidden, labels)
        if torch.is_autocast_enabled(hidden.device.type):
            rows = rows.to(torch.get_autocast_dtype(hidden.device.type))
        head = active_weight(self.lm_head)
        if not self.training:
            return ModelOutput(**score(rows, head, wanted)._asdict())
        divisor = len(wanted) if num_items_in_batch is None else num_items_in_batch
        return ModelOutput(loss=summed_loss(rows, head, wanted) / divisor)


def active_weight(module: nn.Module) -> torch.Tensor:
    """The weight of a layer that peft may have wrapped: the trained copy when one is active, else the layer's own."""
    if isinstance(module, ModulesToSaveWrapper):
        trained = [name for name in module.active_adapters if name in module.modules_to_save]
        module = (
            module.modules_to_save[trained[0]] if trained and not module.disable_adapters else module.original_module
        )
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight


def load_base(model: Artifact, dtype: torch.dtype) -> PackedLlama:
    """The model of an artifact, frozen, in `dtype`. From S3 it goes through the node's verified cache."""
    transformers_logging.disable_progress_bar()
    loaded = PackedLlama.from_pretrained(model.local(), dtype=dtype, attn_implementation="sdpa", local_files_only=True)
    loaded.config.use_cache = False
    loaded.requires_grad_(False)
    return loaded


def train_embeddings_only(model: PackedLlama, also_lm_head: bool) -> PackedLlama:
    """Stage 1: everything stays frozen but embed_tokens (and lm_head)."""
    model.get_input_embeddings().requires_grad_(True)
    if also_lm_head:
        model.get_output_embeddings().requires_grad_(True)
    return _with_masters(model)


def add_lora(model: PackedLlama, shape: LoraShape, adapter: Artifact | None = None) -> PeftModel:
    """LoRA on the shape's layers, and embed_tokens and lm_head in full when it says so.

    With `adapter`, its weights are put in. InputError when they do not fit this model.
    """
    if shape.embeddings and model.config.tie_word_embeddings:
        raise InputError("the model's embeddings are tied: they cannot be trained as two; leave the embeddings out")
    config = LoraConfig(
        r=shape.r,
        lora_alpha=shape.alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=shape.dropout,
        target_modules=shape.targets,
        modules_to_save=list(EMBEDDINGS) if shape.embeddings else None,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    if adapter is not None:
        _put_in(adapted, load_file(adapter.local() / ADAPTER_WEIGHTS), adapter.root)
    return _with_masters(adapted)


def _put_in(model: PeftModel, weights: Mapping[str, torch.Tensor], where: str) -> None:
    wanted = {
        name: tensor.shape for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    given = {name: tensor.shape for name, tensor in weights.items()}
    for name in sorted(wanted.keys() | given.keys()):
        if wanted.get(name) != given.get(name):
            has, needs = (list(shapes[name]) if name in shapes else "nothing" for shapes in (given, wanted))
            raise InputError(
                f"--adapter {where}: its weights do not fit this model: {name} is {has} there and {needs} here; "
                "give an adapter of this model"
            )
    set_peft_model_state_dict(model, dict(weights))


def _with_masters(model: Any) -> Any:
    for parameter in trainable(model):
        parameter.data = parameter.data.float()
    return model


def trainable(model: nn.Module) -> Iterable[nn.Parameter]:
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute activations in the backward pass, with a gradient path through frozen embeddings."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PackedLlama)
    base.enable_input_require_grads()
    base.activation_checkpointing_enable({"use_reentrant": False})


def adapter_config_json(model: PeftModel) -> bytes:
    """adapter_config.json as peft reads it. The base is named in the manifest, by digest, not here by a path."""
    value = model.peft_config["default"].to_dict()
    value["inference_mode"] = True
    value["base_model_name_or_path"] = None
    for name, field in value.items():
        if isinstance(field, set):
            value[name] = sorted(field)
    return (json.dumps(value, indent=2, sort_keys=True, default=str) + "\n").encode()


def read_back(path: Path, expected: Iterable[str]) -> int:
    """The number of tensors in a saved adapter; ValueError when one is empty, not finite, missing or too many."""
    found = load_file(path)
    if set(found) != set(expected):
        raise ValueError(f"{path.name}: {len(found)} tensors saved where {len(set(expected))} were trained")
    for name, tensor in found.items():
        if tensor.numel() == 0 or not torch.isfinite(tensor).all():
            raise ValueError(f"{path.name}: tensor {name} is empty or not finite; lower --learning-rate")
    return len(found)
