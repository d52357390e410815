"""Logging to standard error: one line a record, secrets masked (zhllama/secret_text.py)."""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TextIO

from zhllama.errors import InputError
from zhllama.secret_text import mask
from zhllama.terminal import say, visible

_LIBRARIES = "accelerate|datasets|deepspeed|huggingface_hub|peft|tokenizers|torch|transformers"
_NOISY = (
    "botocore", "boto3", "urllib3", "s3transfer", "httpx", "httpcore", "httpx2", "httpcore2", "filelock", "fsspec",
    "kubernetes", "gguf",
)  # fmt: skip


class OneLine(logging.Formatter):
    """`12:00:01 INFO stage: text`; line breaks inside a message become ` | `, so that a record is a line."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return visible(mask(" | ".join(line.strip() for line in text.splitlines() if line.strip())))


class _Stderr(logging.StreamHandler[TextIO]):
    """Standard error as it is at the moment of writing: a progress bar that is drawn puts itself in its place."""

    stream = property(lambda self: sys.stderr, lambda self, stream: None)


def set_up_logging() -> None:
    """Sends all records to standard error. Level: ZHLLAMA_LOG, else INFO; InputError for what is none."""
    wanted = (os.environ.get("ZHLLAMA_LOG") or "INFO").upper()
    if wanted not in logging.getLevelNamesMapping():
        raise InputError(f"ZHLLAMA_LOG={wanted}: no such level; use DEBUG, INFO, WARNING or ERROR")
    handler = _Stderr()
    handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(wanted)
    # what libraries will change some day is news for who programs them (python -W default shows it)
    if not sys.warnoptions:
        for kind in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.filterwarnings("ignore", category=kind, module=rf"(?:{_LIBRARIES})\b")
    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)


def leave_last_line(line: str) -> None:
    """Prints a program's last line, and leaves it where Kubernetes shows it."""
    line = visible(mask(" ".join(line.split())))
    say(line, sys.stderr)
    place = os.environ.get("ZHLLAMA_TERMINATION_LOG", "/dev/termination-log")
    if os.path.exists(place) and os.access(place, os.W_OK):
        Path(place).write_text(line + "\n", encoding="utf-8", errors="backslashreplace")
