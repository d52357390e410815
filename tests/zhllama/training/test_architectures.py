"""Each architecture as it is trained: packed documents are learnt as transformers' own class learns each alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small_models import KINDS, save
from zhllama.artifacts.open import open_artifact
from zhllama.models import architecture
from zhllama.training.inputs import LoraShape
from zhllama.training.model import add_lora, load_base, trainable

LENGTHS = (60, 40, 28)
"""Of the documents of a block: longer than the window that one of the models has."""


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path, llama_tokenizer: bytes) -> Path:
    return save(tmp_path / "model", request.param, llama_tokenizer)


def block() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 800, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(5))
    labels, begin = torch.full_like(ids, -100), 0
    for length in LENGTHS:
        labels[:, begin : begin + length - 1] = ids[:, begin + 1 : begin + length]
        begin += length
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def losses_alone(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Mean over all labels, each document given by itself to transformers' own class."""
    total, begin = torch.zeros(()), 0
    for length in LENGTHS:
        own = ids[:, begin : begin + length]
        total = total + model(input_ids=own, labels=own).loss * (length - 1)
        begin += length
    return total / (sum(LENGTHS) - len(LENGTHS))


def randomise(model: torch.nn.Module) -> None:
    chance = torch.Generator().manual_seed(6)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=chance) * 0.1


def test_a_block_is_learnt_as_its_documents_alone_with_and_without_lora(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    given, plain = block(), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = load_base(open_artifact(str(folder)), torch.float32).train()
    torch.testing.assert_close(ours(**given).loss, losses_alone(plain, given["input_ids"]), rtol=1e-5, atol=1e-5)

    config: Any = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    modules = architecture(ours.config.to_dict(), "here").lora_modules
    adapted = add_lora(ours, LoraShape(4, 8, 0.0, list(modules))).train()
    beside = get_peft_model(plain, config).train()
    for one in (adapted, beside):
        randomise(one)
    ours_lost, theirs = adapted(**given).loss, losses_alone(beside, given["input_ids"])
    torch.testing.assert_close(ours_lost, theirs, rtol=1e-5, atol=1e-5)
    ours_lost.backward()
    theirs.backward()
    gradients = {name: one.grad for name, one in beside.named_parameters() if one.requires_grad}
    found = {name: one.grad for name, one in trainable(adapted).items()}
    assert found.keys() == gradients.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-3, atol=1e-5)
