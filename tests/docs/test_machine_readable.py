"""docs/machine-readable.md names all that programs may read: facts, metrics, a training's lines, Prometheus."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMED = set(re.findall(r"`([\w:.]+)`", (ROOT / "docs" / "machine-readable.md").read_text()))
PUBLISHED: dict[str, Any] = json.loads((ROOT / "tests" / "goldens" / "stages.json").read_text())
FIELDS = {name.removesuffix(": fields"): held for name, held in PUBLISHED.items() if name.endswith(": fields")}


def all_names(value: Any) -> set[str]:
    """The names of an object's fields, inner ones included."""
    if isinstance(value, dict):
        return set(value) | {name for inner in value.values() for name in all_names(inner)}
    if isinstance(value, list):
        return {name for inner in value for name in all_names(inner)}
    return set()


@pytest.mark.parametrize("name", FIELDS)
def test_facts_and_metrics_that_a_stage_publishes_are_named(name):
    held = FIELDS[name]
    facts = {key: value for key, value in held["facts"].items() if key not in ("verified", "left_out", "files")}
    found = all_names(facts) | set(held["facts"]) | set(held["metrics"]) | {*held} - {"fields"}
    # of a split, a type of GGUF, a rule, a baseline: one name for all
    rest = {one for one in found if not re.search(r"^(train|validation|fallen: .*|\w+_bytes|\w+_baseline)$", one)}
    assert rest <= NAMED


def constant(path: str, name: str) -> tuple[str, ...]:
    """A tuple of texts at the top of a module, which is not imported: it wants torch."""
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return tuple(ast.literal_eval(node.value))
    raise AssertionError(f"{path} has no {name}")


def test_a_trainings_lines_are_named():
    assert set(constant("zhllama/training/metrics.py", "_RECORDED")) <= NAMED


def test_prometheus_metrics_are_named():
    source = "".join(path.read_text() for path in sorted((ROOT / "components" / "serve").glob("*.py")))
    found = re.findall(r'\b(counter|gauge|histogram)\(\s*"(zhllama_\w+)"', source)
    assert found
    assert {f"{name}_total" if kind == "counter" else name for kind, name in found} <= NAMED
