"""Continued pre-training: the time of a step, and the memory of logits and loss, beside transformers' run_clm loop."""

from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.measure import Table, measured
from tests.bench.small_llama import (
    BLOCK,
    PIECES,
    WIDTH,
    make_dataset,
    make_model,
    middle,
    our_training,
    random_ids,
    usual_training,
)
from tests.packed_data import Segment, blocks_of

BATCH = 4
STEPS = 8
BLOCKS = 64
LOSS_TOKENS = 4096
"""Of the memory's measurement: a batch of eight blocks."""


def blocks() -> list[Segment]:
    chance = np.random.default_rng(5)
    return [Segment(random_ids(chance, BLOCK)) for _ in range(BLOCKS)]


def prepare(store: str) -> dict[str, str]:
    packed = make_dataset(Path(store), "packed", [blocks_of(*([block] for block in blocks()))])
    return {"model": make_model(Path(store)), "dataset": packed}


def ours(store: str, model: str, dataset: str) -> dict[str, float]:
    from components.pretrain.options import Pretrain
    from zhllama.training.stage import run_training as pretrain

    speeds = our_training(
        Pretrain, pretrain, store, STEPS,
        stage="lora", model=model, dataset=dataset, per_device_train_batch_size=BATCH,
    )  # fmt: skip
    return {"step": BATCH * BLOCK / middle(speeds)}


def usual(store: str, model: str) -> dict[str, float]:
    """run_clm's: blocks of ids, labels equal to them, default_data_collator, the model's own loss."""
    from transformers import default_data_collator

    items = [{"input_ids": block.ids.tolist(), "labels": block.ids.tolist()} for block in blocks()]
    for item in items:
        item["attention_mask"] = [1] * BLOCK
    return {"step": middle(usual_training(model, items, default_data_collator, BATCH, STEPS, store))}


def loss_memory(way: str) -> dict[str, Any]:
    """Hidden states, a head and both gradients, and between them the loss: ours, transformers', or none at all."""
    import torch

    torch.manual_seed(0)
    hidden = torch.randn(LOSS_TOKENS, WIDTH, requires_grad=True)
    head = torch.nn.Parameter(torch.randn(PIECES, WIDTH) * 0.02)
    labels = torch.randint(0, PIECES, (LOSS_TOKENS,))
    if way == "ours":
        from zhllama.training.loss import summed_loss

        loss = summed_loss(hidden, head, labels) / LOSS_TOKENS
    elif way == "usual":
        from transformers.loss.loss_utils import ForCausalLMLoss

        logits = torch.nn.functional.linear(hidden, head)[None]
        loss = ForCausalLMLoss(logits, labels[None], PIECES, shift_labels=labels[None])
        del logits
    else:
        loss = hidden.sum() * 0 + head.sum() * 0
    loss.backward()
    return {"loss": loss.item()}


def run(scratch: Path) -> list[Table]:
    made = measured(prepare, str(scratch)).result
    step = {
        "ours": measured(ours, str(scratch), made["model"], made["dataset"]),
        "run_clm": measured(usual, str(scratch), made["model"]),
    }
    memory = {way: measured(loss_memory, way) for way in ("none", "ours", "usual")}
    extra = {way: memory[way].peak_mb - memory["none"].peak_mb for way in ("ours", "usual")}
    seconds = {name: cost.result["step"] for name, cost in step.items()}
    losses = abs(memory["ours"].result["loss"] - memory["usual"].result["loss"])
    table = Table(
        "Continued pre-training, 49 M parameters, 49,954 pieces",
        ("", "ours", "run_clm loop", "ratio", "bar"),
        note=f"Blocks of {BLOCK}, {BATCH} a step; LoRA of rank 8 and the embeddings in full, float32; the peer is "
        f"transformers' Trainer with peft. Memory: over {LOSS_TOKENS:,} tokens, beyond hidden states, head and their "
        f"gradients; the two losses differ by {losses:.1e}. Bars: the peer's time, 60% of its memory.",
    )
    table.rows += [
        (
            "seconds a step",
            f"{seconds['ours']:.2f}",
            f"{seconds['run_clm']:.2f}",
            f"{seconds['run_clm'] / seconds['ours']:.2f} × as fast",
            "1.0 ×",
        ),
        (
            "MB for logits and loss",
            f"{extra['ours']:,.0f}",
            f"{extra['usual']:,.0f}",
            f"{extra['ours'] / extra['usual']:.0%}",
            "60%",
        ),
        (
            "MB of the whole training, peak",
            f"{step['ours'].peak_mb:,.0f}",
            f"{step['run_clm'].peak_mb:,.0f}",
            f"{step['ours'].peak_mb / step['run_clm'].peak_mb:.0%}",
            "",
        ),
    ]
    return [table]
