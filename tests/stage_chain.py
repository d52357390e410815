"""Every stage that a laptop can run, one after the other, by its command: each reads what the ones before published.

Nothing here knows the library below the stages, so that it holds while code moves. What goes in lies in
`fixtures/store-0.1.tar.gz` (`uploads/`), as bytes: no library's next version changes it.
"""

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RELEASE = ROOT / "tests" / "fixtures" / "store-0.1.tar.gz"
WRITER = "http://writer.example/v1"
"""The address of the model that writes instructions: the answers belong to it. It is reached by HTTP_PROXY."""

TRAINING = {"deepspeed": "none", "precision": "float32", "per_device_train_batch_size": "4", "logging_steps": "10"}
CHAIN: dict[str, tuple[str, dict[str, str]]] = {
    "tokenizer": ("train_tokenizer", {"text": "{uploads}/text", "vocab_size": "640"}),
    "weights": ("fetch_weights", {"source": "{uploads}/llama"}),
    "model": ("convert_weights", {"weights": "{weights}"}),
    "extended": ("extend_tokenizer", {"model": "{model}", "chinese_tokenizer": "{tokenizer}"}),
    "text": (
        "prepare_dataset",
        {"tokenizer": "{extended}", "text": "{uploads}/text", "block_size": "128", "validation_fraction": "0.1"},
    ),
    "items": (
        "prepare_dataset",
        {"tokenizer": "{extended}", "instructions": "{uploads}/items", "block_size": "256",
         "validation_fraction": "0.1"},
    ),
    "faithful": (
        "prepare_dataset",
        {"tokenizer": "{extended}", "text": "{uploads}/text", "block_size": "64", "packing": "faithful",
         "validation_fraction": "0.1"},
    ),
    "embeddings": (
        "pretrain",
        {"stage": "embeddings", "model": "{extended}", "dataset": "{text}", "max_steps": "4", "save_steps": "0",
         **TRAINING},
    ),
    "adapter": (
        "finetune",
        {"model": "{embeddings}", "dataset": "{items}", "max_steps": "4", "save_steps": "0", **TRAINING},
    ),
    "merged": ("merge_adapters", {"model": "{embeddings}", "adapters": "{adapter}"}),
    "meta": ("export_model", {"model": "{merged}", "format": "meta", "shards": "2"}),
    "gguf": ("export_model", {"model": "{merged}", "format": "gguf", "quantization": "f16,q8_0"}),
    "samples": (
        "generate", {"model": "{merged}", "prompt": "你好吗？", "max_new_tokens": "8", "do_sample": "false"},
    ),
    "evaluation": (
        "evaluate",
        {"model": "{merged}", "baseline": "{extended}", "text": "{text}", "instructions": "{items}",
         "max_prompts": "1", "samples": "1", "max_bytes": "4000", "max_items": "8"},
    ),
    "instructions": (
        "generate_instructions",
        {"items": "20", "base_url": WRITER, "model": "writer", "per_request": "5", "answer_tokens": "2000",
         "concurrency": "1"},
    ),
}  # fmt: skip
"""Name of what is made → the stage and its options; {name} is the reference of what was made before."""
RUNNING = {
    "stage": "embeddings", "model": "{extended}", "dataset": "{text}", "max_steps": "120", "save_steps": "20",
    **TRAINING,
}  # fmt: skip
"""A training (pretrain) that is killed on its way."""
WRITING = CHAIN["instructions"][1] | {"seed": "7"}
"""Instructions (generate_instructions) that are killed on their way."""


def unpacked(folder: Path) -> Path:
    """The fixture of the release, below a folder: `uploads/`, `store/`, `asked.json`.

    As if that release had worked here: its manifests name their place, outside their digests, and this is another one.
    """
    with tarfile.open(RELEASE) as archive:
        archive.extractall(folder, filter="data")
    moved(folder, "/release-0.1", str(folder))
    return folder


def moved(folder: Path, there: str, here: str) -> None:
    """Names another place in every manifest below the folder."""
    for path in folder.rglob("manifest.json"):
        path.write_text(path.read_text().replace(f'"{there}/', f'"{here}/'))


def words(name: str, options: Mapping[str, str], store: Path, made: Mapping[str, str]) -> list[str]:
    """The stage's command line."""
    told = {"store": str(store), **{key: text.format_map(made) for key, text in options.items()}}
    pairs = [word for key, text in told.items() for word in (f"--{key.replace('_', '-')}", text)]
    return [sys.executable, "-m", f"components.{name}", *pairs]


def environment(folder: Path, proxy: str = "") -> dict[str, str]:
    """With a cache below the folder, and nothing of the tester's own that would change a result."""
    dropped = (
        "ZHLLAMA_",
        "PET_",
        "OPENAI_",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
        "all_proxy",
        "NO_PROXY",
        "no_proxy",
    )
    kept = {name: text for name, text in os.environ.items() if not name.startswith(dropped)}
    kept |= {"PYTHONPATH": str(ROOT), "ZHLLAMA_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    kept |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    return kept | ({"HTTP_PROXY": proxy, "http_proxy": proxy, "OPENAI_API_KEY": "sk-golden"} if proxy else {})


def run(
    name: str, options: Mapping[str, str], store: Path, made: Mapping[str, str], proxy: str = ""
) -> tuple[dict[str, Any], str]:
    """Runs a stage. Its manifest and provenance, as they lie in the store, in one, and what it said."""
    reference = store.parent / f"{name}.reference"
    command = [*words(name, options, store, made), "--reference", str(reference)]
    done = subprocess.run(
        command, env=environment(store.parent, proxy), cwd=store.parent, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
    return published(Path(reference.read_text())), done.stdout + done.stderr


def published(manifest: Path) -> dict[str, Any]:
    """A manifest, with what is said beside it."""
    found, beside = (
        json.loads(manifest.read_text(encoding="utf-8")),
        json.loads(manifest.with_name("provenance.json").read_text()),
    )
    assert beside.pop("digest") == found["digest"]
    for name in ("facts", "configuration"):
        found[name] |= beside.pop(name)
    found["files"] = sorted([*found["files"], *beside.pop("files")], key=lambda file: file["path"])
    for name, reference in beside.pop("inputs").items():
        found["inputs"][name]["reference"] = reference
    return found | beside


def run_chain(store: Path, uploads: Path, proxy: str) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Name → the manifest of what was made, and its reference."""
    made, manifests = {"uploads": str(uploads)}, {}
    for name, (stage, options) in CHAIN.items():
        manifests[name], _ = run(stage, options, store, made, proxy if stage == "generate_instructions" else "")
        made[name] = (store.parent / f"{stage}.reference").read_text()
    return manifests, made
