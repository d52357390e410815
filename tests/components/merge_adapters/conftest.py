"""Adapters made by peft itself for the tiny model, with random factors, and what peft makes of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="session")
def tiny_folder(tiny_model: str) -> Path:
    return Path(tiny_model).parent


@pytest.fixture(scope="session")
def longer_tokenizer(llama_tokenizer: bytes) -> bytes:
    """The tiny model's tokenizer and one piece more, as Chinese-Alpaca adds `[PAD]` to Chinese-LLaMA."""
    from zhllama.tokenizer.sentencepiece_model import parse_model

    proto = parse_model(llama_tokenizer)
    proto.pieces.add(piece="[PAD]", score=0.0)
    return bytes(proto.SerializeToString())


def load_base(folder: Path, rows: int | None = None) -> Any:
    """The model in its stored float16, its embeddings resized to `rows` as peft's users do it."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder)
    if rows is not None:
        base.resize_token_embeddings(rows, mean_resizing=False)
    return base


def randomise(model: Any, seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name or "trainable_tokens_delta" in name:
            made = torch.randn(parameter.shape, generator=chance) * 0.05
            parameter.data = made.to(parameter.dtype)


@pytest.fixture(scope="session")
def make_adapter(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Callable[..., Path]:
    """`make_adapter(seed, rows=None, tokenizer=None, **LoraConfig)` → a folder as `save_pretrained` writes it."""
    from peft import LoraConfig, get_peft_model

    def make(seed: int, rows: int | None = None, tokenizer: bytes | None = None, **changes: Any) -> Path:
        options = {"r": 8, "lora_alpha": 32, "target_modules": PROJECTIONS, "task_type": "CAUSAL_LM", **changes}
        model = get_peft_model(load_base(tiny_folder, rows), LoraConfig(**options))
        randomise(model, seed)
        folder = tmp_path_factory.mktemp(f"adapter-{seed}")
        model.save_pretrained(folder)
        if tokenizer is not None:
            (folder / "tokenizer.model").write_bytes(tokenizer)
        return folder

    return make


@pytest.fixture(scope="session")
def merged_by_peft(tiny_folder: Path) -> Callable[..., dict[str, torch.Tensor]]:
    """`merged_by_peft([folder, …], rows=[…])` → the state dict after merge_and_unload of each, one after another."""
    from peft import PeftModel

    def merge(folders: list[Path], rows: list[int | None] | None = None) -> dict[str, torch.Tensor]:
        model = load_base(tiny_folder)
        for folder, wanted in zip(folders, rows or [None] * len(folders)):
            if wanted is not None:
                model.resize_token_embeddings(wanted, mean_resizing=False)
            model = PeftModel.from_pretrained(model, folder).merge_and_unload()
        return dict(model.state_dict())

    return merge
