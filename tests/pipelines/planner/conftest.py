"""Trainings whose peak is measured, each group in a process of its own, once for all tests of the module."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.pipelines.planner.measured_training import Case

ROOT = Path(__file__).parents[3]


def run(cases: Sequence[Case], **environment: str) -> "subprocess.Popen[str]":
    """The measuring program on these cases."""
    words = [json.dumps(asdict(case)) for case in cases]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.pipelines.planner.measured_training", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def peaks(process: "subprocess.Popen[str]", cases: Sequence[Case]) -> list[int]:
    output, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors[-3000:]
    found = [int(line.split()[1]) for line in output.splitlines() if line.startswith("peak ")]
    assert len(found) == len(cases)
    return found


@pytest.fixture(scope="session")
def measured() -> Callable[[dict[str, Case], str], int]:
    """`measured(group, name)`: bytes at the peak of a case. The first of a group measures all of it."""
    known: dict[tuple[str, ...], dict[str, int]] = {}

    def of(group: dict[str, Case], name: str) -> int:
        if tuple(group) not in known:
            cases = list(group.values())
            known[tuple(group)] = dict(zip(group, peaks(run(cases), cases), strict=True))
        return known[tuple(group)][name]

    return of
