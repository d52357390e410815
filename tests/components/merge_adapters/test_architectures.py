"""Adapters of each architecture, made by peft itself: merged as peft merges them, to the bit, biases and norms kept;
and what is asked with them is what peft says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from components.merge_adapters.merger import merge_adapters
from components.merge_adapters.options import MergeAdapters
from tests.components.merge_adapters.conftest import load_base, randomise
from tests.small_models import KINDS, save
from zhllama.artifacts.open import open_artifact
from zhllama.inference.load import load_model
from zhllama.stage.run import run_stage


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_adapter_is_pefts_merge_to_the_bit(tmp_path: Path, kind: str, llama_tokenizer: bytes) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model, adapter = save(tmp_path / "model", kind, llama_tokenizer), tmp_path / "adapter"
    config: Any = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    beside = get_peft_model(load_base(model), config)
    randomise(beside, 7)
    beside.save_pretrained(adapter)
    given = MergeAdapters(store=str(tmp_path / "store"), model=str(model), adapters=str(adapter))
    manifest = run_stage(given, merge_adapters)

    right = dict(PeftModel.from_pretrained(load_base(model), adapter).merge_and_unload().state_dict())
    found: dict[str, torch.Tensor] = {}
    for path in Path(manifest.root).glob("*.safetensors"):
        found |= load_file(path)
    tied = KINDS[kind][1].get("tie_word_embeddings", False)
    assert found.keys() == right.keys() - ({"lm_head.weight"} if tied else set())
    assert all(torch.equal(tensor, right[name]) for name, tensor in found.items())

    ids = torch.arange(100, 160)[None]
    with torch.inference_mode():
        loaded = AutoModelForCausalLM.from_pretrained(manifest.root, dtype=torch.float32)(ids).logits
        wanted = beside.float().eval()(ids).logits
        asked = load_model(open_artifact(str(model)), [open_artifact(str(adapter))]).model(ids).logits
    # a merge in float16 is rounded, one in float32 is not
    assert float((loaded - wanted).norm() / wanted.norm()) < 5e-3
    torch.testing.assert_close(asked, wanted, rtol=1e-3, atol=1e-3)
    merged = Path(manifest.root)
    written, before = (json.loads((one / "config.json").read_text()) for one in (merged, model))
    for name in ("architectures", "sliding_window"):
        assert written.get(name) == before.get(name)
    title = KINDS[kind][0].replace("Llama", "LLaMA")
    assert f"A {title} model with 1 adapter" in (merged / "README.md").read_text()
