"""A training that is killed (-9) at random moments, several times, ends with the losses of one that was not.

Each seed draws how often checkpoints are taken, and for each kill who dies (every process at once, one worker, the
launcher) and when: some moment after a step, or after a checkpoint, or while one is on its way to the store. Two
processes on a real S3 server, plain data parallelism, ZeRO-2 and ZeRO-3 in turn. The losses are compared bit for bit,
step for step, and the weights that are published.
"""

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.local.s3_server import LocalS3
from tests.folders import add_folder
from tests.packed_data import Segment, blocks_of
from zhllama import storage
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.data.packed import KIND, TRAIN, VALIDATION, PackedWriter, packed_facts
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from zhllama.tokenizer.sentencepiece_model import parse_model

STEPS = 30
BLOCK = 64
BACKENDS = ("none", "zero2", "zero3")
DEFAULTS: dict[str, Any] = {
    "stage": "lora",
    "max_steps": STEPS,
    "logging_steps": 1,
    "save_steps": 3,
    "eval_steps": 10,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "deepspeed": "none",
}
PATIENCE = 300.0
"""Seconds after which a training that should have ended is taken to hang."""


# --- what is trained --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Material:
    """References of a tiny model and of a packed dataset of its tokenizer."""

    model: str
    dataset: str


def material(store: str, hidden: int = 64, layers: int = 2, pieces: int = 400, held_out_blocks: int = 5) -> Material:
    """A random LLaMA and 160 packed blocks of 64 tokens. Of its pieces, those beyond 400 occur in no text. Held out are
    five blocks, again and again."""
    import sentencepiece
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    chance = random.Random(1)
    words = ["".join(chance.choices("abcdefghijklmnop", k=chance.randint(2, 7))) for _ in range(300)]
    lines = [" ".join(chance.choices(words, k=24)) for _ in range(400)]
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=made,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        minloglevel=2,
        num_threads=1,
    )
    proto = parse_model(made.getvalue())
    for number in range(len(proto.pieces), pieces):
        proto.pieces.add(piece=f"▁{number:06d}", score=-1e6)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    tokenizer = proto.SerializeToString()
    encoder = SentencePieceEncoder(tokenizer)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=encoder.size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model_out = ArtifactWriter(store, "convert_weights", "tiny")
    with tempfile.TemporaryDirectory() as folder:
        disable_progress_bar()
        LlamaForCausalLM(config).save_pretrained(folder)
        add_folder(model_out, Path(folder))
    model_out.add_bytes("tokenizer.model", tokenizer)
    model_out.vocabulary = encoder.vocabulary()
    model = model_out.publish("hf-model")

    data_out = ArtifactWriter(store, "prepare_dataset", "tiny")
    segments = [Segment(np.array([encoder.bos, *encoder.encode(line)][:BLOCK])) for line in lines[:165]]
    with PackedWriter(data_out, TRAIN, BLOCK, encoder.size, 0) as train:
        for segment in segments[5:]:
            train.write_blocks(blocks_of([segment]))
    with PackedWriter(data_out, VALIDATION, BLOCK, encoder.size, 0) as held_out:
        for number in range(held_out_blocks):
            held_out.write_blocks(blocks_of([segments[number % 5]]))
    data_out.vocabulary = encoder.vocabulary()
    data_out.facts = packed_facts(BLOCK, encoder.size, 0, [train, held_out])
    return Material(model.reference, data_out.publish(KIND).reference)


# --- a training as a process ------------------------------------------------------------------------------------------


@dataclass
class Training:
    """`python -m components.pretrain` in a session of its own. Its lines are kept as they come."""

    process: "subprocess.Popen[str]"
    lines: list[str] = field(default_factory=list)
    _news: threading.Condition = field(default_factory=threading.Condition)
    _thread: threading.Thread | None = None
    _found: int = 0

    def follow(self) -> "Training":
        def work() -> None:
            assert self.process.stderr is not None
            for line in self.process.stderr:
                with self._news:
                    self.lines.append(line)
                    self._news.notify_all()
            with self._news:
                self._news.notify_all()

        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()
        return self

    def wait_for(self, text: str, again: bool = False) -> bool:
        """Whether a line held `text` before the training ended; `again`: a line after the one found last."""
        seen = self._found if again else 0
        with self._news:
            while True:
                for number, line in enumerate(self.lines[seen:], seen + 1):
                    if text in line:
                        self._found = number
                        return True
                seen = len(self.lines)
                if self._thread is None or not self._thread.is_alive():
                    return False
                if not self._news.wait(PATIENCE):
                    raise TimeoutError(f"no line with {text!r} for {PATIENCE:.0f} s:\n{self.said}")

    @property
    def said(self) -> str:
        return "".join(self.lines)

    def workers(self) -> list[int]:
        """Process ids of the training processes (of torch's elastic launcher's children), lowest rank first."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                parent = int(path.read_text().rsplit(")", 1)[1].split()[1])
                if parent == self.process.pid and "spawn_main" in path.with_name("cmdline").read_text():
                    found.append(int(path.parent.name))
        return sorted(found)

    def kill(self, whom: str) -> None:
        """SIGKILL to `all` processes, to the `launcher`, or to the `first` or the `last` worker."""
        if whom == "all":
            os.killpg(self.process.pid, signal.SIGKILL)
        elif whom == "launcher":
            self.process.kill()
        elif found := self.workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(found[0 if whom == "first" else -1], signal.SIGKILL)

    def end(self) -> int:
        """Waits for the end of all of it, and returns the launcher's exit code."""
        code = self.process.wait(PATIENCE)
        if self._thread is not None:
            # its standard error is open while any of its processes lives
            self._thread.join(PATIENCE)
            if self._thread.is_alive():
                os.killpg(self.process.pid, signal.SIGKILL)
                raise TimeoutError(f"its workers outlived it:\n{self.said}")
        return code


def start(
    given: Material,
    store: str,
    cache: Path,
    environment: Mapping[str, str],
    processes: int = 2,
    module: str = "components.pretrain",
    **options: Any,
) -> Training:
    """Starts a training with dropout, a checkpoint every few steps and a line for each step."""
    chosen = {**DEFAULTS, "model": given.model, "dataset": given.dataset, "store": store, **options}
    words = [word for name, value in chosen.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    around = {name: value for name, value in os.environ.items() if not name.startswith("PET_")}
    around |= {"PET_NPROC_PER_NODE": str(processes), "ZHLLAMA_CACHE": str(cache), **environment}
    process = subprocess.Popen(
        [sys.executable, "-m", module, *words],
        env=around,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return Training(process).follow()


def losses(store: str) -> list[tuple[int, str, float]]:
    """(step, which loss, value) of the one training published in a store."""
    (name,) = [item.name for item in storage.listing(f"{store}/pretrain") if item.name.endswith("/manifest.json")]
    lines = open_artifact(f"{store}/pretrain/{name}").read("metrics.jsonl").splitlines()
    return [
        (line["step"], which, line[which])
        for line in map(json.loads, lines)
        for which in ("loss", "eval_loss")
        if which in line
    ]


def weights(store: str) -> str:
    """The digest of the adapter that was published in a store."""
    (name,) = [item.name for item in storage.listing(f"{store}/pretrain") if item.name.endswith("/manifest.json")]
    return open_artifact(f"{store}/pretrain/{name}").file("adapter_model.safetensors").sha256


def incomplete_checkpoints(store: str) -> set[str]:
    """Folders of checkpoints without a manifest."""
    files = [item.name.rsplit("/", 1) for item in storage.listing(f"{store}/checkpoints")]
    whole = {folder for folder, name in files if name == "manifest.json"}
    return {folder for folder, _ in files} - whole


# --- the kills --------------------------------------------------------------------------------------------------------


def killed_and_resumed(
    seed: int, given: Material, scratch: Path, store: str, environment: Mapping[str, str], backend: str, kills: int,
    first: bool = False,
) -> Counter[str]:  # fmt: skip
    """Runs a training through `kills` kills to its end; AssertionError when anything differs from `reference`. first:
    the first kill comes with the first checkpoint, so that the next training has one to go on from."""
    chance = random.Random(f"{seed} {backend}")
    options = {"deepspeed": backend, "save_steps": chance.choice((1, 2, 3))}
    counted: Counter[str] = Counter()
    cache = scratch / f"cache-{seed}-{backend}"
    for number in range(kills):
        training = start(given, store, cache, environment, **options)
        whom = chance.choice(("all", "all", "first", "last", "launcher"))
        moment = chance.choice(("after a step", "after a checkpoint", "after a checkpoint", "while uploading"))
        if first and number == 0:
            moment = "with the first checkpoint"
            training.wait_for("is complete")
        elif moment == "after a step":
            training.wait_for(f" step {chance.randint(1, STEPS // 2)}/{STEPS}")
            time.sleep(chance.uniform(0, 0.3))
        else:
            for _ in range(chance.randint(1, 2)):
                training.wait_for("is complete", again=True)
            if moment == "while uploading":
                while training.process.poll() is None and not incomplete_checkpoints(store):
                    pass
            else:
                time.sleep(chance.uniform(0, 0.3))
        training.kill(whom)
        code = training.end()
        counted["killed" if code else "ended before its kill"] += 1
        counted[f"killed {moment}"] += bool(code)
        counted[f"killed: {whom}"] += bool(code)
        counted["went on from a checkpoint"] += "going on from step" in training.said
        if code == 0:
            break
    else:
        training = start(given, store, cache, environment, **options)
        assert training.end() == 0, training.said
        counted["went on from a checkpoint"] += "going on from step" in training.said
    assert not incomplete_checkpoints(store), "incomplete checkpoints were left behind"
    return counted


def reference(given: Material, scratch: Path, environment: Mapping[str, str], backend: str, store: str) -> None:
    """The training that nobody kills."""
    training = start(given, store, scratch / f"cache-{backend}", environment, deepspeed=backend)
    assert training.end() == 0, training.said


@contextlib.contextmanager
def reachable(environment: Mapping[str, str]) -> Iterator[None]:
    """This process, too, reaches the server."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    storage.forget_client()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        storage.forget_client()


def run(seeds: range, scratch: Path) -> dict[str, int]:
    counted: Counter[str] = Counter()
    with LocalS3(scratch / "s3", bucket="soak") as server, reachable(server.environment()):
        environment = server.environment()
        given = material(str(scratch / "material"))
        expected = {}
        for backend in BACKENDS:
            store = f"s3://soak/reference-{backend}"
            reference(given, scratch, environment, backend, store)
            expected[backend] = losses(store), weights(store)
        for seed in seeds:
            backend = BACKENDS[seed % len(BACKENDS)]
            store = f"s3://soak/{seed}"
            counted += killed_and_resumed(seed, given, scratch, store, environment, backend, kills=1 + seed % 4)
            assert (losses(store), weights(store)) == expected[backend], f"seed {seed}: another course"
            counted["same losses, same weights"] += 1
            storage.delete_all(store)
    return dict(counted)
