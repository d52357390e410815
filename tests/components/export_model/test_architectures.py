"""A small random model of each architecture as GGUF: llama.cpp computes what transformers' own class computes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from components.export_model.exporter import export_model
from components.export_model.options import ExportModel
from components.serve.check import check_gguf
from tests.components.export_model.test_gguf import export, logits, metadata, rows_of
from tests.small_models import KINDS, save
from zhllama.errors import InputError
from zhllama.stage.run import run_stage

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make gguf")
pytestmark = pytest.mark.gguf

NAMES = {"qwen2": "qwen2", "qwen3": "qwen3"}
"""Those that llama.cpp has by another name than LLaMA's."""
FURTHER: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in KINDS},
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
                                                  "original_max_position_embeddings": 64}}),
    "qwen3, linear": ("qwen3", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}}),
    "qwen3, heads alone": ("qwen3", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", FURTHER)
def test_llama_cpp_computes_what_transformers_computes(tmp_path: Path, name: str, llama_tokenizer: bytes) -> None:
    from transformers import AutoModelForCausalLM

    kind, changes = FURTHER[name]
    folder = save(tmp_path / "model", kind, llama_tokenizer, **changes)
    path = Path(export(tmp_path / "store", folder, "f32").root, "model-f32.gguf")
    found = metadata(path)
    assert found["general.architecture"] == NAMES.get(kind, "llama")
    # llama.cpp knows no window of Mistral's: the file says as many positions as it has
    positions = 24 if kind == "mistral" else 256
    assert found[f"{found['general.architecture']}.context_length"] == positions
    _, served, _ = check_gguf(path, None, "--model m.gguf")
    assert served == positions
    ids = torch.randint(3, 800, (min(positions, 200),), generator=torch.Generator().manual_seed(1)).tolist()
    (computed,) = logits(path, [ids])
    with torch.inference_mode():
        right = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    # llama.cpp keeps keys and values in float16; a bias, a norm or a rope that is lost is 10% off
    assert float((computed - right).norm() / right.norm()) < 1e-3
    # random logits nearly tie here and there
    assert (computed.argmax(-1) == right.argmax(-1)).float().mean() > 0.98


def test_llama3s_frequencies_are_transformers_own(tmp_path: Path, llama_tokenizer: bytes) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from tests.small_models import LLAMA3, config_of

    folder = save(tmp_path / "model", "llama3", llama_tokenizer)
    manifest = export(tmp_path / "store", folder, "f16")
    factors = rows_of(Path(manifest.root, "model-f16.gguf"), "rope_freqs.weight")
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config_of("llama3"), torch.device("cpu"))
    plain = 1.0 / (LLAMA3["rope_theta"] ** (torch.arange(0, 16, 2) / 16))
    torch.testing.assert_close(factors, plain / stretched, rtol=1e-5, atol=0)
    assert len(set(factors.tolist())) > 2
    assert factors.max() == LLAMA3["factor"]


@pytest.mark.parametrize("kind", ["mistral-v0.3", "qwen2", "qwen3"])
def test_metas_format_is_llamas_alone(tmp_path: Path, kind: str, llama_tokenizer: bytes) -> None:
    folder = save(tmp_path / "model", kind, llama_tokenizer)
    with pytest.raises(InputError, match=rf"a {KINDS[kind][0]} model, and Meta's format holds LLaMA models alone"):
        run_stage(ExportModel(store=str(tmp_path / "store"), model=str(folder)), export_model)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_a_rope_that_llama_cpp_has_not_for_it_is_refused(tmp_path: Path, kind: str, llama_tokenizer: bytes) -> None:
    from tests.small_models import LLAMA3

    folder = save(tmp_path / "model", kind, llama_tokenizer, rope_parameters=LLAMA3)
    with pytest.raises(InputError, match=r"\(llama3\), which is not exported to GGUF"):
        export(tmp_path / "store", folder)
