"""A pod's secrets as files: each is mounted at a folder of its own, a file a key.

Variables would stand a dozen times in a step's Workflow (a megabyte at most), KFP's launcher would take our S3 keys,
every child would inherit them, and none is ever replaced in a process. So S3's credentials become no variables: a
session reads them when it begins, and again when they are refused (zhllama/storage); the kubelet replaces the files
within two minutes of a change. The other keys are settings, which libraries look for among the variables.
"""

import os
from pathlib import Path

from zhllama.errors import InputError

S3_FOLDER, PROXY_FOLDER = "/etc/zhllama-s3", "/etc/zhllama-proxy"
MODEL_KEY, MODEL_FOLDER = "OPENAI_API_KEY", "/etc/zhllama-model-key"
"""The key for a model that is asked: that of its secret alone is taken."""
CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
KEY, KEY_FOLDER = "API_KEY", "/etc/zhllama-api-key"
"""The key of a served model, in its own pods and in the step that tries it."""
READ: set[str] = set()
"""Values of secrets that are no variables: no log shows them."""


def take_secrets() -> None:
    """Makes variables of the mounted secrets but S3's credentials; one that is set stays. InputError for a file that is
    no text."""
    taken = {S3_FOLDER: "[!.]*", PROXY_FOLDER: "[!.]*", MODEL_FOLDER: MODEL_KEY}
    for path in (path for folder, names in taken.items() for path in sorted(Path(folder).glob(names))):
        text = _text(path)
        if text and path.name not in CREDENTIALS:
            os.environ.setdefault(path.name, text)


def credentials() -> dict[str, str]:
    """S3's that are mounted now, by the names of their keys; empty without any. InputError for a part of them."""
    folder = Path(S3_FOLDER)
    # all files are replaced at once, by a link: a key and the secret of another version would not fit
    while True:
        version = (folder / "..data").resolve()
        files = [(version if version.is_dir() else folder) / name for name in CREDENTIALS]
        found = {path.name: text for path in files if path.is_file() and (text := _text(path))}
        if (folder / "..data").resolve() == version:
            break
    missing = [name for name in CREDENTIALS[:2] if name not in found]
    if found and missing:
        raise InputError(f"{folder}: {' and '.join(missing)} is not there; put it into the S3 secret")
    READ.update(found.values())
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        # replaced in between
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: it cannot be read ({error}); mend the secret's key {path.name}") from error
