"""Merging an adapter as large as Chinese-LLaMA-Plus's (rank 64, embeddings and head) into models of 2 and 4 GB.

Beside it: a copy of the same files with the same digests (what the bytes alone cost), and peft's way (load, merge,
save). Wall and processor times are of the work, imports left out; every figure is of a program of its own, for the
smaller model the median of three. All find the model in the page cache. Ours and the copy end when their files are on
the disk (fsync); peft ends when the kernel has them, and another row says when they would be on the disk.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.bench.measure import Cost, Table, measured

ROWS = 32_000
RANK = 64
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SIZES = {"2.1 GB": (2048, 5504, 18), "4.0 GB, deeper": (2048, 5504, 37), "4.2 GB, wider": (4096, 11008, 9)}
"""Name → hidden size, feed-forward size, layers."""
PEFT = "peft: load, merge_and_unload, save"
ENVIRONMENT = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}


def run(scratch: Path) -> list[Table]:
    table = Table(
        "Merging one adapter (r 64, embeddings and head), folder to folder, float16",
        ("model", "way", "wall", "processor", "peak memory", "of a hashed copy"),
        note="Bars: at most 2 times a hashed copy of the same bytes, at least 3 times as fast as peft, under 1.5 GB of "
        "memory whatever the size (growth 0).",
    )
    ours: dict[str, Cost] = {}
    for name, (width, feed_forward, layers) in SIZES.items():
        folder = scratch / name.replace(" ", "-").replace(",", "")
        model, adapter = measured(make, str(folder), width, feed_forward, layers, environment=ENVIRONMENT).result
        ways = {
            "hashed copy": (copy, model, folder / "copied"),
            "ours": (merge, model, adapter, folder / "ours"),
        }
        if name == next(iter(SIZES)):
            ways[PEFT] = (merge_with_peft, model, adapter, folder / "peft")
        found = _in_turn(ways, 3 if PEFT in ways else 1)
        ours[name] = merged = found["ours"]
        if PEFT in ways:
            peer = found[PEFT]
            late = peer.result["on_disk"]
            found[f"{PEFT}, until it is on the disk"] = replace(peer, wall=late)
            same = measured(compare, merged.result["root"], str(folder / "peft"), environment=ENVIRONMENT).result
            table.note += (
                f" {peer.wall / merged.wall:.1f} times as fast as peft ({late / merged.wall:.1f} where both have it on "
                f"the disk), {same} of {same} tensors bit-equal."
            )
        for way, cost in found.items():
            figures = (f"{cost.wall:.1f} s", f"{cost.result['cpu']:.1f} s", f"{cost.peak_mb:,.0f} MB")
            table.rows.append((name, way, *figures, f"{cost.wall / found['hashed copy'].wall:.2f}"))
    small, deeper, wider = (cost.peak_mb for cost in ours.values())
    table.note += (
        f" The peak grew by {deeper - small:+.0f} MB where the model is twice as deep, and by {wider - small:+.0f} MB "
        "where it is twice as wide (the factors of the tensors under way are)."
    )
    return [table]


def _in_turn(ways: Mapping[str, tuple[Any, ...]], times: int) -> dict[str, Cost]:
    """What each way cost: of `times` rounds, in which each has its turn, the run of the median wall time."""
    found: dict[str, list[Cost]] = {way: [] for way in ways}
    for _ in range(times):
        for way, (function, model, *arguments) in ways.items():
            target = Path(arguments[-1])
            shutil.rmtree(target, ignore_errors=True)
            for folder in (Path(model).parent, *map(Path, arguments[:-1])):
                _into_the_cache(folder)
            found[way].append(measured(function, model, *map(str, arguments), environment=ENVIRONMENT))
    return {way: sorted(costs, key=lambda cost: cost.wall)[times // 2] for way, costs in found.items()}


def _into_the_cache(folder: Path) -> None:
    """Reads what is below a folder, if there is one."""
    room = bytearray(2**23)
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.readinto(room):
                    pass


# --- programs ---------------------------------------------------------------------------------------------------------


def make(folder: str, width: int, feed_forward: int, layers: int) -> tuple[str, str]:
    """A model as convert_weights lays it out, published, and an adapter for it: (reference, folder)."""
    import torch
    from safetensors.torch import save_file

    from zhllama.artifacts.writer import ArtifactWriter
    from zhllama.weights.safetensors_io import INDEX, SafetensorsStream, index_json

    torch.manual_seed(0)
    noise = (torch.randn(2**24) * 0.02).half()

    def values(shape: tuple[int, ...], index: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        repeats = -(-(count + index) // len(noise))
        return noise.repeat(repeats)[index : index + count].reshape(shape)

    out = ArtifactWriter(folder, "model", "key")
    where: dict[str, str] = {}
    total = 0
    for file, shapes in _files(width, feed_forward, layers):
        with out.writer(file) as sink:
            stream = SafetensorsStream(sink, {name: ("float16", shape) for name, shape in shapes.items()})
            for name, shape in shapes.items():
                stream.write(name, values(shape, len(where)))
                where[name] = file
                total += 2 * torch.Size(shape).numel()
            stream.close()
    out.add_bytes(INDEX, index_json(where, total))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": ROWS, "hidden_size": width,
        "intermediate_size": feed_forward, "num_hidden_layers": layers, "num_attention_heads": width // 128,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "tie_word_embeddings": False, "dtype": "float16",
    }  # fmt: skip
    out.add_json("config.json", config)
    model = out.publish("hf-model")

    adapter = Path(folder, "adapter")
    adapter.mkdir()
    tensors = {}
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"base_model.model.{name}.weight"] = values((ROWS, width), 12345)
    for _, shapes in _files(width, feed_forward, layers):
        for name, shape in shapes.items():
            if name.split(".")[-2] in PROJECTIONS:
                key = f"base_model.model.{name.removesuffix('.weight')}"
                tensors[f"{key}.lora_A.weight"] = values((RANK, shape[1]), 7)
                tensors[f"{key}.lora_B.weight"] = values((shape[0], RANK), 11)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": 0.0,
        "target_modules": list(PROJECTIONS), "modules_to_save": ["embed_tokens", "lm_head"], "bias": "none",
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return model.reference, str(adapter)


def _files(width: int, feed_forward: int, layers: int) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """File → tensors: the embeddings' own, then three layers to a file."""
    rows = (ROWS, width)
    yield "model-embeddings.safetensors", {"model.embed_tokens.weight": rows, "lm_head.weight": rows}
    for first in range(0, layers, 3):
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(first, min(first + 3, layers)):
            prefix = f"model.layers.{layer}"
            shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
            shapes |= {f"{prefix}.mlp.{name}_proj.weight": (feed_forward, width) for name in ("gate", "up")}
            shapes[f"{prefix}.mlp.down_proj.weight"] = (width, feed_forward)
            shapes |= {f"{prefix}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
        if first + 3 >= layers:
            shapes["model.norm.weight"] = (width,)
        yield f"model-{first // 3 + 1:05d}.safetensors", shapes


def copy(model: str, target: str) -> dict[str, float]:
    """Every file read against its digests and written with digests anew (`out.copy` would take over those it knows)."""
    from zhllama.artifacts.open import open_artifact
    from zhllama.artifacts.writer import ArtifactWriter

    artifact = open_artifact(model)
    begin, used = time.perf_counter(), time.process_time()
    out = ArtifactWriter(target, "copy", "key")
    for file in artifact.manifest.files:
        if file.path == artifact.manifest.blocks:
            continue
        with out.writer(file.path) as stream:
            artifact.pour(file.path, stream.write)
    out.publish("hf-model")
    return {"seconds": time.perf_counter() - begin, "cpu": time.process_time() - used}


def merge(model: str, adapter: str, store: str) -> dict[str, object]:
    import torch  # noqa: F401 - its import is no part of the figure, as it is none of the peer's

    from components.merge_adapters import proof, stream  # noqa: F401
    from components.merge_adapters.merger import merge_adapters
    from components.merge_adapters.options import MergeAdapters
    from zhllama.stage.run import run_stage

    begin, used = time.perf_counter(), time.process_time()
    manifest = run_stage(MergeAdapters(store=store, model=model, adapters=adapter), merge_adapters)
    return {"seconds": time.perf_counter() - begin, "cpu": time.process_time() - used, "root": manifest.root}


def merge_with_peft(model: str, adapter: str, target: str) -> dict[str, float]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    begin, used = time.perf_counter(), time.process_time()
    base = AutoModelForCausalLM.from_pretrained(Path(model).parent, dtype="auto")
    PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(target)
    ended, spent = time.perf_counter() - begin, time.process_time() - used
    for file in Path(target).iterdir():
        with open(file, "rb") as written:
            os.fsync(written)
    return {"seconds": ended, "cpu": spent, "on_disk": time.perf_counter() - begin}


def compare(ours: str, peft: str) -> int:
    """How many tensors both have; ValueError for one that differs."""
    import torch

    from zhllama.artifacts.open import open_artifact
    from zhllama.weights.safetensors_io import Checkpoint

    left, right = Checkpoint(open_artifact(ours)), Checkpoint(open_artifact(peft))
    for name in right.tensors:
        if not torch.equal(left.read(name), right.read(name)):
            raise ValueError(f"{name} differs")
    return len(right.tensors)
