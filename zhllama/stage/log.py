"""Logging to standard error: one line a record, secrets masked.

What is masked: the values of environment variables whose names say that they are secret, S3's mounted credentials, and
in a text that a library logs what follows `Authorization:`, `Bearer`, `Signature=` and the like, and the password of an
address.
"""

import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import TextIO

from zhllama.errors import InputError
from zhllama.mounted_secrets import CREDENTIALS, READ
from zhllama.terminal import say, visible

_SECRET_NAME = re.compile(
    r"SECRET|TOKEN(?!IZ|S(_|$))|PASSWORD|API_KEY|ACCESS_KEY|PRIVATE_KEY|CREDENTIAL", re.IGNORECASE
)
_SECRET_TEXT = re.compile(
    r"""(?ix)
    ( (?:authorization|x-api-key|api[-_]key)['"]?\s*[:=]\s*
      (?: ['"]?(?:bearer|basic|digest|negotiate|aws4-hmac-sha256)\s+ | ['"]
        | (?![a-z']{1,15}[\s,.;:]\s*[a-z]) )  # `API_KEY: an API key has …` is a sentence
    | \bbearer\s+ (?!(?:[a-z]{1,7}|auth[a-z]*|[a-z]*tokens?)(?![^\s,.;:)]))
    | \b(?:x-amz-)?(?:signature|credential|security-token)=
    | ://[^\s/:@]+: (?=[^\s/@]+@)
    )
    [^\s'",&@]+
    """
)


def mask(text: str) -> str:
    """The text with every secret replaced by `***`."""
    for name, value in (*os.environ.items(), *((CREDENTIALS[1], value) for value in tuple(READ))):
        # short values would mask ordinary words ("true", a region)
        if len(value) >= 8 and _SECRET_NAME.search(name) and not os.path.exists(value):
            text = text.replace(value, "***")
    return _SECRET_TEXT.sub(r"\1***", text)


_LIBRARIES = "accelerate|datasets|deepspeed|huggingface_hub|peft|tokenizers|torch|transformers"
_NOISY = (
    "botocore", "boto3", "urllib3", "s3transfer", "httpx", "httpcore", "httpx2", "httpcore2", "filelock", "fsspec",
    "kubernetes",
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
