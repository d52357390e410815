"""How fast this machine trains SmolLM2, in which precision: `python -m pipelines.demo.speed` prints both as JSON.

A processor with bfloat16 instructions trains in half the time and memory; one without computes bfloat16 far slower than
float32. So both are tried, on the model's own layers with random weights, for a few seconds.
"""

import json
import os
import time

from pipelines import sizes

LAYERS = 4
"""Of the model's thirty: the rest takes as long as these."""
BATCH, BLOCK = 4, 256
PASSES = 2


def tokens_per_second(precision: str) -> float:
    """Of one forward and backward pass of all layers, on all of this process's threads."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = sizes.load("smollm2-135m").model
    told = {name: value for name, value in shape.config().items() if value is not None}
    config = AutoConfig.for_model(told.pop("model_type"), **told | {"num_hidden_layers": LAYERS})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, precision)).model
    ids = torch.randint(shape.rows, (BATCH, BLOCK))
    seconds = []
    # the first one makes what later ones use
    for _ in range(1 + PASSES):
        begun = time.perf_counter()
        model(input_ids=ids, use_cache=False).last_hidden_state.float().sum().backward()
        seconds.append(time.perf_counter() - begun)
    return BATCH * BLOCK / (min(seconds[1:]) * shape.layers / LAYERS)


def main() -> None:
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    found = {precision: tokens_per_second(precision) for precision in ("float32", "bfloat16")}
    best = max(found, key=lambda one: found[one])
    print(json.dumps({"precision": best, "tokens_per_second": round(found[best])}))


if __name__ == "__main__":
    main()
