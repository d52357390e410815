"""A loaded model on its way to another: the weights that `merge_models` would publish, without a file being written."""

from typing import get_args

import torch

from zhllama.inference.load import LoadedModel
from zhllama.weights.blend import Blend, Group
from zhllama.weights.blend_plan import BlendPlan
from zhllama.weights.stream import Pool, spans_between


def go_between(loaded: LoadedModel, plan: BlendPlan, weight: float) -> None:
    """Gives `loaded`, which is the first of the plan's two models, the weights of linear merging with so much of the
    other (0: its own, 1: the other's): to the bit those of `merge_models --weight`, read again from both."""
    blend = Blend("linear", dict.fromkeys(get_args(Group), weight), [one.checkpoint for one in plan.models], plan.rows)
    rooms, tiles = Pool(0), Pool(0)
    with torch.no_grad():
        for name, rows in plan.rows.items():
            kept = loaded.model.get_parameter(name)
            for span in spans_between(plan.models[0].checkpoint.info(name), len(kept), rows, None):
                made = blend.make(span, rooms, tiles)
                kept[span.first : span.first + span.rows].copy_(made.rows)
                rooms.give(made.rooms)
