"""How a run and its steps ended, and what a step wrote."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.local.placeholders import Surroundings, Value, is_of, value_of
from pipelines.local.plan import Node
from zhllama.errors import InputError


@dataclass(frozen=True)
class StepResult:
    """How one step of a run ended."""

    name: str
    stage: str
    kind: str
    """Of the artifact that it published (hf-model, adapter, …); empty when there is none."""
    state: str
    """done, unchanged, failed, not run or left out."""
    seconds: float
    reference: str
    """The reference that it wrote; empty when there is none."""
    inputs: Mapping[str, Value]
    parameters: Mapping[str, Value]
    facts: Mapping[str, Any]
    metrics: Mapping[str, Any]
    log: str

    @property
    def summary(self) -> str:
        return str(self.facts.get("summary", ""))


@dataclass(frozen=True)
class RunResult:
    """How a run ended. `steps` in the pipeline's order."""

    exit_code: int
    error: str
    """One line about the first failure; empty when all is well."""
    seconds: float
    steps: Mapping[str, StepResult] = field(default_factory=dict)

    def reference(self, step: str) -> str:
        """The reference that a step wrote in this run (or before, when nothing has changed)."""
        found = self.steps[step].reference
        if not found:
            raise InputError(f"{step}: it wrote no reference in this run ({self.steps[step].state})")
        return found


def outputs_written(node: Node, around: Surroundings) -> tuple[dict[str, Value], dict[str, Any]]:
    """The output parameters that a step wrote, and its metrics. InputError for one missing or of another type."""
    executor: dict[str, Any] = {}
    if Path(around.output_file).exists():
        try:
            executor = json.loads(Path(around.output_file).read_text())
        except ValueError as error:
            raise InputError(f"{node.name}: its executor output is not JSON ({error})") from error
    values: dict[str, Value] = {}
    for name, kind in node.component.output_parameters.items():
        path = Path(around.output_parameters[name])
        if name in executor.get("parameterValues", {}):
            values[name] = executor["parameterValues"][name]
            if not is_of(values[name], kind):
                raise InputError(f"{node.name}: its output {name} is {values[name]!r}, which is no {kind}")
        elif path.exists():
            values[name] = value_of(path.read_text(), kind, f"{node.name}: its output {name}")
        else:
            raise InputError(f"{node.name}: it ended with 0 but did not write its output {name}")
    metrics: dict[str, Any] = {}
    for listed in executor.get("artifacts", {}).values():
        for artifact in listed.get("artifacts", []):
            metrics |= artifact.get("metadata", {})
    return values, metrics
