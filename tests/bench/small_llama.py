"""What the benchmarks of training share: a LLaMA of 49 million parameters with the recipe's vocabulary, and the usual
way to train it (transformers' LlamaForCausalLM, peft and Trainer), to stand beside ours."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.folders import add_folder
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.data.packed import KIND, TRAIN, Blocks, PackedWriter, packed_facts
from zhllama.tokenizer.vocabulary import Vocabulary

PIECES = 49_954
BLOCK = 512
WIDTH, LAYERS, FFN = 384, 6, 1024
VOCABULARY = Vocabulary(PIECES, "0" * 64, 1, 2, PIECES - 1)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]


def make_model(store: Path) -> str:
    """Random weights as an artifact; its reference."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=PIECES,
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    folder = store / "plain"
    LlamaForCausalLM(config).save_pretrained(folder)
    out = ArtifactWriter(str(store), "convert_weights", "model")
    add_folder(out, folder)
    out.vocabulary = VOCABULARY
    return out.publish("hf-model").reference


def make_dataset(store: Path, name: str, blocks: Iterable[Blocks]) -> str:
    out = ArtifactWriter(str(store), "prepare_dataset", name)
    with PackedWriter(out, TRAIN, BLOCK, PIECES, PIECES - 1) as split:
        for some in blocks:
            split.write_blocks(some)
    out.vocabulary = VOCABULARY
    out.facts = packed_facts(BLOCK, PIECES, PIECES - 1, [split])
    return out.publish(KIND).reference


def random_ids(chance: np.random.Generator, count: int) -> np.ndarray:
    return chance.integers(3, PIECES - 1, count).astype("<u2")


def usual_training(
    model: str, samples: list[dict[str, Any]], collate: Callable[[Any], Any], batch: int, steps: int, scratch: str
) -> list[float]:
    """Seconds of each optimizer step of transformers' own way, the first left out: LoRA, embeddings in full."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        times: list[float] = []  # noqa: RUF012 - one clock a program

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(time.perf_counter())

    torch.manual_seed(0)
    loaded = LlamaForCausalLM.from_pretrained(Path(model).parent, dtype=torch.float32, attn_implementation="sdpa")
    config = LoraConfig(
        r=8, lora_alpha=32, lora_dropout=0.05, target_modules=TARGETS, modules_to_save=["embed_tokens", "lm_head"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=scratch, max_steps=steps, per_device_train_batch_size=batch, learning_rate=1e-4, use_cpu=True,
        lr_scheduler_type="cosine", warmup_steps=2, save_strategy="no", report_to=[], disable_tqdm=True, seed=1,
        logging_steps=1000, remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(
        get_peft_model(loaded, config), arguments, train_dataset=samples, data_collator=collate, callbacks=[Clock()]
    )
    trainer.train()
    return [later - earlier for earlier, later in zip(Clock.times, Clock.times[1:])]


def our_training(kind: type, run: Callable[..., Any], scratch: str, steps: int, **options: Any) -> list[float]:
    """Tokens of documents a second in each step of ours, the first left out, of a whole stage as it is run."""
    import json

    from zhllama.artifacts.open import open_artifact
    from zhllama.stage.run import run_stage

    manifest = run_stage(
        kind(store=scratch, max_steps=steps, logging_steps=1, eval_steps=0, save_steps=0, deepspeed="none", **options),
        run,
    )
    lines = [json.loads(line) for line in open_artifact(manifest.reference).read("metrics.jsonl").splitlines()]
    return [line["tokens_per_second"] for line in lines if "tokens_per_second" in line][1:]


def middle(values: Sequence[float]) -> float:
    return float(statistics.median(values))
