"""A training in this process whose data turns hostile in the middle: what is learned there contradicts what the model
knows. The model knows one language (ids 3 to 33, of each the few that may follow), is taught another (34 to 64), and
then that of the first all is otherwise."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM

from tests.folders import add_folder
from tests.packed_data import Segment, blocks_of
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.data.packed import KIND, TRAIN, VALIDATION, PackedDataset, PackedWriter, packed_facts
from zhllama.training.checkpoints import Run
from zhllama.training.inputs import TrainingInputs
from zhllama.training.model import collate, packed, trained_model
from zhllama.training.options import PretrainOptions
from zhllama.training.replay import Replayed
from zhllama.training.trainer import PackedTrainer, train, training_arguments

BLOCK, PIECES, STEPS, BATCH = 32, 65, 48, 8
KNOWN, TAUGHT = (3, 34), (34, 65)


def sentences(ids: tuple[int, int], seed: int, count: int, chance: np.random.Generator) -> Iterator[np.ndarray]:
    """Blocks of a language: after each id, one of three that the seed decides."""
    first, last = ids
    follow = np.random.default_rng(seed).integers(first, last, (last, 3))
    for _ in range(count):
        found = [int(chance.integers(first, last))]
        while len(found) < BLOCK:
            found.append(int(follow[found[-1], chance.integers(3)]))
        yield np.array(found)


def dataset(store: str, name: str, blocks: list[np.ndarray], held_out: list[np.ndarray]) -> str:
    out = ArtifactWriter(store, "prepare_dataset", name)
    made = []
    for split, some in ((TRAIN, blocks), (VALIDATION, held_out)):
        with PackedWriter(out, split, BLOCK, PIECES, 0, prompts=False) as writer:
            for block in some:
                writer.write_blocks(blocks_of([Segment(block)]))
        made.append(writer)
    out.facts = packed_facts(BLOCK, PIECES, 0, made)
    return out.publish(KIND).reference


@dataclass(frozen=True)
class Course:
    """References of a model that knows the first language, of text in it, and of what it is to learn."""

    model: str
    replay: str
    dataset: str

    def run(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Mapping[str, float]]:
        """The lines of the evaluations. The data is read in its order."""
        monkeypatch.setattr(PackedTrainer, "_get_train_sampler", lambda one, *_: SequentialSampler(one.train_dataset))
        monkeypatch.setenv("ZHLLAMA_CACHE", str(folder / "cache"))
        given = {"store": str(folder), "model": self.model, "dataset": self.dataset, "replay": self.replay}
        told = PretrainOptions(
            **given, stage="lora", deepspeed="none", max_steps=STEPS, eval_steps=2, save_steps=0, learning_rate=2e-3,
            lr_scheduler_type="constant", per_device_train_batch_size=BATCH, lora_dropout=0.0, **options,
        )  # fmt: skip
        model, replay, data = (open_artifact(one) for one in (self.model, self.replay, self.dataset))
        unused: Any = None
        inputs = TrainingInputs(model, data, None, unused, replay)
        blocks, replayed = PackedDataset(data), Replayed.of(replay, None)
        assert replayed.held_out is not None
        arguments = training_arguments(told, folder / "work", len(blocks), evaluated=True)
        torch.manual_seed(42)
        run = Run(str(folder), "pretrain", "key", {}, {}, options=told)
        held_out = {"eval_replay": replayed.held_out}
        trained = trained_model(told, inputs, torch.float32)
        history, _ = train(told, arguments, trained, blocks, held_out, run, None, replayed)
        return [line for line in history.lines if "eval_replay_loss" in line]


def made(store: str) -> Course:
    """The model is trained here, a second or two."""
    chance = np.random.default_rng(0)
    known = list(sentences(KNOWN, 1, 700, chance))
    kind = LlamaConfig(
        vocab_size=PIECES, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=BLOCK, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = packed("LlamaForCausalLM")(kind)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for start in range(0, 600, 8):
        blocks = [
            {"input_ids": ids, "labels": np.r_[-100, ids[1:]], "position_ids": np.arange(BLOCK)}
            for ids in known[start : start + 8]
        ]
        batch = collate(blocks)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    out = ArtifactWriter(store, "convert_weights", "known")
    with TemporaryDirectory() as folder:
        LlamaForCausalLM.save_pretrained(model, folder)
        add_folder(out, Path(folder))
    taught = list(sentences(TAUGHT, 2, STEPS * BATCH // 2, chance))
    hostile = list(sentences(KNOWN, 3, STEPS * BATCH // 2, chance))
    return Course(
        out.publish("hf-model").reference,
        dataset(store, "replay", known[:600], known[600:660]),
        dataset(store, "taught", taught + hostile, taught[:4]),
    )
