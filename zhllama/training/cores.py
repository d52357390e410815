"""How many cores a process may use: its affinity, or its container's quota where that is less.

A pod with a limit of one CPU sees all of its node's cores: threads for each of them would take turns on the one.
"""

import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def allowed_cores(cgroups: Path = CGROUPS) -> int:
    """At least 1. cgroups: where the kernel shows this container's limits (version 2, or the cpu controller's of 1)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for quota in (_version_2(cgroups), _version_1(cgroups / "cpu"), _version_1(cgroups / "cpu,cpuacct")):
        if quota is not None:
            return max(1, min(cores, int(quota)))
    return cores


def _version_2(folder: Path) -> float | None:
    """`cpu.max`: quota and period in microseconds, or `max`."""
    allowed, _, period = _text(folder / "cpu.max").partition(" ")
    return int(allowed) / int(period) if allowed.isdigit() and period.isdigit() and int(period) else None


def _version_1(folder: Path) -> float | None:
    """`cpu.cfs_quota_us` and `cpu.cfs_period_us`; a quota of -1 is none."""
    allowed, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
    return int(allowed) / int(period) if allowed.isdigit() and period.isdigit() and int(period) else None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
