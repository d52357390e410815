"""Proof of a merge: the model with its adapters beside it, and the merged model, asked the same prompts.

The last adapter stays apart, as peft runs it; peft merges those before it. Both compute in float32, one after the
other, so what differs is the rounding of the merged weights: on a small float16 model, 0.03% of the logits' length.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.reader import Artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.inference.adapters import merge_into
from zhllama.models.architecture import EMBEDDING, HEAD
from zhllama.progress import human
from zhllama.storage.private import temporary_folder
from zhllama.tokenizer.vocabulary import Encoder
from zhllama.weights.adapter import Adapter, towards
from zhllama.weights.model_folder import lay_out
from zhllama.weights.safetensors_io import Checkpoint
from zhllama.weights.ties import is_tied, stays_tied

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
    InputError when they differ by more than rounding can explain: then the merge is wrong, nothing is published, and
    trying again would give the same."""
    prompts = [torch.tensor([[*encoder.begin, *encoder.encode(text)]]) for text in PROMPTS]
    with temporary_folder() as folder:
        beside = _logits(_with_adapters(model, adapters, encoder.size, Path(folder)), prompts)
        merged = _logits(_load(open_artifact(out.root), Path(folder, "merged")), prompts)
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
        name, by = _most_different(model, adapters, out, encoder.size)
        raise InputError(
            "--prove: the merged model is not the model with its adapters: logits differ by "
            f"{found['relative_difference']:.1%}, and of the tensors most {name}, by {by:.1%} of peft's; "
            "merge these adapters with peft, and report it"
        )
    return found


def _most_different(
    model: Artifact, adapters: Sequence[Adapter], out: ArtifactWriter, pieces: int
) -> tuple[str, float]:
    """The tensor that is furthest from peft's, and by how much of its length."""
    checkpoint = Checkpoint(open_artifact(out.root))
    with temporary_folder() as folder:
        wanted = _with_adapters(model, adapters, pieces, Path(folder)).merge_and_unload().state_dict()
    found = {}
    for name in checkpoint.tensors.keys() & wanted.keys():
        has, right = checkpoint.read(name).float(), wanted[name].float()
        same = has.shape == right.shape
        found[name] = float((has - right).norm() / right.norm().clamp_min(1e-30)) if same else math.inf
    name = max(found, key=found.__getitem__)
    return name, found[name]


def _load(model: Artifact, folder: Path) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    folder.mkdir()
    checkpoint = Checkpoint(model)
    loaded = AutoModelForCausalLM.from_pretrained(lay_out(checkpoint, folder), dtype=torch.float32)
    if is_tied(checkpoint):
        loaded.tie_weights()
    return loaded


def _with_adapters(model: Artifact, adapters: Sequence[Adapter], pieces: int, scratch: Path) -> Any:
    loaded = _load(model, scratch / "model")
    # opened anew: in those that are merged stands already what becomes of tied embeddings
    for index, adapter in enumerate(Adapter(one.artifact, "--adapters", one.scale) for one in adapters):
        had, key = loaded.get_input_embeddings().weight.shape[0], adapter.replaced.get(EMBEDDING)
        rows = pieces if key is None else adapter.stored[key].shape[0]
        last = index + 1 == len(adapters)
        if not last and loaded.lm_head.weight is loaded.model.embed_tokens.weight:
            # peft's merge of LoRA on one use of the table changes the other
            merge_into(loaded, adapter, rows, stays_tied(adapter))
            continue
        if key is not None and rows != had:
            # what comes with the adapter overwrites every row: how the new ones begin does not matter
            loaded.resize_token_embeddings(rows, mean_resizing=False)
        loaded = _by_peft(loaded, adapter, had)
        if not last:
            loaded = loaded.merge_and_unload()
    return loaded


def _by_peft(model: Any, adapter: Adapter, had: int) -> Any:
    """peft's model of an adapter, its tensors by the names that peft knows. had: the rows of the tables without those
    that the adapter brings. RuntimeError for a tensor that peft does not know."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    tensors = {name: adapter.read(key) for name, key in adapter.peft_keys()}
    if adapter.scale != 1:
        # peft scales LoRA alone
        places = {key: name for name, key in adapter.peft_keys()}
        for weight, key in adapter.replaced.items():
            before, trained = model.get_parameter(weight).detach(), tensors[places[key]].float()
            known = had if weight in (EMBEDDING, HEAD) else len(before)
            tensors[places[key]] = torch.cat([towards(before[:known], trained[:known], adapter.scale), trained[known:]])
        for weight, (key, rows) in adapter.tokens.items():
            before = model.get_parameter(weight).detach()[list(rows)]
            tensors[places[key]] = towards(before, tensors[places[key]], adapter.scale)
    adapted = get_peft_model(model, LoraConfig(**adapter.config.for_peft()))
    result: Any = set_peft_model_state_dict(adapted, tensors)
    if result.unexpected_keys:
        raise RuntimeError(f"{adapter.where}: peft has no place for {result.unexpected_keys[0]}")
    for layer in adapted.modules() if adapter.scale != 1 else ():
        if isinstance(layer, LoraLayer):
            # its scale_layer passes over embeddings
            layer.scaling = {name: scaling * adapter.scale for name, scaling in layer.scaling.items()}
    return adapted


def _logits(model: Any, prompts: Sequence[torch.Tensor]) -> torch.Tensor:
    """(positions of all prompts, rows of the head)"""
    model.eval()
    with torch.inference_mode():
        return torch.cat([model(ids).logits[0] for ids in prompts])
