"""The threads of a training are as many as its container may use."""

import os
from pathlib import Path

import pytest

from zhllama.training.hardware import allowed_cores


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"cpu,cpuacct/cpu.cfs_quota_us": "300000", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu.max": "1600000 100000"}, 8),
        ({"cpu.max": "damaged"}, 8),
    ],
    ids=[
        "no limit",
        "2",
        "half",
        "max",
        "v1",
        "v1: 4",
        "v1: none",
        "v1: both controllers",
        "more than there are",
        "damaged",
    ],
)
def test_a_containers_quota_counts_where_it_is_less(cgroups, files, cores):
    for name, text in files.items():
        (cgroups / name).parent.mkdir(exist_ok=True)
        (cgroups / name).write_text(f"{text}\n")
    assert allowed_cores(cgroups) == cores
