"""What hardware does, and what the training asks of it at a time: figures that planning needs too. No torch here."""

import os
from pathlib import Path

CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 512 * 2**20}
"""Of the loss's chunk of logits in float32. On a CPU what still fits the caches; on a GPU what keeps it busy."""
SMALLEST_CHUNK = 16
"""Rows of the chunk at least."""
PEAK_TFLOPS = {
    "B200": 2250.0, "H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "H800": 989.0, "H20": 148.0, "GH200": 989.0,
    "A100": 312.0, "A800": 312.0, "A30": 165.0, "A10": 125.0, "A6000": 155.0, "L40S": 362.0, "L40": 181.0, "L4": 121.0,
    "4090": 165.0, "V100": 125.0, "MI300X": 1307.0,
}  # fmt: skip
"""Of a GPU in bfloat16 or float16 with float32 sums, dense, in TFLOP/s; from the makers' data sheets."""


def peak_tflops(device: str) -> float:
    """The peak of a GPU by its name as CUDA gives it (`NVIDIA A100-SXM4-80GB`); 0 when it is not known."""
    words = set(device.replace("-", " ").split())
    known = [name for name in PEAK_TFLOPS if words.issuperset(name.split())]
    return PEAK_TFLOPS[max(known, key=len)] if known else 0.0


def allowed_cores(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """How many cores a process may use, at least 1: its affinity, or its container's quota where that is less (a pod
    with a limit of one CPU sees all of its node's). cgroups: where the kernel shows this container's limits (version 2,
    or the cpu controller's of 1)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in (
        ("cpu.max",),
        *((f"{folder}/cpu.cfs_quota_us", f"{folder}/cpu.cfs_period_us") for folder in ("cpu", "cpu,cpuacct")),
    ):
        try:
            quota, period = " ".join((cgroups / name).read_text() for name in names).split()
        except (OSError, ValueError):
            continue
        # `max`, or -1: none
        if quota.isdigit() and period.isdigit() and int(period):
            return max(1, min(cores, int(quota) // int(period)))
    return cores
