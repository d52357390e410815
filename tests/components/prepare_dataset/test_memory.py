"""Memory does not grow with the corpus: measured on the whole command, on two sizes."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import re, sys
from components.prepare_dataset.options import PrepareDataset
from components.prepare_dataset.preparer import prepare_dataset
from zhllama.stage.run import run_stage

store, tokenizer, text = sys.argv[1:]
run_stage(PrepareDataset(store=store, tokenizer=tokenizer, text=text, block_size=256), prepare_dataset)
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def peak_megabytes(store: Path, tokenizer: Path, text: Path) -> float:
    """Of the program and all it has mapped."""
    command = [sys.executable, "-c", PROGRAM, str(store), str(tokenizer), str(text)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout) / 1024


@pytest.mark.slow
def test_three_times_the_text_takes_no_more_memory(tmp_path, llama_tokenizer, english_text):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.model").write_bytes(llama_tokenizer)
    # 40 and 120 MB: in both more documents than the window of the packing holds, more segments than the encoder keeps,
    # and enough that all queues have once been full
    lines = [f"{number} {line[:50]}\n" for number in range(40) for line in english_text[:2000]]
    peaks = []
    for name, times in (("small", 10), ("large", 30)):
        (tmp_path / name).mkdir()
        for number in range(times):
            (tmp_path / name / f"{number}.txt").write_text("".join(f"{number} {line}" for line in lines))
        peaks.append(peak_megabytes(tmp_path / "store", tmp_path / "tokenizer", tmp_path / name))
    assert peaks[1] < 500
    # what were kept of each byte, or of each token of two, would be 80 MB more
    assert peaks[1] < peaks[0] + 40, peaks
