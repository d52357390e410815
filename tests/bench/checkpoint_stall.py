"""What a checkpoint costs a training: ours, in the background to S3, beside the Trainer's own, to a local disk.

One process on a LLaMA of about 50 million parameters with 49,954 embedding rows, LoRA and embeddings trained: 38
million trained weights, 460 MB of state. Ours is measured in full: the time the loop stands still while the state is
copied, and what the upload's thread, hashing on the same cores, takes from the steps beside it. The S3 server runs on
those cores, too.
"""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.local.s3_server import LocalS3
from tests.bench.measure import Table, measured
from tests.soak.training import DEFAULTS, Material, material

DEFAULT_SAVE_STEPS = 500
BAR = 0.02
EVERY, STEPS = 6, 13
SIZE = {"hidden": 384, "layers": 8, "pieces": 49_954}


def _options(given: Material, store: str, save_steps: int) -> dict[str, Any]:
    return {
        **DEFAULTS,
        "model": given.model,
        "dataset": given.dataset,
        "store": store,
        "max_steps": STEPS,
        "save_steps": save_steps,
        "eval_steps": 0,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
    }


def ours(given: dict[str, str], store: str, cache: str) -> dict[str, Any]:
    """Stalls, and the time of each step with what came before it: seconds."""
    from components.pretrain.options import Pretrain
    from zhllama.stage.run import run_stage
    from zhllama.training.checkpointing import CheckpointManager
    from zhllama.training.stage import run_training as pretrain
    from zhllama.training.training_state import Uploads

    os.environ["ZHLLAMA_CACHE"] = cache
    ends: list[float] = []
    busy: list[bool] = []
    stalls: list[float] = []
    uploads: list[float] = []
    on_step_end = CheckpointManager.on_step_end

    def recorded(self: Any, *arguments: Any, **named: Any) -> None:
        ends.append(time.perf_counter())
        busy.append(self._uploads.busy)
        on_step_end(self, *arguments, **named)

    CheckpointManager.on_step_end = recorded  # type: ignore[method-assign]
    CheckpointManager.save = timed(CheckpointManager.save, stalls)  # type: ignore[method-assign]
    Uploads._upload = timed(Uploads._upload, uploads)  # type: ignore[method-assign]
    run_stage(Pretrain(**_options(Material(**given), store, EVERY)), pretrain)
    return {"ends": ends, "busy": busy, "stalls": stalls, "uploads": uploads}


def timed(work: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The same, which notes how long it took."""

    def noted(*given: Any) -> Any:
        began = time.perf_counter()
        result = work(*given)
        seconds.append(time.perf_counter() - began)
        return result

    return noted


def peer(given: dict[str, str], store: str, cache: str) -> dict[str, Any]:
    """The Trainer's own checkpoint in the same training: written to a local disk, the loop waiting for it."""
    from transformers import Trainer

    from zhllama.training.trainer import PackedTrainer

    stalls: list[float] = []
    PackedTrainer._save_checkpoint = timed(Trainer._save_checkpoint, stalls)  # type: ignore[method-assign]
    return {**ours(given, store, cache), "stalls": stalls}


def run(scratch: Path) -> list[Table]:
    given = vars(material(str(scratch / "material"), **SIZE))
    with LocalS3(scratch / "s3", bucket="bench") as server:
        around = server.environment()
        mine = measured(ours, given, "s3://bench/ours", str(scratch / "cache"), environment=around).result
        theirs = measured(peer, given, str(scratch / "peer"), str(scratch / "cache"), environment=around).result
    steps, slowed = _apart(mine)
    step = statistics.median(steps)
    # the steps beside an upload, and what each took longer
    taken = sum(slowed) - step * len(slowed)
    ours_stall = statistics.mean(mine["stalls"])
    ours_whole = ours_stall + max(0.0, taken / len(mine["stalls"]))
    peer_stall = statistics.mean(theirs["stalls"])

    def share(seconds: float) -> str:
        return f"{seconds / (DEFAULT_SAVE_STEPS * step):.3%}"

    table = Table("Checkpoint stall", ("", "loop stands still", "with the slower steps", "of 500 steps"))
    table.rows = [
        ("ours, to S3", f"{ours_stall:.2f} s", f"{ours_whole:.2f} s", share(ours_whole)),
        ("Trainer's own, local disk", f"{peer_stall:.2f} s", f"{peer_stall:.2f} s", share(peer_stall)),
    ]
    table.note = (
        f"{step:.2f} s a step; {len(mine['stalls'])} checkpoints of 460 MB, each "
        f"{statistics.mean(mine['uploads']):.1f} s on its way. Bar: at most {BAR:.0%} of the time between two "
        f"checkpoints at the default interval of {DEFAULT_SAVE_STEPS} steps."
    )
    return [table]


def _apart(found: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Times of the steps that ran alone, and of those beside an upload. A checkpoint's own stall is in neither."""
    alone, beside = [], []
    stalls = iter(found["stalls"])
    for number in range(1, len(found["ends"])):
        seconds = found["ends"][number] - found["ends"][number - 1]
        # the step with this index follows a checkpoint, whose stall it holds
        after = number % EVERY == 0
        if after:
            seconds -= next(stalls, 0.0)
        if after or found["busy"][number - 1] or found["busy"][number]:
            beside.append(seconds)
        elif number > 1:
            alone.append(seconds)
    return alone, beside
