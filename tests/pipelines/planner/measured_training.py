"""The peak of a training's tensors, measured: the project's own model, optimizer and step, under torch's MemTracker.

MemTracker (torch.distributed._tools.mem_tracker) sees every operation as it is dispatched and adds up the storages that
are alive. What it does not see is memory that a kernel takes and gives back within one operation. The whole of `train`
runs under it: loading, DeepSpeed's engine where one is asked for, and steps until nothing new is allocated.

`python -m tests.pipelines.planner.measured_training JSON …` prints a line for each case: one after another in one
process, since importing takes longer than a case.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from pipelines.sizes import Architecture

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Case:
    """A model and how it is trained: what a planner is told, too."""

    width: int
    layers: int
    heads: int
    feed_forward: int
    pieces: int
    stage: str
    block: int
    arguments: str = ""
    """Options of the training, as one text."""
    documents: int = 2
    """In each block."""
    more: dict[str, Any] = field(default_factory=dict)
    """Of its architecture: type, key_value_heads, head_width, tied."""

    @property
    def model(self) -> Architecture:
        shape = {"width": self.width, "layers": self.layers, "heads": self.heads, "feed_forward": self.feed_forward}
        return Architecture(**shape, **self.more)

    @property
    def pieces_before(self) -> int:
        """Of the vocabulary that was extended."""
        return self.pieces * 16 // 25


class Blocks:
    """A packed dataset's blocks, of random ids."""

    def __init__(self, case: Case, count: int) -> None:
        self._case, self._count = case, count
        self.facts = {"tokens": count * case.block, "blocks": count, "learned": count * (case.block - case.documents)}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        case = self._case
        ids = np.random.default_rng(index).integers(3, case.pieces, case.block)
        positions = np.arange(case.block) % (case.block // case.documents)
        return {"input_ids": ids, "position_ids": positions, "labels": np.where(positions == 0, -100, ids)}


@contextmanager
def tracked() -> Iterator[Any]:
    from torch.distributed._tools.mem_tracker import MemTracker

    class Tracker(MemTracker):
        """Totals alone: of each module's own figures it wants one pass, and a training has many."""

        def _pre_fw_hook(self, *_: Any) -> None:
            pass

        _post_fw_hook = _pre_bw_hook = _post_bw_hook = _pre_fw_hook

        @property
        def peak(self) -> int:
            return max(self._peak_mem.values(), default=0)

    with Tracker() as tracker:
        yield tracker


def measured(case: Case) -> int:
    """Bytes of tensors at the peak of `train`, in this process."""
    import shlex

    import torch
    from accelerate.state import AcceleratorState
    from transformers import AutoConfig

    from components.finetune.options import Finetune
    from components.pretrain.options import Pretrain
    from zhllama.stage.command_line import parse
    from zhllama.training import averaging, model, trainer
    from zhllama.training.checkpoints import Run

    AcceleratorState._reset_state(reset_partial_state=True)
    words = ["--model", "m", "--dataset", "d", "--max-steps", "2", "--save-steps", "0", "--eval-steps", "0"]
    words += ["--stage", case.stage] if case.stage != "sft" else []
    with tempfile.TemporaryDirectory() as folder:
        words += ["--store", folder]
        options: Any = parse(Finetune if case.stage == "sft" else Pretrain, words + shlex.split(case.arguments))
        manifest = SimpleNamespace(
            vocabulary=SimpleNamespace(size=case.pieces, prefixes={}), facts={"pieces_before": case.pieces_before}
        )
        inputs: Any = SimpleNamespace(model=SimpleNamespace(manifest=manifest, root="m"), adapter=None)
        peak = 0

        def base(artifact: Any, dtype: torch.dtype) -> Any:
            said = {name: value for name, value in case.model.config(case.pieces).items() if value is not None}
            config = AutoConfig.for_model(**said, max_position_embeddings=2048, dtype=dtype)
            kind = model.packed(case.model.kind.transformers)
            found = kind._from_config(config, attn_implementation=model.attention(dtype))
            found.config.use_cache = False
            found.requires_grad_(False)
            return found

        with tracked() as tracker, mock.patch.object(model, "load_base", base):

            def note(trained: Any) -> dict[str, Any]:
                # what is published is copied to the host: on a CPU that is the same memory
                nonlocal peak
                peak = tracker.peak
                return {}

            blocks: Any = Blocks(case, 64)
            trainer.start_processes(options)
            arguments = trainer.training_arguments(options, Path(folder), len(blocks), False)
            made = model.trained_model(options, inputs, getattr(torch, trainer.precision_of(options)))
            run = Run(folder, case.stage, "key", {}, {})
            # the last weights, or their average
            with (
                mock.patch.object(trainer, "trained_weights", note),
                mock.patch.object(averaging, "trained_weights", note),
            ):
                trainer.train(options, arguments, made, blocks, {}, run)
    return peak


def run(cases: Sequence[Case], **environment: str) -> "subprocess.Popen[str]":
    """The measuring program on these cases."""
    words = [json.dumps(asdict(case)) for case in cases]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.pipelines.planner.measured_training", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def peaks(process: "subprocess.Popen[str]", cases: Sequence[Case]) -> list[int]:
    output, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors[-3000:]
    found = [int(line.split()[1]) for line in output.splitlines() if line.startswith("peak ")]
    assert len(found) == len(cases)
    return found


def main() -> None:
    for text in sys.argv[1:]:
        with mock.patch.dict(os.environ):
            print("peak", measured(Case(**json.loads(text))), flush=True)


if __name__ == "__main__":
    main()
