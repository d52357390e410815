"""The models that are exported: a tiny one to be changed, and one that has learnt a little, wide enough for k-quants,
so that what its GGUF says can be held against transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from zhllama.artifacts.open import open_artifact
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder

STEPS = 60


@pytest.fixture
def model(tmp_path: Path, tiny_model: str) -> Path:
    """A copy of the tiny model's folder that a test may change, without its manifest."""
    folder = shutil.copytree(Path(tiny_model).parent, tmp_path / "model")
    (folder / "manifest.json").unlink()
    return folder


def configure(model: Path, **changes: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="session")
def trained_model(
    tmp_path_factory: pytest.TempPathFactory, extended_model: str, chinese_text: list[str], english_text: list[str]
) -> Path:
    """A plain folder: 256 wide, 2 layers, 4 heads on 2 key-value heads, the extended vocabulary, float16; trained for
    some seconds, so that its logits have clear winners."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = open_artifact(extended_model).read("tokenizer.model")
    encoder = SentencePieceEncoder(tokenizer)
    torch.manual_seed(256)
    config = LlamaConfig(
        vocab_size=encoder.size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-6,
        bos_token_id=encoder.bos,
        eos_token_id=encoder.eos,
        pad_token_id=encoder.pad,
    )
    model = LlamaForCausalLM(config)
    learner: Any = torch.optim.AdamW(model.parameters(), lr=3e-3)
    lines = [[encoder.bos, *encoder.encode(line)][:24] for line in chinese_text + english_text[:600]]
    lines = [line for line in lines if len(line) == 24]
    for step in range(STEPS):
        batch = torch.tensor([lines[(step * 16 + row) % len(lines)] for row in range(16)])
        model(batch, labels=batch).loss.backward()
        learner.step()
        learner.zero_grad()
    folder = tmp_path_factory.mktemp("trained")
    model.half().save_pretrained(folder)
    for name, content in SentencePieceEncoder(tokenizer).files(256).items():
        (folder / name).write_bytes(content)
    return folder
