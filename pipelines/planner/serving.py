"""A plan of a server: weights and the cache of keys and values against the GPU's memory. Pure."""

from dataclasses import dataclass

from pipelines.planner.estimate import HALF, RESERVED, PlanRequest
from pipelines.planner.gpus import Gpu
from pipelines.planner.memory import Setting
from zhllama.errors import InputError

VLLM_SHARE = 0.9
"""Share of a GPU that vLLM takes unless told otherwise (--gpu-memory-utilization)."""


@dataclass(frozen=True, kw_only=True)
class ServingPlan:
    """A served model on the GPUs of one pod. Bytes."""

    gpu: Gpu
    gpus: int
    context: int
    concurrency: int
    weights: int
    """On each GPU."""
    cache_per_token: int
    """Keys and values of one token, on each GPU."""

    @property
    def cache(self) -> int:
        """For `concurrency` requests of a whole context each, on each GPU."""
        return self.cache_per_token * self.context * self.concurrency

    @property
    def needed(self) -> int:
        return self.weights + self.cache + RESERVED

    @property
    def available(self) -> int:
        return int(self.gpu.memory * VLLM_SHARE)

    @property
    def fits(self) -> bool:
        return self.needed <= self.available

    @property
    def most(self) -> int:
        """Requests of a whole context that fit at once."""
        return max(self.available - self.weights - RESERVED, 0) // (self.cache_per_token * self.context)


def serving_plan(request: PlanRequest, context: int = 0, concurrency: int = 0, gpus: int = 0) -> ServingPlan:
    """The plan of serving a size: weights in float16, split between the pod's GPUs, and the cache beside them."""
    assert request.gpu is not None
    for option, given in (("--context", context), ("--concurrency", concurrency)):
        if given < 0:
            raise InputError(f"{option} {given}: a number above 0 is needed")
    size, model = request.size, request.size.model
    split = gpus or size.serving.gpus
    if model.heads % split:
        raise InputError(
            f"--gpus-per-node {split}: {model.heads} attention heads cannot be divided among them; give a divisor"
        )
    base = Setting(model=model, pieces=request.rows, trains="", batch=1, block=1)
    return ServingPlan(
        gpu=request.gpu,
        gpus=split,
        context=context or size.serving.context_length,
        concurrency=concurrency or 16,
        weights=-(-base.base_parameters * HALF // split),
        cache_per_token=-(-2 * model.layers * model.width * HALF // split),
    )
