"""Proof of a merge: the model with its adapters beside it, and the merged model, asked the same prompts.

The last adapter stays apart, as peft runs it; peft merges those before it. Both compute in float32, one after the
other, so what differs is the rounding of the merged weights: on a small float16 model, 0.03% of the logits' length.
"""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from components.merge_adapters.lora import Adapter
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.reader import Artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.progress import human
from zhllama.tokenizer.vocabulary import Encoder
from zhllama.weights.safetensors_io import Checkpoint

PROMPTS = (
    "中国的首都是",
    "请用三句话介绍一下长江。",
    "这家酒店的房间干净，服务热情，",
    "The capital of France is",
    "Once upon a time there was a small village by the sea,",
    "def add(a, b):\n    return",
)
LIMIT = 0.05
"""‖difference‖ / ‖logits‖ beyond which the merge is wrong: bfloat16 models stay below a fifth of it."""


def require_memory(checkpoint: Checkpoint) -> None:
    """InputError when this machine has not the memory for the model in float32."""
    need = 4 * sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    free = available_memory()
    if need * 1.5 > free:
        raise InputError(
            f"--prove: the model needs {human(need * 1.5, 'B')} of memory in float32 and {human(free, 'B')} are free; "
            "leave --prove out, or merge on a larger machine"
        )


def available_memory() -> int:
    """Bytes that this process may still take: of the machine, or of its container where that has a limit."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free


def prove(model: Artifact, adapters: Sequence[Adapter], out: ArtifactWriter, encoder: Encoder) -> dict[str, Any]:
    """Compares logits(model + adapters) with logits(what `out` has written) and returns the figures for the report.
    RuntimeError when they differ by more than rounding can explain: then the merge is wrong, and nothing is
    published."""
    prompts = [torch.tensor([[encoder.bos, *encoder.encode(text)]]) for text in PROMPTS]
    with tempfile.TemporaryDirectory(prefix="zhllama-") as folder:
        beside = _logits(_with_adapters(model, adapters, encoder.size, Path(folder)), prompts)
        merged = _logits(_load(open_artifact(out.root).fetch(Path(folder, "merged"))), prompts)
    width = min(beside.shape[1], merged.shape[1])
    beside, merged = beside[:, :width], merged[:, :width]
    found = {
        "prompts": len(prompts),
        "positions": len(beside),
        "relative_difference": float((merged - beside).norm() / beside.norm()),
        "greatest_difference": float((merged - beside).abs().max()),
        "same_next_token": float((merged.argmax(-1) == beside.argmax(-1)).double().mean()),
    }
    if not found["relative_difference"] < LIMIT:
        raise RuntimeError(
            f"the merged model is not the model with its adapters: logits differ by {found['relative_difference']:.1%}"
        )
    return found


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _with_adapters(model: Artifact, adapters: Sequence[Adapter], pieces: int, scratch: Path) -> Any:
    from peft import PeftModel

    loaded = _load(model.fetch(scratch / "model"))
    for index, adapter in enumerate(adapters):
        rows = next((adapter.stored[key].shape[0] for key in adapter.replaced.values()), pieces)
        if adapter.replaced and rows != loaded.get_input_embeddings().weight.shape[0]:
            # modules_to_save overwrite every row: how the new ones begin does not matter
            loaded.resize_token_embeddings(rows, mean_resizing=False)
        loaded = PeftModel.from_pretrained(loaded, str(adapter.artifact.fetch(scratch / f"adapter-{index}")))
        if index + 1 < len(adapters):
            loaded = loaded.merge_and_unload()
    return loaded


def _logits(model: Any, prompts: Sequence[torch.Tensor]) -> torch.Tensor:
    """(positions of all prompts, rows of the head)"""
    model.eval()
    with torch.inference_mode():
        return torch.cat([model(ids).logits[0] for ids in prompts])
