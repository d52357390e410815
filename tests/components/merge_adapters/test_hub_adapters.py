"""Adapters straight from the Hugging Face Hub: by range, nothing kept here. A program for each, since the hub's library
reads its settings when it is imported."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from components.merge_adapters.merger import merge_adapters
from components.merge_adapters.options import MergeAdapters
from tests.components.fetch_weights.conftest import FolderServer, _HubHandler, _serving
from zhllama.artifacts.open import open_artifact
from zhllama.stage.run import run_stage


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FolderServer]:
    """A hub whose repositories are the folders `tmp_path / "hub" / owner / name`."""
    server = FolderServer(tmp_path / "hub")
    server.RequestHandlerClass = _HubHandler
    yield from _serving(server)


def merge(tmp_path: Path, hub: FolderServer, model: str, adapters: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "components.merge_adapters", "--store", "store", "--model", model]
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    return subprocess.run(
        [*command, "--adapters", adapters, "--reference", "ref"],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_an_adapter_of_the_hub_merges_as_the_same_folder_does(tmp_path, hub, tiny_model, make_adapter, kind):
    folder = shutil.copytree(make_adapter(1), hub.folder / "someone" / "adapter")
    options = MergeAdapters(store=str(tmp_path / "here"), model=tiny_model, adapters=str(folder))
    wanted = run_stage(options, merge_adapters).facts["weights_digest"]
    if kind == "bin":
        torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
        (folder / "adapter_model.safetensors").unlink()
    ended = merge(tmp_path, hub, tiny_model, "someone/adapter" if kind == "bin" else "hf://someone/adapter")
    assert ended.returncode == 0, ended.stderr
    manifest = open_artifact((tmp_path / "ref").read_text()).manifest
    assert manifest.facts["weights_digest"] == wanted
    assert manifest.inputs["adapters"].reference == f"hf://someone/adapter@{_HubHandler.COMMIT}"
    assert not list((tmp_path / "home").rglob("adapter_model*"))


def test_a_repository_that_is_not_there_ends_with_2_and_one_line(tmp_path, hub, tiny_model):
    (hub.folder / "someone").mkdir(parents=True)
    ended = merge(tmp_path, hub, tiny_model, "someone/nothing")
    assert ended.returncode == 2
    assert "no such folder here, and no such repository" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
