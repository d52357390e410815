"""The front between what was learnt and what was kept: bits per byte of Chinese against English, from the model to its
first baseline and at points between them, linear in the weights. No training is needed for a point: `merge_models`
makes it.

The point that is chosen has the best Chinese of those that hold what `--require` says of English; where it says nothing
of it, the model's own stays chosen. A point is measured as the model that would be published there, to the bit.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.stage.requirements import Requirement, judge
from zhllama.weights.blend_plan import BlendPlan, Source, plan_blend

log = logging.getLogger("evaluate")

ENGLISH = "bits_per_byte_en"
Bits = Mapping[str, float]
"""Language → bits per byte."""


def plan_front(model: Artifact, base: Artifact) -> BlendPlan:
    """InputError, from headers alone, for a base that the model cannot be blended with."""
    first, other = Source(model, "--model"), Source(base, "--baseline")
    plan = plan_blend([first, other])
    if plan.named is other:
        raise InputError(
            f"--front: --baseline {base.root} has more pieces than --model {model.root}; give what the model was made "
            "of as the first baseline"
        )
    return plan


def measure_front(
    plan: BlendPlan, points: int, ends: Sequence[Bits], score: Callable[..., Mapping[str, Mapping[str, Any]]]
) -> dict[str, Any]:
    """`front` of report.json, with the model's own point chosen. ends: of the model, and of its first baseline. score:
    the figures of both texts, of a loaded model, by a title."""
    from zhllama.inference.between import go_between
    from zhllama.inference.load import load_model

    loaded = load_model(plan.models[0].artifact)
    measured: list[tuple[float, Bits]] = [(0.0, ends[0])]
    for at in range(1, points + 1):
        weight = round(at / (points + 1), 4)
        go_between(loaded, plan, weight)
        figures = score(loaded, f"with {weight:.0%} of the base")
        measured.append((weight, {language: of["bits_per_byte"] for language, of in figures.items()}))
    measured.append((1.0, ends[1]))
    return {
        "points": [{"weight": weight, "bits_per_byte": dict(bits)} for weight, bits in measured],
        "chosen": 0.0,
    }


def choose(
    front: Mapping[str, Any],
    requirements: Iterable[Requirement],
    labels: Sequence[str],
    figures: Sequence[Mapping[str, float]],
) -> dict[str, Any]:
    """`front` with the point that these requirements choose, None where no point holds them. labels, figures: as for
    judge."""
    of_english = [one for one in requirements if one.figure == ENGLISH]
    if not of_english:
        return dict(front)

    def holds(point: Mapping[str, Any]) -> bool:
        there = {ENGLISH: point["bits_per_byte"]["en"]}
        return all(one["holds"] for one in judge(of_english, labels, [*figures[:-1], there]))

    held = [point for point in front["points"] if holds(point)]
    best = min(held, key=lambda point: (point["bits_per_byte"]["zh"], point["weight"]), default=None)
    chosen = best and best["weight"]
    log.info("of the front, chosen: %s", "none" if best is None else f"{chosen:.0%} of {labels[0]}")
    return dict(front) | {"chosen": chosen}
