"""The loss curves of what `--trainings` names."""

import json
import logging
import math
from collections.abc import Sequence
from typing import Any

from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError

log = logging.getLogger("evaluate")

METRICS = "metrics.jsonl"


def read_trainings(references: Sequence[str], artifacts: Sequence[Artifact]) -> list[dict[str, Any]]:
    """The loss curves of what `--trainings` names; what holds no metrics.jsonl (a skipped stage) is left out."""
    found = []
    for reference, artifact in zip(references, artifacts, strict=True):
        if METRICS not in artifact:
            log.info("%s: no %s in it, so no loss curve is shown", artifact.root, METRICS)
            continue
        stage = str(artifact.manifest.configuration.get("stage", ""))
        label = f"{artifact.manifest.stage} {stage}".strip() or artifact.root.rsplit("/", 1)[-1]
        found.append({"label": label, "reference": reference, "points": _points(artifact)})
    return found


def _points(artifact: Artifact) -> list[dict[str, float | None]]:
    points = []
    for count, line in enumerate(artifact.read(METRICS).decode().splitlines(), start=1):
        where = f"--trainings {artifact.root}/{METRICS}: line {count}"
        try:
            value = json.loads(line)
            step = int(value["step"])
            losses = {name: finite(value.get(name)) for name in ("loss", "eval_loss")}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"{where} is not a training's metrics ({error}); give what a training published"
            ) from error
        if any(loss is not None for loss in losses.values()):
            points.append({"step": step, **losses})
    return points


def finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(float(value)) else None
