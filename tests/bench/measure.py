"""What a program cost: wall time, processor time and peak memory, of a child process that ran to its end."""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PAUSE = 0.01
"""Seconds between two looks at a program's memory."""


@dataclass(frozen=True)
class Cost:
    """Of one program: seconds of wall clock and of processor, peak anonymous memory in MB, and what it returned."""

    wall: float
    cpu: float
    peak_mb: float
    result: Any = None


@dataclass
class Table:
    """A table of results as it is printed: Markdown."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    note: str = ""

    def __str__(self) -> str:
        lines = [f"### {self.title}", "", "| " + " | ".join(self.columns) + " |", "|---" * len(self.columns) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join(lines + (["", self.note] if self.note else []))


def measured(function: Callable[..., Any], *arguments: Any, environment: dict[str, str] | None = None) -> Cost:
    """Calls a module-level function with JSON arguments in a fresh Python, and says what that program cost.

    Imports are part of the wall time, unless the function returns `{"seconds": s}`, which then is the wall time.
    Memory is the peak of RssAnon + RssShmem, read from /proc while it runs: pages of mapped files are the kernel's.
    """
    with tempfile.NamedTemporaryFile("r", encoding="utf-8", suffix=".json") as answer:
        program = (
            "import importlib, json, sys\n"
            f"module = importlib.import_module({function.__module__!r})\n"
            f"made = module.{function.__qualname__}(*json.loads(sys.argv[1]))\n"
            f"json.dump(made, open({answer.name!r}, 'w'))\n"
        )
        command = [sys.executable, "-c", program, json.dumps(arguments)]
        cost = run(command, environment)
        result = json.load(answer)
    wall = result["seconds"] if isinstance(result, dict) and "seconds" in result else cost.wall
    return Cost(wall, cost.cpu, cost.peak_mb, result)


def run(command: Sequence[str], environment: dict[str, str] | None = None) -> Cost:
    """Runs a command to its end; RuntimeError with its last words where it fails."""
    with tempfile.TemporaryFile() as words:
        begin = time.perf_counter()
        child = subprocess.Popen(command, env={**os.environ, **(environment or {})}, stdout=words, stderr=words)
        peak, ended = [0.0], threading.Event()
        watch = threading.Thread(target=_watch, args=(child.pid, peak, ended))
        watch.start()
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - begin
        child.returncode = os.waitstatus_to_exitcode(status)
        ended.set()
        watch.join()
        if child.returncode:
            words.seek(0)
            raise RuntimeError(f"{command[:3]} ended with {child.returncode}: {words.read().decode()[-2000:]}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, peak[0])


def _watch(process: int, peak: list[float], ended: threading.Event) -> None:
    status = Path(f"/proc/{process}/status")
    while not ended.wait(PAUSE):
        try:
            found = re.findall(r"Rss(?:Anon|Shmem):\s+(\d+) kB", status.read_text(encoding="utf-8"))
        except (FileNotFoundError, ProcessLookupError):
            return
        peak[0] = max(peak[0], sum(map(int, found)) / 1024)


def side_by_side(ours: Callable[[], Cost], peer: Callable[[], Cost], times: int = 3) -> tuple[Cost, Cost]:
    """Both in turn, `times` times; the median of each figure, so that a machine whose speed drifts favours nobody."""
    found: tuple[list[Cost], list[Cost]] = ([], [])
    for _ in range(times):
        found[0].append(ours())
        found[1].append(peer())
    return _median(found[0]), _median(found[1])


def _median(costs: list[Cost]) -> Cost:
    middle = [statistics.median(getattr(cost, name) for cost in costs) for name in ("wall", "cpu", "peak_mb")]
    return Cost(*middle, costs[-1].result)
