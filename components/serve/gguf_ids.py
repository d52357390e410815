"""The ids that llama.cpp gives texts, asked in a process of its own: `python -m components.serve.gguf_ids FILE`.

llama.cpp is not made for files of somebody else's: one may end its process, or keep it for ever. Here it ends or keeps
a child, and whoever asked gets one line.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from zhllama.stage.child_processes import die_with_parent

READING_SECONDS = 120.0
"""For a vocabulary of 260,000 pieces from a slow disk, and some lines."""


def ids_of(path: Path, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
    """Of each text, with BOS; of one that is marked so without, its special tokens read. ValueError, which says why,
    where llama.cpp does not read the file."""
    command = [sys.executable, "-P", "-m", "components.serve.gguf_ids", str(path.absolute())]
    try:
        done = subprocess.run(
            command, input=json.dumps(list(texts)).encode(), capture_output=True, timeout=READING_SECONDS,
            preexec_fn=die_with_parent,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ValueError(f"it did not end within {READING_SECONDS:.0f} s") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
        ended = signal.strsignal(-done.returncode) if done.returncode < 0 else ""
        raise ValueError(f"it ended: {ended}" if ended else last[:200])
    told = list(json.loads(done.stdout or "[]"))
    if len(told) != len(texts):
        raise ValueError(f"it told the ids of {len(told)} texts, not of {len(texts)}")
    return told


def main() -> None:
    import llama_cpp

    model = llama_cpp.Llama(model_path=sys.argv[1], vocab_only=True, verbose=False)
    ids = [
        model.tokenize(text.encode(), add_bos=not marked, special=marked)
        for text, marked in json.load(sys.stdin.buffer)
    ]
    sys.stdout.write(json.dumps(ids))


if __name__ == "__main__":
    main()
