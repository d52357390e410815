"""The model that is trained: one of transformers' whose forward pass gives the loss, with what is not trained frozen.

Attention does not cross documents: flash-attn's kernel for varying lengths where it is there (on a GPU, in half
precision); elsewhere the block-diagonal mask that transformers makes for SDPA of restarting position_ids, no attention
mask and no cache (which must be off in so many words, or the documents see each other silently).

Trainable weights are float32 whatever the base is in: after 50 AdamW steps at 2e-5 in bf16, 70% of the values of an
embedding had not moved. The loss is computed inside lm_head's own forward, so that whoever wraps that layer (peft's
trained copy, ZeRO-3's gathering of a partitioned weight) does its part once a pass.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import TrainableTokensWrapper
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import ModelOutput, is_flash_attn_2_available
from transformers.utils import logging as transformers_logging

from zhllama import storage
from zhllama.artifacts.cache import materialize
from zhllama.artifacts.hub_model import PREFIX, parse_address
from zhllama.artifacts.reader import Artifact
from zhllama.data.packed import IGNORED
from zhllama.errors import InputError
from zhllama.models import architecture
from zhllama.models.architecture import EMBEDDING, HEAD
from zhllama.storage.private import temporary_folder
from zhllama.training.inputs import EMBEDDINGS, LoraShape, TrainingInputs, lora_shape, opened_adapter
from zhllama.training.loss import Score, labelled, score, summed_loss
from zhllama.training.options import PretrainOptions, TrainingOptions
from zhllama.weights.adapter import SAFE, Adapter
from zhllama.weights.model_folder import lay_out
from zhllama.weights.safetensors_io import Checkpoint
from zhllama.weights.ties import is_tied

FLASH = "flash_attention_2"
_ALWAYS = ("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "bias", "target_modules")
"""Of adapter_config.json: other programs (vLLM, llama.cpp) read these without peft's defaults."""


class Head(nn.Linear):
    """lm_head. With labels it gives their loss (in training) or their score (in evaluation); without, logits."""

    def forward(self, rows: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        """rows [n, width], labels [n]."""
        return super().forward(rows) if labels is None else measure(rows, self.weight, labels, self.training)


def measure(rows: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, training: bool) -> torch.Tensor | Score:
    if torch.is_autocast_enabled(rows.device.type):
        rows = rows.to(torch.get_autocast_dtype(rows.device.type))
    return summed_loss(rows, head, labels) if training else score(rows, head, labels)


class Packed:
    """What makes one of transformers' models take packed blocks and give their loss; never logits."""

    accepts_loss_kwargs = True
    config: Any
    model: Any
    lm_head: Any
    training: bool

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.lm_head.__class__ = Head

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | None = None,
        **unused: Any,
    ) -> ModelOutput:
        """All three [batch, block], as `collate` gives them. In training: `loss`, the sum over labels divided by
        `num_items_in_batch` (those of the whole step, on all processes; by default this batch's). In evaluation:
        `loss`, `correct`, `labels`: sums over this batch's labels."""
        borders: dict[str, Any] = {}
        if self.config._attn_implementation == FLASH:
            input_ids, position_ids, labels, borders = in_one_row(input_ids, position_ids, labels)
        hidden = self.model(
            input_ids=input_ids, attention_mask=None, position_ids=position_ids, use_cache=False, **borders
        ).last_hidden_state
        rows, wanted = labelled(hidden, labels)
        if isinstance(self.lm_head, TrainableTokensWrapper):
            # it hands on no labels; its weight is the base's with the trained rows put in
            measured = measure(rows, self.lm_head.weight, wanted, self.training)
        else:
            measured = self.lm_head(rows, wanted)
        if isinstance(measured, Score):
            return ModelOutput(**measured._asdict())
        divisor = len(wanted) if num_items_in_batch is None else num_items_in_batch
        return ModelOutput(loss=measured / divisor)


@cache
def packed(name: str) -> Any:
    """The class of transformers' of this name, packed. Its own name must not contain `ForCausalLM`: by it the Trainer
    tells that labels are yet to be shifted."""
    plain = getattr(transformers, name)
    return type(f"Packed{name.removesuffix('ForCausalLM')}", (Packed, plain), {})


def collate(blocks: Sequence[Mapping[str, np.ndarray]], faithful: bool = False) -> dict[str, torch.Tensor]:
    """Blocks → input_ids, position_ids and labels, each [batch, block]; labels[i, t] is the token after t, or -100. The
    dataset's labels stand at the tokens' own places (a segment's first token has none); here they move to the place
    that predicts them. faithful: as the recipe does it, padding cut to the longest of the batch, and nothing in a block
    kept apart."""
    batch = {name: torch.from_numpy(np.stack([block[name] for block in blocks])) for name in blocks[0]}
    labels = torch.full_like(batch["labels"], IGNORED)
    labels[:, :-1] = batch["labels"][:, 1:]
    found = batch | {"labels": labels}
    if faithful:
        # a sample's last token is always learned, and has no label after the move
        length = int((batch["labels"] != IGNORED).any(dim=0).nonzero().max()) + 1
        found["position_ids"] = torch.arange(labels.shape[1]).expand_as(labels)
        found = {name: tensor[:, :length] for name, tensor in found.items()}
    return found


def in_one_row(
    input_ids: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
    """[batch, block] → [1, batch · block] each, and where the documents lie in it, as flash-attn's kernel takes it."""
    positions = position_ids.reshape(-1)
    begins = (positions == 0).nonzero().squeeze(1)
    ends = torch.cat([begins, begins.new_tensor([len(positions)])]).to(torch.int32)
    longest = int(ends.diff().max())
    borders = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    return input_ids.reshape(1, -1), positions[None], labels.reshape(1, -1), borders


def attention(dtype: torch.dtype) -> str:
    """transformers' name of the attention: flash-attn where it is installed and can be used, else SDPA."""
    half = dtype in (torch.float16, torch.bfloat16)
    return FLASH if half and torch.cuda.is_available() and is_flash_attn_2_available() else "sdpa"


def load_base(model: Artifact, dtype: torch.dtype) -> PreTrainedModel:
    """The model of an artifact, frozen, in `dtype`. From S3 it goes through the node's verified cache."""
    transformers_logging.disable_progress_bar()
    checkpoint = Checkpoint(model)
    kind = packed(architecture(checkpoint.settings(), checkpoint.where).transformers)
    with temporary_folder() as folder:
        loaded: PreTrainedModel = kind.from_pretrained(
            lay_out(checkpoint, Path(folder)), dtype=dtype, attn_implementation=attention(dtype), local_files_only=True
        )
    if is_tied(checkpoint):
        loaded.tie_weights()
    # the row of config.json's pad_token_id would get no gradient, and that may be BOS or another piece of the text
    embedding: Any = loaded.get_input_embeddings()
    embedding.padding_idx = None
    loaded.config.use_cache = False
    loaded.requires_grad_(False)
    return loaded


def trained_model(options: TrainingOptions, inputs: TrainingInputs, dtype: torch.dtype) -> nn.Module:
    """The model of the inputs, with what the options say made trainable."""
    model: Any = load_base(inputs.model, dtype)
    if options.gives_adapter:
        modules = architecture(model.config.to_dict(), inputs.model.root).lora_modules
        model = add_lora(model, lora_shape(options, inputs.model, inputs.adapter, modules), inputs.adapter)
    else:
        assert isinstance(options, PretrainOptions)
        model = train_embeddings_only(model, options.also_lm_head)
    if options.gradient_checkpointing:
        checkpoint_activations(model)
    return model


def train_embeddings_only(model: Any, also_lm_head: bool) -> PreTrainedModel:
    """The embeddings' phase: everything stays frozen but embed_tokens (and lm_head)."""
    model.get_input_embeddings().requires_grad_(True)
    if also_lm_head:
        model.get_output_embeddings().requires_grad_(True)
    return cast("PreTrainedModel", _with_masters(model))


def add_lora(model: Any, shape: LoraShape, adapter: Artifact | None = None) -> PeftModel:
    """LoRA on the shape's layers, and embed_tokens and lm_head, in full or their new rows, when it says so; or, of an
    `adapter`, what it has, with its weights. InputError when they do not fit this model."""
    tied = model.config.tie_word_embeddings
    reader = None if adapter is None else opened_adapter(adapter, tied)
    if reader is None:
        rows = {name: list(shape.rows) for name in EMBEDDINGS} if shape.embeddings == "new" else None
        given: dict[str, Any] = {
            "r": shape.r,
            "lora_alpha": shape.alpha,
            "lora_dropout": shape.dropout,
            "target_modules": shape.targets,
            "modules_to_save": EMBEDDINGS if shape.embeddings == "all" else (),
            "trainable_token_indices": rows,
            "task_type": "CAUSAL_LM",
        }
    else:
        given = reader.config.for_peft()
    saved = list(given.pop("modules_to_save", ()))
    one = tied and any(name.rpartition(".")[2] in EMBEDDINGS for name in saved)
    if one:
        # of a tied model the embedding is trained, which is its head too
        others = [name for name in saved if name.rpartition(".")[2] not in EMBEDDINGS]
        given.pop("ensure_weight_tying", None)
        saved = [*others, *EMBEDDINGS[:1]]
    config = LoraConfig(**given, modules_to_save=saved or None)
    # ZeRO-3 wants one dtype throughout, and keeps float32 masters of it
    adapted = get_peft_model(model, config, autocast_adapter_dtype=not is_deepspeed_zero3_enabled())
    if one:
        model.lm_head.weight = model.get_input_embeddings().weight
        # saved as both, whatever loads it has them alike
        _settings(adapted).modules_to_save = [*others, *EMBEDDINGS]
    if reader is not None:
        _put_in(adapted, reader)
    return cast("PeftModel", _with_masters(adapted))


def _put_in(model: PeftModel, reader: Adapter) -> None:
    # a file that is whole on this node already is read at once
    held = load_file(materialize(reader.artifact) / SAFE) if SAFE in reader.artifact else None
    weights = {name: reader.read(key) if held is None else held[key] for name, key in reader.peft_keys()}
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name in sorted(wanted.keys() | weights.keys()):
        has, needs = (list(one[name].shape) if name in one else "nothing" for one in (weights, wanted))
        if has != needs:
            said = f"its weights do not fit this model: {name} is {has} there and {needs} here"
            raise InputError(f"{reader.where}: {said}; give an adapter of this model")
    set_peft_model_state_dict(model, weights)


def _settings(model: PeftModel) -> LoraConfig:
    return cast("LoraConfig", model.peft_config["default"])


def for_both_tables(model: PeftModel, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An adapter's tensors, with a head where a tied model's one table is saved as both."""
    head, embedding = (f"base_model.model.{name}" for name in (HEAD, EMBEDDING))
    saved = _settings(model).modules_to_save or ()
    missing = set(saved) >= set(EMBEDDINGS) and head not in weights
    return weights | ({head: weights[embedding].clone()} if missing else {})


def _with_masters(model: Any) -> Any:
    if not is_deepspeed_zero3_enabled():
        for parameter in trainable(model).values():
            parameter.data = parameter.data.float()
    return model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every trained parameter, whole, in float32 and on the CPU: from DeepSpeed its masters, not its half copies, which
    lie in parts on all processes: all call it together, before the engine is given up."""
    found = {}
    for name, tensor in trainable(model).items():
        if hasattr(tensor, "_hp_mapping") or hasattr(tensor, "ds_id"):
            from deepspeed.utils import safe_get_full_fp32_param

            tensor = safe_get_full_fp32_param(tensor)
        found[name] = tensor.detach().to("cpu", torch.float32, copy=True)
    return found


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute activations in the backward pass, with a gradient path through frozen embeddings."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    base.enable_input_require_grads()
    base.activation_checkpointing_enable({"use_reentrant": False})


def adapter_config_json(model: PeftModel, base: Artifact) -> bytes:
    """adapter_config.json with what says something: older peft stops at each key that it does not know, null or not.
    The base is the Hub's name of it, where it is the Hub's as it is there, else where it lies: from it peft and
    transformers load the model. What it must be is in the manifest, by digest."""
    has, usual = model.peft_config["default"].to_dict(), LoraConfig().to_dict()
    said = {name: field for name, field in has.items() if name in _ALWAYS or field != usual[name]}
    value = {name: sorted(field) if isinstance(field, set) else field for name, field in said.items()}
    value |= {"inference_mode": True, **_named(base)}
    return (json.dumps(value, indent=2, sort_keys=True, default=str) + "\n").encode()


def _named(base: Artifact) -> dict[str, str]:
    """The fields of adapter_config.json that name the base."""
    fetched = base.manifest.inputs.get("source") if base.manifest.stage == "fetch_weights" else None
    told = [base.root, str(base.manifest.configuration.get("source")), fetched.reference if fetched else ""]
    for address in told if fetched else told[:1]:
        found = parse_address(address)
        if found and not found[2]:
            return {"base_model_name_or_path": found[0]} | ({"revision": found[1]} if found[1] else {})
    return {"base_model_name_or_path": base.root if base.root.startswith(PREFIX) else storage.normalise(base.root)}


def read_back(path: Path, expected: Iterable[str]) -> int:
    """The number of tensors in a saved adapter; ValueError when one is empty, not finite, missing or too many."""
    found, names = load_file(path), set(expected)
    if set(found) != names:
        raise ValueError(f"{path.name}: {len(found)} tensors saved where {len(names)} were trained")
    for name, tensor in found.items():
        if tensor.numel() == 0 or not torch.isfinite(tensor).all():
            raise ValueError(f"{path.name}: tensor {name} is empty or not finite; lower --learning-rate")
    return len(found)
