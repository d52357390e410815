"""Instruction tuning: useful tokens a second, ours beside the recipe's padded batches.

The samples are as long as Chinese Alpaca items are: a prompt of 45 tokens and its instruction, an answer of 60 in the
middle, few of them long. What they say does not change the speed.
"""

from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.measure import Table, measured
from tests.bench.small_llama import (
    BLOCK,
    PIECES,
    make_dataset,
    make_model,
    middle,
    our_training,
    random_ids,
    usual_training,
)
from tests.packed_data import Segment, in_arrays
from zhllama.data.packed import IGNORED

SAMPLES = 2000
BATCH = 8
STEPS = {"ours": 16, "padded to the longest": 12, "padded to 512": 5}
BARS = {"padded to the longest": 1.5, "padded to 512": 3.0}


def samples() -> list[Segment]:
    chance = np.random.default_rng(4)
    prompts = 45 + np.clip(chance.lognormal(np.log(25), 0.6, SAMPLES), 4, 300).astype(int)
    answers = np.clip(chance.lognormal(np.log(60), 0.9, SAMPLES), 2, 400).astype(int)
    found = []
    for prompt, answer in zip(prompts.tolist(), answers.tolist(), strict=True):
        ids = random_ids(chance, min(prompt + answer, BLOCK))
        found.append(Segment(ids, min(prompt, len(ids) - 1)))
    return found


def prepare(store: str) -> dict[str, str]:
    from components.prepare_dataset.best_fit import BestFit

    packer = BestFit(BLOCK)
    blocks = [*packer.add(in_arrays(samples())), *packer.finish()]
    return {"model": make_model(Path(store)), "dataset": make_dataset(Path(store), "packed", blocks)}


def ours(store: str, model: str, dataset: str, batch: int) -> dict[str, float]:
    from components.finetune.options import Finetune
    from zhllama.training.stage import run_training as finetune

    speeds = our_training(
        Finetune, finetune, store, STEPS["ours"],
        model=model, dataset=dataset, train_embeddings=True, per_device_train_batch_size=batch,
    )  # fmt: skip
    return {"tokens_per_second": middle(speeds)}


def padded(store: str, model: str, to_longest: bool) -> dict[str, float]:
    """The recipe's batches: eight samples, padded to the longest of them or to 512. Tokens that are no padding."""
    import torch

    lengths: list[int] = []

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(item["ids"]) for item in batch) if to_longest else BLOCK
        ids = torch.full((len(batch), width), PIECES - 1)
        labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
        for row, item in enumerate(batch):
            length = len(item["ids"])
            ids[row, :length] = torch.tensor(item["ids"])
            labels[row, item["prompt"] : length] = ids[row, item["prompt"] : length]
            mask[row, :length] = 1
        lengths.append(int(mask.sum()))
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    name = "padded to the longest" if to_longest else "padded to 512"
    items = [{"ids": sample.ids.tolist(), "prompt": sample.prompt} for sample in samples()]
    seconds = usual_training(model, items, collate, BATCH, STEPS[name], store)
    speeds = [tokens / second for tokens, second in zip(lengths[1 : len(seconds) + 1], seconds, strict=True)]
    return {"tokens_per_second": middle(speeds)}


def run(scratch: Path) -> list[Table]:
    made = measured(prepare, str(scratch)).result
    mean = sum(len(sample.ids) for sample in samples()) / SAMPLES
    # no more tokens a step than eight samples have: the optimizer's part of it counts for as much
    batch = max(1, int(BATCH * mean / BLOCK))
    found = {
        "ours": measured(ours, str(scratch), made["model"], made["dataset"], batch),
        "padded to the longest": measured(padded, str(scratch), made["model"], True),
        "padded to 512": measured(padded, str(scratch), made["model"], False),
    }
    table = Table(
        "Instruction tuning, 49 M parameters, 49,954 pieces: tokens that are no padding",
        ("", "tokens/s", "ours is", "bar", "peak MB"),
        note=f"{SAMPLES:,} samples of {mean:.0f} tokens on average, {BATCH} a step (ours: {batch} packed blocks of "
        f"{BLOCK}); LoRA of rank 8 and the embeddings in full, float32; the peer is transformers' Trainer with peft. "
        "Median over the steps. Bars: 1.5 times padding to the longest of 8, 3 times padding to 512.",
    )
    speed = found["ours"].result["tokens_per_second"]
    for name, cost in found.items():
        its = cost.result["tokens_per_second"]
        ratio = f"{speed / its:.2f} ×" if name in BARS else ""
        bar = f"{BARS[name]} ×" if name in BARS else ""
        table.rows.append((name, f"{its:,.0f}", ratio, bar, f"{cost.peak_mb:,.0f}"))
    return [table]
