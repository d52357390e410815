"""What llama.cpp itself has to do: quantise a GGUF, and encode with the tokenizer inside one.

Which tensor gets how many bits is llama.cpp's own and changes with it. Its quantiser reads and writes local files and
cannot be interrupted, so it runs as a program of its own (`python -m components.export_model.llama_cpp_tools SOURCE
TARGET TYPE`), which ends when we do.
"""

import importlib.metadata
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from zhllama.errors import StorageFault
from zhllama.stage.child_processes import die_with_parent

QUANTIZATIONS = {
    "q8_0": 8.5, "q6_k": 6.6, "q5_k_m": 5.7, "q5_k_s": 5.6, "q5_1": 6.0, "q5_0": 5.6, "q4_k_m": 4.9, "q4_k_s": 4.7,
    "q4_1": 5.1, "q4_0": 4.7, "q3_k_l": 4.4, "q3_k_m": 4.0, "q3_k_s": 3.7, "q2_k": 3.4,
}  # fmt: skip
"""Names as llama.cpp's (lower case) → about as many bits a weight, for LLaMA's proportions; to estimate room by."""
SUPER_BLOCK = 256
"""Weights of a row that a k-quant packs together; where it does not divide a row, llama.cpp takes another type."""


def installed() -> str:
    """The version of llama-cpp-python; "" where it is not installed."""
    try:
        return importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return ""


def quantise(source: Path, target: Path, kind: str) -> None:
    """Writes `target`, the GGUF `source` quantised. StorageFault with llama.cpp's last words when it fails."""
    command = [sys.executable, "-m", "components.export_model.llama_cpp_tools", str(source), str(target), kind]
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace", preexec_fn=die_with_parent)
    if ended.returncode:
        said = [line for line in ended.stderr.splitlines() if line.strip()][-3:]
        raise StorageFault(f"llama.cpp could not quantise to {kind} (exit {ended.returncode}): {' '.join(said)}")


def encode(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """The ids that llama.cpp gives each text, BOS first, by the tokenizer inside a GGUF (its tensors are not read).
    StorageFault for a file that llama.cpp does not load."""
    from llama_cpp import Llama

    try:
        model = Llama(str(path), verbose=False, vocab_only=True)
    except ValueError as error:
        raise StorageFault(f"llama.cpp does not load {path}: {error}") from error
    return [model.tokenize(text.encode(), add_bos=True, special=False) for text in texts]


if __name__ == "__main__":
    import llama_cpp
    from gguf import LlamaFileType

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = LlamaFileType[f"MOSTLY_{sys.argv[3].upper()}"]
    sys.exit(int(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), settings)))
