"""What every stage publishes of the same small input stays: `goldens/stages.json`.

One chain of commands (`tests/stage_chain.py`), each reading what the one before wrote. Exact bytes where arithmetic is
exact; what comes of a training may differ between processors, and is held by names, sizes and whole numbers.
`UPDATE_GOLDENS=1 pytest tests/components/test_goldens.py` writes it again.
"""

import json
from contextlib import closing
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests import golden
from tests.components.generate_instructions.model_server import ModelServer
from tests.stage_chain import CHAIN, run_chain, unpacked

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("goldens of the stages")]

TRAINED = ("embeddings", "adapter", "merged", "meta", "gguf")
OF_THIS_RUN = ("metrics.jsonl", "report.html", "tensorboard/*", "card.json", "samples.json")
"""Times, and texts that a trained model wrote: they are there, and no two runs have the same."""
OF_FLOATS = ("model-*.safetensors", "adapter_model.safetensors", "*.pth", "*.gguf", "sha256sums.txt")
"""Of a trained model: as long each time."""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Name → what the chain published: its manifest, its folder."""
    place = unpacked(tmp_path_factory.mktemp("chain"))
    store = place / "fresh"
    with closing(ModelServer()) as server:
        manifests, references = run_chain(store, place / "uploads", server.url.removesuffix("/v1"))
    return {name: {"manifest": one, "folder": Path(references[name]).parent} for name, one in manifests.items()}


def shown(name: str, path: str, content: bytes) -> str:
    """What is held of a file."""
    report = path == "report.json" and name in ("merged", "evaluation")
    if report or any(fnmatch(path, pattern) for pattern in OF_THIS_RUN):
        return "there"
    if name in TRAINED and any(fnmatch(path, pattern) for pattern in OF_FLOATS):
        return f"{len(content)} bytes"
    return f"{len(content)} bytes, {sha256(content).hexdigest()}"


def keys(value: Any) -> Any:
    """The names of an object's fields, inner ones included; of lists those of the first."""
    if isinstance(value, dict):
        return {name: keys(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [keys(one) for one in value[:1]]
    return type(value).__name__ if value is None or isinstance(value, bool | str) else "number"


def whole_numbers(value: Any) -> Any:
    """What is left of an object without its texts and fractions: tokens, rows, steps."""
    if isinstance(value, dict):
        kept = {name: whole_numbers(inner) for name, inner in value.items()}
        return {name: inner for name, inner in kept.items() if inner not in (None, {}, [])}
    if isinstance(value, list):
        return [one for one in map(whole_numbers, value) if one not in (None, {}, [])]
    return value if isinstance(value, bool | int) else None


@pytest.mark.parametrize("name", CHAIN)
def test_a_stage_publishes_the_same_files(name, published):
    folder, manifest = published[name]["folder"], published[name]["manifest"]
    found = {
        # of one that says where something lies, what is without that
        one["path"]: one.get("content") or shown(name, one["path"], (folder / one["path"]).read_bytes())
        for one in manifest["files"]
    }
    golden.check(golden.GOLDENS / "stages.json", f"{name}: files", found)


@pytest.mark.parametrize("name", CHAIN)
def test_a_stage_states_the_same_facts(name, published):
    manifest = published[name]["manifest"]
    facts = {"kind": manifest["kind"], "vocabulary": manifest["vocabulary"], **whole_numbers(manifest["facts"])}
    golden.check(golden.GOLDENS / "stages.json", f"{name}: facts", facts)


@pytest.mark.parametrize("name", CHAIN)
def test_a_manifest_has_the_same_fields(name, published):
    golden.check(golden.GOLDENS / "stages.json", f"{name}: fields", keys(published[name]["manifest"]))


@pytest.mark.parametrize(("name", "file"), [("merged", "report.json"), ("evaluation", "report.json"),
                                            ("instructions", "card.json")])  # fmt: skip
def test_a_report_has_the_same_fields_and_counts(name, file, published):
    report = json.loads((published[name]["folder"] / file).read_text())
    counts = whole_numbers(report) if name != "evaluation" else {}
    golden.check(golden.GOLDENS / "stages.json", f"{name}: {file}", {"fields": keys(report), "counts": counts})


def test_the_evaluation_counts_the_same_tokens(published):
    """A ratio of counts, so it is exact: the tokenizer's work, not the model's."""
    report = json.loads((published["evaluation"]["folder"] / "report.json").read_text())
    told = {one["label"]: one["tokens_per_character"] for one in report["models"]}
    golden.check(golden.GOLDENS / "stages.json", "evaluation: tokens per character", told)


def test_exported_sums_are_those_of_the_files_beside_them(published):
    folder = published["meta"]["folder"]
    for line in (folder / "sha256sums.txt").read_text().splitlines():
        digest, name = line.split()
        assert sha256((folder / name).read_bytes()).hexdigest() == digest
