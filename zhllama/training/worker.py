"""One process of a training, from its inputs to what rank 0 publishes: an adapter, or a model with new embeddings.

An adapter is peft's folder in float16, written, read back and counted (published adapters of 443 bytes have been
seen), beside the tokenizer it was trained with. The model of the embeddings' phase is the base with one file rewritten.
"""

import json
import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import set_seed

from zhllama.artifacts.blocks import BLOCKS
from zhllama.artifacts.cache import cache_folder
from zhllama.artifacts.manifest import MANIFEST, PROVENANCE, Manifest
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.data.packed import TRAIN, VALIDATION, PackedDataset
from zhllama.errors import InputError
from zhllama.models import architecture
from zhllama.models.architecture import EMBEDDING, HEAD
from zhllama.stage.inputs import Inputs
from zhllama.stage.report_page import curves, render
from zhllama.stage.run import REPORT
from zhllama.storage.private import temporary_folder
from zhllama.tokenizer.chat import Chat
from zhllama.tokenizer.effective_model import DESCRIBED
from zhllama.tokenizer.prompt import RECIPE
from zhllama.tokenizer.special_ids import special_ids
from zhllama.tokenizer.vocabulary import TOKENIZER_FILES, Encoder, load_encoder
from zhllama.training.checkpoints import AVERAGED, TRAINER, WEIGHTS, Run, open_checkpoint
from zhllama.training.inputs import TrainingInputs, checked_inputs
from zhllama.training.metrics import EVENTS, METRICS, History, size_of
from zhllama.training.model import adapter_config_json, for_both_tables, read_back, trainable, trained_model
from zhllama.training.replay import Blocks, Replayed
from zhllama.training.trainer import precision_of, start_processes, train, training_arguments
from zhllama.training.training_state import Tensors
from zhllama.weights.adapter import SAFE
from zhllama.weights.adapter_config import CONFIG as ADAPTER_CONFIG
from zhllama.weights.chat_template import (
    OWN,
    PROMPT_FACT,
    Template,
    chosen,
    default_of,
    is_template,
    prompt_of,
    same_template,
    taught,
    template_in,
)
from zhllama.weights.fit import lineage_of, weights_of
from zhllama.weights.model_card import README, terms_in, write_card
from zhllama.weights.model_config import CONFIG, GENERATION, model_config
from zhllama.weights.safetensors_io import Checkpoint, SafetensorsStream
from zhllama.weights.settings import read_settings, write_settings
from zhllama.weights.ties import is_tied

log = logging.getLogger("training")

FIGURES = {
    "loss": ("last training loss", "{:.4f}"),
    "eval_loss": ("held-out loss", "{:.4f}"),
    "eval_perplexity": ("held-out perplexity", "{:,.4g}"),
    "eval_accuracy": ("next-token accuracy", "{:.2%}"),
    "eval_replay_loss": ("loss of held-out replay text", "{:.4f}"),
    "eval_replay_bits_per_byte": ("bits per byte of it", "{:.4f}"),
    "base_replay_loss": ("its loss with the base", "{:.4f}"),
    "budget_spent": ("of the forgetting budget, spent", "{:.1%}"),
    "replay_share": ("replayed, of the learned tokens, last", "{:.1%}"),
    "tokens_per_second": ("tokens per second, last", "{:,.0f}"),
    "mfu": ("of the GPUs' peak (MFU), last", "{:.1%}"),
    "peak_memory_gb": ("peak memory of a process, GB", "{:.1f}"),
    "step": ("steps", "{:,.0f}"),
}
"""Field of a line of metrics.jsonl → what the page calls it, and how it is written."""


DECISIONS = {
    "eval_replay_loss": ("loss of held-out replay text", "{:.4f}"),
    "budget_spent": ("of the budget", "{:.0%}"),
    "replay_share": ("replayed from here on", "{:.1%}"),
    "rate_factor": ("of the learning rate", "{:.0%}"),
}
"""What the page says of the forgetting budget, evaluation by evaluation, likewise."""


def run_worker(run: Run) -> None:
    """Loads, trains, and on rank 0 publishes. The other ranks wait, so that every node finds the result."""
    options = run.options
    opened = Inputs(options)
    opened.require_same(run.inputs)
    inputs = checked_inputs(options, opened)
    splits, blocks = inputs.dataset.manifest.facts["splits"], PackedDataset(inputs.dataset, TRAIN)
    held_out: dict[str, Blocks] = {}
    if VALIDATION in splits:
        held_out["eval"] = PackedDataset(inputs.dataset, VALIDATION)
    replayed = None if inputs.replay is None else Replayed.of(inputs.replay, inputs.base_loss)
    if replayed is not None and replayed.held_out is not None:
        held_out["eval_replay"] = replayed.held_out
    # the Trainer's own small files on this node; removed after a success
    folder = cache_folder() / "training" / run.key
    start_processes(options)
    arguments = training_arguments(options, folder, len(blocks), bool(held_out))
    set_seed(options.seed)
    model = trained_model(options, inputs, getattr(torch, precision_of(options)))
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        trained, whole = (sum(map(size_of, one)) for one in (trainable(model).values(), model.parameters()))
        sizes = f"{trained:,} of {whole:,} parameters on {len(blocks):,} blocks of {blocks.block_size} tokens"
        world, threads = arguments.world_size, torch.get_num_threads()
        processes = f"{world} process{'' if world == 1 else 'es'}"
        spread = f"DeepSpeed {options.deepspeed}" if options.deepspeed != "none" else "plain data parallelism"
        each = f"{threads} thread{'' if threads == 1 else 's'} each"
        log.info("training %s: %s, %s, %s, %s", sizes, processes, spread, precision_of(options), each)
    out = run.result_writer()
    history, weights = train(options, arguments, model, blocks, held_out, run, out.root, replayed)
    if rank == 0:
        opened.require_unchanged()
        publish(out, inputs, model, history, weights)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    shutil.rmtree(folder, ignore_errors=True)


def publish_checkpoint(run: Run, opened: Inputs, inputs: TrainingInputs) -> Manifest:
    """Publishes the checkpoint that the options name as the training's result would be. In one process."""
    options = run.options
    checkpoint = open_checkpoint(options.publish_checkpoint, "--publish-checkpoint")
    model = trained_model(options, inputs, torch.float32)
    saved = Checkpoint(checkpoint, "the checkpoint", single=AVERAGED if options.ema else WEIGHTS)
    weights = {name: saved.read(name).float() for name in saved.tensors}
    if weights.keys() != trainable(model).keys():
        raise InputError(f"--publish-checkpoint {options.publish_checkpoint}: its weights are none of this training's")
    history = History(json.loads(checkpoint.read(TRAINER))["log_history"])
    out = run.result_writer()
    out.facts["step"] = checkpoint.manifest.facts["step"]
    opened.require_unchanged()
    return publish(out, inputs, model, history, weights)


def publish(out: ArtifactWriter, inputs: TrainingInputs, model: Any, history: History, trained: Tensors) -> Manifest:
    """Publishes the result of a training, from its course and the trained weights (by the names of the model's
    parameters, float32, on the CPU). For rank 0."""
    adapter = isinstance(model, PeftModel)
    if adapter:
        _add_adapter(out, inputs, model, trained)
    else:
        _add_model(out, inputs, trained)
    out.vocabulary = inputs.vocabulary
    out.add_bytes(METRICS, history.jsonl(), beside=True)
    out.add_bytes(EVENTS, history.events(), beside=True)
    out.add_bytes(REPORT, loss_report(out.stage, history.lines, history.summary()).encode(), beside=True)
    out.metrics |= history.metrics()
    out.facts["summary"] = history.summary()
    return out.publish("adapter" if adapter else "hf-model")


def _add_adapter(out: ArtifactWriter, inputs: TrainingInputs, model: PeftModel, trained: Tensors) -> None:
    weights = get_peft_model_state_dict(model, state_dict=trained, save_embedding_layers=False)
    if len(weights) != len(trained):
        raise ValueError(f"{len(trained)} tensors were trained, but the adapter would have {len(weights)}")
    half = {name: one.to(torch.float16).contiguous() for name, one in for_both_tables(model, weights).items()}
    with temporary_folder() as folder:
        path = Path(folder, SAFE)
        save_file(half, path, metadata={"format": "pt"})
        tensors = read_back(path, half)
        out.add_file(SAFE, path)
    settings = adapter_config_json(model, inputs.model)
    out.add_bytes(ADAPTER_CONFIG, settings, says_place=True)
    _add_tokenizer(out, inputs, load_encoder(inputs.model, "--model"))
    config: Any = model.peft_config["default"]
    out.facts |= {
        "base_digest": inputs.model.digest,
        "base_lineage": list(lineage_of(inputs.model)),
        "base_weights": weights_of(inputs.model),
        "dtype": "float16",
        "tensors": tensors,
        "lora_r": config.r,
        "lora_alpha": config.lora_alpha,
        "embeddings": bool(config.modules_to_save),
        "new_rows": len(next(iter((config.trainable_token_indices or {}).values()), ())),
    }


def _add_tokenizer(out: ArtifactWriter, inputs: TrainingInputs, encoder: Encoder) -> Template:
    """The base's tokenizer, with the template that was taught, by this training or the one it continues, or its own."""
    items = inputs.dataset.manifest.facts["splits"][TRAIN].get("columns", 1) > 1
    before = [] if inputs.adapter is None else [inputs.adapter]
    template: Template
    own = template_in(inputs.model, "--model")
    if items and (prompt := prompt_of(inputs.dataset, RECIPE.name)):
        template, why = prompt.template, f"{prompt.title}: it was trained with it"
        if own and default_of(own) == template:
            template = own  # with the others that it names
    else:
        prompt = taught(before[0]) if before else None
        template, why = chosen(inputs.model, before)
    positions = model_config(Checkpoint(inputs.model)).get("max_position_embeddings", 2048)
    for name, content in encoder.files(positions, template).items():
        out.add_bytes(name, content)
    out.facts |= {PROMPT_FACT: prompt.name if prompt else "", "chat_template": why}
    if prompt and not same_template(own, prompt.template):
        said = (
            "%s is asked otherwise than is taught: an engine that lays the adapter over it must be given the adapter's"
        )
        log.warning(f"{said} chat template (vLLM: --chat-template)", inputs.model.root)
    return template


def _add_model(out: ArtifactWriter, inputs: TrainingInputs, trained: Tensors) -> None:
    """The files that hold trained weights are rewritten, in the base's dtype, the others copied."""
    checkpoint = Checkpoint(inputs.model)
    if HEAD in checkpoint.tensors and is_tied(checkpoint):
        trained = trained | {HEAD: trained[EMBEDDING]}
    rewritten = {checkpoint.info(name).file for name in trained}
    own = (METRICS, EVENTS, REPORT, MANIFEST, PROVENANCE, BLOCKS, GENERATION, README, *TOKENIZER_FILES, *DESCRIBED)
    ours = {*rewritten, *own, *terms_in(inputs.model)}
    for name in inputs.model.names:
        if name not in ours and not is_template(name):
            out.copy(inputs.model, name)
    encoder = load_encoder(inputs.model, "--model")
    template = default_of(_add_tokenizer(out, inputs, encoder))
    settings = read_settings(checkpoint)
    ids = special_ids(encoder, settings, checkpoint.where)
    if out.facts[PROMPT_FACT] == OWN:
        ids = ids.ending(Chat(encoder, template).end)
    write_settings(out, settings[CONFIG], settings.get(GENERATION, {}), ids)
    for file in sorted(rewritten):
        there = {name: info for name, info in checkpoint.tensors.items() if info.file == file}
        with out.writer(file) as sink:
            stream = SafetensorsStream(sink, {name: (info.dtype, info.shape) for name, info in there.items()})
            for name, info in there.items():
                kind = getattr(torch, info.dtype)
                stream.write(name, trained[name].to(kind) if name in trained else checkpoint.read(name))
            stream.close()
    said = {"Chat template": out.facts["chat_template"]}
    kind = architecture(settings[CONFIG], checkpoint.where)
    write_card(out, inputs.model, f"A {kind.title} model whose embeddings were trained further.", said)
    out.facts["trained"] = sorted(trained)
    if "pieces_before" in inputs.model.manifest.facts:
        # the next phase may train the new rows alone: it has to know which they are
        out.facts["pieces_before"] = inputs.model.manifest.facts["pieces_before"]


def loss_report(title: str, lines: Sequence[Mapping[str, float]], summary: str) -> str:
    """The page for the lines of a metrics.jsonl: its loss curve and last figures; `summary` stands under the title."""
    points = []
    for line in lines:
        losses = {name: line[name] for name in ("loss", "eval_loss") if math.isfinite(line.get(name, math.nan))}
        if losses:
            points.append({"step": line["step"], "loss": None, "eval_loss": None, **losses})
    drawn = [curves({"label": "loss per token, in nats", "points": points})] if points else []
    replayed = [line for line in lines if math.isfinite(line.get("eval_replay_loss", math.nan))]
    if replayed:
        shown = [{"step": line["step"], "loss": None, "eval_loss": line["eval_replay_loss"]} for line in replayed]
        drawn.append(curves({"label": "loss per token of held-out replay text", "points": shown}))
    last = {name: value for line in lines for name, value in line.items()}
    return render(
        Path(__file__).with_name("loss_report.html"),
        title=title,
        summary=summary,
        curves=drawn,
        decisions=[
            (f"{line['step']:,}", *(form.format(line[name]) for name, (_, form) in DECISIONS.items()))
            for line in replayed
            if "budget_spent" in line
        ],
        decided=[text for text, _ in DECISIONS.values()],
        rows=[(text, form.format(last[name])) for name, (text, form) in FIGURES.items() if name in last],
    )
