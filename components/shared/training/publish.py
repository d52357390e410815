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

from components.shared.artifact import MANIFEST, ArtifactWriter, Manifest
from components.shared.safetensors_io import Checkpoint, SafetensorsStream
from components.shared.training.inputs import ADAPTER_CONFIG, EMBEDDING, HEAD, TrainingInputs
from components.shared.training.model import (
    ADAPTER_WEIGHTS,
    PackedLlama,
    adapter_config_json,
    read_back,
)
from components.shared.training.report import loss_report
from components.shared.training.trainer import History

log = logging.getLogger("training")

METRICS = "metrics.jsonl"
REPORT = "report.html"
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_MADE_BY_A_STAGE = {METRICS, REPORT, MANIFEST, "blocks.json"}


def publish_adapter(out: ArtifactWriter, inputs: TrainingInputs, model: PeftModel, history: History) -> Manifest:
    """The adapter, float16, with the tokenizer of its model."""
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    # clones: peft gives views of the live weights
    half = {name: weight.detach().to("cpu", torch.float16).clone().contiguous() for name, weight in weights.items()}
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
    }
    out.vocabulary = inputs.vocabulary
    _add_course(out, history)
    return out.publish("adapter")


def publish_embeddings(out: ArtifactWriter, inputs: TrainingInputs, model: PackedLlama, history: History) -> Manifest:
    """The base with its new embeddings: the file that holds them is rewritten, in the base's dtype, the rest copied."""
    checkpoint = Checkpoint(inputs.model)
    trained = {EMBEDDING: model.get_input_embeddings().weight, HEAD: model.get_output_embeddings().weight}
    trained = {name: weight.detach().cpu() for name, weight in trained.items() if weight.requires_grad}
    rewritten = {checkpoint.info(name).file for name in trained}
    for name in inputs.model.names:
        if name not in rewritten | _MADE_BY_A_STAGE:
            out.copy(inputs.model, name)
    for file in sorted(rewritten):
        there = {name: info for name, info in checkpoint.tensors.items() if info.file == file}
        with out.writer(file) as sink:
            stream = SafetensorsStream(sink, {name: (info.dtype, info.shape) for name, info in there.items()})
            for name, info in there.items():
                tensor = trained.get(name)
                if tensor is None:
                    stream.write(name, checkpoint.read(name))
                else:
                    stream.write(name, tensor.to(getattr(torch, info.dtype)))
            stream.close()
    out.vocabulary = inputs.vocabulary
    out.facts["trained"] = sorted(trained)
    _add_course(out, history)
    return out.publish("hf-model")


def _add_course(out: ArtifactWriter, history: History) -> None:
    out.add_bytes(METRICS, history.jsonl())
    out.add_bytes(REPORT, loss_report(out.stage, history.lines, history.summary()).encode())
    out.metrics |= history.metrics()
    out.facts["summary"] = history.summary()
