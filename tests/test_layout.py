"""What a stage is, and what stays light. Who may import whom is held by import-linter (pyproject.toml)."""

import importlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kfp.dsl.container_component_class import ContainerComponent

from zhllama.stage.images import image

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "transformers", "deepspeed", "datasets", "peft", "accelerate"}
STAGES = sorted(path.parent.name for path in (ROOT / "components").glob("*/__init__.py"))


# --- what a stage is --------------------------------------------------------------------------------------------------


def test_every_stage_of_the_design_is_here():
    assert STAGES == [
        "convert_weights", "evaluate", "export_model", "extend_tokenizer", "fetch_weights", "finetune", "generate",
        "generate_instructions", "launch_training", "merge_adapters", "merge_models", "prepare_dataset", "pretrain",
        "serve", "train_tokenizer",
    ]  # fmt: skip


def test_every_stage_says_what_goes_in_and_what_comes_out():
    said = {stage: importlib.import_module(f"components.{stage}").__doc__ or "" for stage in STAGES}
    assert not [stage for stage, text in said.items() if "In:" not in text or "Out:" not in text]


def test_every_stage_has_an_image():
    assert sorted(path.parent.name for path in (ROOT / "images").glob("*/Dockerfile")) == sorted([*STAGES, "base"])


def test_every_stages_components_run_its_own_command_in_its_own_image():
    for stage in STAGES:
        module = importlib.import_module(f"components.{stage}.component")
        found = {name: one for name, one in vars(module).items() if isinstance(one, ContainerComponent)}
        assert stage in found
        for name, component in found.items():
            container = component.component_spec.implementation.container
            assert container.image == image(stage), name
            python, option, command = container.command
            assert (python, option) == ("python", "-m"), name
            # a stage's second command is a module of it
            assert command == f"components.{stage}" or command.startswith(f"components.{stage}."), name


# --- light at import --------------------------------------------------------------------------------------------------


def imports_of(command: list[str], cwd: Path) -> set[str]:
    """The top-level packages that a command really imports, as the interpreter itself reports them."""
    command = [sys.executable, "-X", "importtime", *command]
    environment = {"PYTHONPATH": str(ROOT), "HOME": str(cwd)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}


def test_no_stages_help_loads_anything_heavy_or_kfp(tmp_path):
    commands = [["-m", f"components.{stage}", "--help"] for stage in STAGES]
    with ThreadPoolExecutor(2) as threads:
        found = dict(zip(STAGES, threads.map(lambda words: imports_of(words, tmp_path), commands)))
    assert [stage for stage, packages in found.items() if "tyro" not in packages] == []
    assert {stage: heavy for stage, packages in found.items() if (heavy := packages & (HEAVY | {"kfp"}))} == {}


def test_zhllamas_help_loads_nothing_heavy(tmp_path):
    assert not imports_of(["-m", "pipelines", "--help"], tmp_path) & HEAVY


def test_compiling_loads_nothing_heavy(tmp_path):
    found = imports_of(["-m", "pipelines", "compile", "--size", "7b", "-o", str(tmp_path / "pipeline.yaml")], tmp_path)
    assert "kfp" in found
    assert not found & HEAVY
