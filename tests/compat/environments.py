"""A virtual environment a program. torch is installed once, into one of its own that the others see by a .pth file."""

import contextlib
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.compat.programs import Program

VENVS = Path(os.environ.get("COMPAT_VENVS") or "build/compat/venvs").resolve()
TORCH = "torch==2.13.0"
INSIDE = Path(__file__).with_name("inside")
INSTALLING = 1800
"""Seconds that one `pip install` may take."""
QUIET = {
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1",
    "WANDB_DISABLED": "true", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
}  # fmt: skip
"""No network but loopback, no GPU: what is compared is arithmetic."""


class Failed(Exception):
    """A program that cannot be installed, or a script that ended badly: the last that it said."""


def install(program: Program) -> Path:
    """The program's environment, as it is or new; its python. Failed: pip's error."""
    torch = _environment("torch", [f"{os.environ.get('TORCH_INDEX_ARGS', '')} {TORCH} numpy"])
    return _environment(program.name, program.pip, program.without, _site(torch))


def run(python: Path, script: str, asked: Mapping[str, Any], limit: int) -> dict[str, Any]:
    """What a script saw (inside/common.py). Failed when it did not end well in `limit` seconds."""
    out = Path(asked["out"])
    out.mkdir(parents=True, exist_ok=True)
    question = out / "asked.json"
    question.write_text(json.dumps(asked, ensure_ascii=False), encoding="utf-8")
    home = out / "home"
    home.mkdir(exist_ok=True)
    # a program's own commands are found beside its python
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, **QUIET, "PATH": path, "HOME": str(home), "PYTHONPATH": ""}
    _bounded([str(python), str(INSIDE / script), str(question)], out / "log.txt", limit, environment)
    found: dict[str, Any] = json.loads((out / "seen.json").read_text(encoding="utf-8"))
    return found


def _environment(name: str, lines: Sequence[str], without: Sequence[str] = (), shared: Path | None = None) -> Path:
    folder = VENVS / name
    python, done = folder / "bin" / "python", folder / "installed"
    key = hashlib.sha256("\n".join([*lines, *without]).encode()).hexdigest()
    if done.is_file() and done.read_text() == key:
        return python
    VENVS.mkdir(parents=True, exist_ok=True)
    constraint, log = VENVS / "constraint.txt", VENVS / f"{name}.log"
    constraint.write_text(f"{TORCH}\n")
    _bounded([sys.executable, "-m", "venv", "--clear", str(folder)], log, INSTALLING)
    if shared:
        (_site(python) / "torch.pth").write_text(f"{shared}\n")
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q", "-c", str(constraint)]
    if without:
        (package,) = lines
        _bounded([*pip, "--no-deps", package], log, INSTALLING)
        _bounded([*pip, *_requirements(python, package, without)], log, INSTALLING)
    else:
        for line in lines:
            _bounded([*pip, *shlex.split(line)], log, INSTALLING)
    done.write_text(key)
    return python


def _requirements(python: Path, package: str, without: Sequence[str]) -> list[str]:
    """What an installed package requires here, by pip's own reading, but for what is left out."""
    asked = """
import sys, importlib.metadata
from pip._vendor.packaging.requirements import Requirement
for text in importlib.metadata.requires(sys.argv[1]):
    one = Requirement(text)
    if one.name not in sys.argv[2:] and (one.marker is None or one.marker.evaluate({"extra": ""})):
        print(f"{one.name}{'[' + ','.join(one.extras) + ']' if one.extras else ''}{one.specifier}")
"""
    done = subprocess.run([python, "-c", asked, package, *without], capture_output=True, text=True, check=True)
    return done.stdout.split()


def _site(python: Path) -> Path:
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.strip())


def _bounded(command: Sequence[str], log: Path, limit: int, environment: Mapping[str, str] | None = None) -> None:
    """Runs a command in a session of its own, so that whatever it started ends with it."""
    with log.open("w", encoding="utf-8", errors="replace") as said:
        child = subprocess.Popen(command, stdout=said, stderr=said, env=environment, start_new_session=True)
        try:
            code: int | str = child.wait(limit)
        except subprocess.TimeoutExpired:
            code = f"still running after {limit} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if code != 0:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        last = next((line for line in reversed(lines) if "rror" in line), lines[-1] if lines else "")
        raise Failed(f"{' '.join(last.split())[:300]} ({code})")
