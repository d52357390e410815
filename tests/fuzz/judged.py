"""Whether a reader holds against a file: it ends well, or with one line, soon, and in bounded memory."""

import logging
import resource
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.fuzz.readers import REPOSITORY, TARGETS, Target
from zhllama.errors import InputError

SECONDS = 5.0
"""Of the processor, for a file of some kilobytes."""
MEMORY = 2**30
"""Bytes beyond what the process has."""
LONGEST = 4000
"""Characters of an error."""
CORPUS = Path(__file__).parent / "corpus"


def files(name: str) -> list[bytes]:
    """To begin with: good ones, and those that a reader fell over once."""
    return [*TARGETS[name].seeds(), *(path.read_bytes() for path in sorted((CORPUS / name).glob("*")))]


def judged(target: Target, content: bytes) -> str:
    """What is wrong: a line that names the place; "" where the reader holds."""
    begin = time.process_time()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        with bounded_memory():
            target.read(content, folder)
    except InputError as error:
        if len(str(error)) > LONGEST:
            return f"an error of {len(str(error)):,} characters: {str(error)[:200]}"
    except BaseException as error:  # noqa: BLE001 - whatever else it is, is a finding
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _ours(frame.filename)]
        where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[:-4:-1])
        return f"{type(error).__name__} at {where}: {' '.join(str(error).split())[:200]}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if (took := time.process_time() - begin) > SECONDS:
        return f"it took {took:.0f} s"
    return ""


def _ours(file: str) -> bool:
    return file.startswith(str(REPOSITORY)) and ".venv" not in file and "/tests/" not in file


@contextmanager
def bounded_memory() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with open("/proc/self/statm", encoding="ascii") as statm:
        used = int(statm.read().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def quiet() -> None:
    """No line in the log for each file that is refused."""
    logging.disable(logging.CRITICAL)
