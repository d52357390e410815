"""docs/convert_and_quantise.ipynb runs from its first cell to its last, and shows what it printed."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = json.loads((ROOT / "docs" / "convert_and_quantise.ipynb").read_text())
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slowest
def test_every_cell_runs(tmp_path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make gguf")
    # one after another in one namespace, as a notebook runs them
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = "\n\n".join(CODE)
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert "the same ids as in training: True" in ended.stdout
    assert "q4_k_m" in ended.stdout


def test_the_notebook_shows_what_it_printed_and_nothing_of_the_machine_it_ran_on():
    shown = "".join(line for cell in NOTEBOOK["cells"] for output in cell.get("outputs", []) for line in output["text"])
    assert "the same ids as in training: True" in shown
    assert not [word for word in shown.split() if word.startswith("/")]
    assert NOTEBOOK["nbformat"] == 4


def test_what_the_notebook_takes_from_the_package_is_in_it():
    """Whoever installed it has no tests folder."""
    imports = [node for code in CODE for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if str(node.module).startswith("zhllama.")]
    assert ours
    for node in ours:
        module = importlib.import_module(str(node.module))
        assert not [one.name for one in node.names if not hasattr(module, one.name)]
    assert not [node.module for node in imports if str(node.module).partition(".")[0] == "tests"]
