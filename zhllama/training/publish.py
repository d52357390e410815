"""What a training gives: an adapter, or a model with new embeddings. Rank 0 alone publishes.

An adapter is peft's folder in float16, written, read back and counted (published adapters of 443 bytes have been
seen), beside the tokenizer it was trained with. Stage 1's model is the base with one file rewritten.
"""

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file

from zhllama.artifacts.manifest import MANIFEST, Manifest
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.training.inputs import TrainingInputs
from zhllama.training.metrics import EVENTS, METRICS, History
from zhllama.training.model import (
    PackedLlama,
    adapter_config_json,
    read_back,
)
from zhllama.training.report import loss_report
from zhllama.training.shape import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from zhllama.training.trainer import Trained
from zhllama.weights.safetensors_io import Checkpoint, SafetensorsStream

log = logging.getLogger("training")

REPORT = "report.html"
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_MADE_BY_A_STAGE = {METRICS, EVENTS, REPORT, MANIFEST, "blocks.json"}


def publish_adapter(out: ArtifactWriter, inputs: TrainingInputs, model: PeftModel, trained: Trained) -> Manifest:
    """The adapter, float16, with the tokenizer of its model."""
    weights = get_peft_model_state_dict(model, state_dict=trained.weights, save_embedding_layers=False)
    if len(weights) != len(trained.weights):
        raise ValueError(f"{len(trained.weights)} tensors were trained, but the adapter would have {len(weights)}")
    half = {name: weight.to(torch.float16).contiguous() for name, weight in weights.items()}
    with tempfile.TemporaryDirectory(prefix="zhllama-") as folder:
        path = Path(folder, ADAPTER_WEIGHTS)
        save_file(half, path, metadata={"format": "pt"})
        tensors = read_back(path, half)
        out.add_file(ADAPTER_WEIGHTS, path)
    out.add_bytes(ADAPTER_CONFIG, adapter_config_json(model))
    for name in TOKENIZER_FILES:
        if name in inputs.model:
            out.copy(inputs.model, name)
    config: Any = model.peft_config["default"]
    out.facts |= {
        "base_digest": inputs.model.digest,
        "base_lineage": inputs.model.manifest.facts.get("lineage") or [inputs.model.digest],
        "dtype": "float16",
        "tensors": tensors,
        "lora_r": config.r,
        "lora_alpha": config.lora_alpha,
        "embeddings": bool(config.modules_to_save),
        "new_rows": len(next(iter((config.trainable_token_indices or {}).values()), ())),
    }
    out.vocabulary = inputs.vocabulary
    _add_course(out, trained.history)
    return out.publish("adapter")


def publish_embeddings(out: ArtifactWriter, inputs: TrainingInputs, model: PackedLlama, trained: Trained) -> Manifest:
    """The base with its new embeddings: the file that holds them is rewritten, in the base's dtype, the rest copied."""
    checkpoint = Checkpoint(inputs.model)
    rewritten = {checkpoint.info(name).file for name in trained.weights}
    for name in inputs.model.names:
        if name not in rewritten | _MADE_BY_A_STAGE:
            out.copy(inputs.model, name)
    for file in sorted(rewritten):
        there = {name: info for name, info in checkpoint.tensors.items() if info.file == file}
        with out.writer(file) as sink:
            stream = SafetensorsStream(sink, {name: (info.dtype, info.shape) for name, info in there.items()})
            for name, info in there.items():
                tensor = trained.weights.get(name)
                if tensor is None:
                    stream.write(name, checkpoint.read(name))
                else:
                    stream.write(name, tensor.to(getattr(torch, info.dtype)))
            stream.close()
    out.vocabulary = inputs.vocabulary
    out.facts["trained"] = sorted(trained.weights)
    if "pieces_before" in inputs.model.manifest.facts:
        # stage 2 may train the new rows alone: it has to know which they are
        out.facts["pieces_before"] = inputs.model.manifest.facts["pieces_before"]
    _add_course(out, trained.history)
    return out.publish("hf-model")


def _add_course(out: ArtifactWriter, history: History) -> None:
    out.add_bytes(METRICS, history.jsonl())
    out.add_bytes(EVENTS, history.events())
    out.add_bytes(REPORT, loss_report(out.stage, history.lines, history.summary()).encode())
    out.metrics |= history.metrics()
    out.facts["summary"] = history.summary()
