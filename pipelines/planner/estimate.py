"""A plan of a training or of a server: memory against the GPU's, time, and what it moves and stores. Pure.

Assumed, and said wherever it is shown: the share of a GPU's peak that goes into the model (gpus.yaml), what lies on a
GPU beside tensors (RESERVED, FRAGMENTATION), and a process's own memory (PROCESS). Everything else is counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.machines import planned_options
from pipelines.planner.gpus import Gpu
from pipelines.planner.memory import FLOAT32, Phase, Setting, part, peak
from pipelines.sizes import Size
from zhllama.data.packed import token_type
from zhllama.errors import InputError
from zhllama.stage.options import option_of
from zhllama.tokenizer.encoder import RECIPE_SIZES
from zhllama.training.options import TrainingOptions, deepspeed_settings

HALF = 2
RESERVED = 2 * 2**30
"""Bytes of a GPU that hold no tensors: driver, CUDA's context and kernels, NCCL's buffers, cuBLAS's workspace."""
FRAGMENTATION = 0.05
"""What the allocator keeps beyond the tensors, as a share of them."""
PROCESS = 3 * 10**9
"""Host memory of a training process without its tensors: torch, transformers, DeepSpeed, CUDA's libraries."""
PROCESS_WITHOUT_GPU = 10**9
"""The same where there is no GPU: without CUDA's libraries."""
LLAMA_PIECES = RECIPE_SIZES[0]
RECIPES_OVERLAP = LLAMA_PIECES + 20_000 - RECIPE_SIZES[1]
"""Pieces of the recipe's Chinese tokenizer, of 20,000, that LLaMA has already."""
TOKENIZER_FILES = 5 * 10**6
VLLM_SHARE = 0.9
"""Share of a GPU that vLLM takes unless told otherwise (--gpu-memory-utilization)."""


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What is asked for; 0 and empty: as the size has it."""

    size: Size
    gpu: Gpu | None
    """None: on processors."""
    nodes: int = 0
    gpus_per_node: int = 0
    pieces: int = 0
    block: int = 0
    steps: int = 0
    data_tokens: int = 0
    """Of the dataset; 0: as many as the steps take."""
    arguments: str = ""
    """More options of the training, as one text."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """What was set of the trainings' options, by the setting's name."""
    mfu: float = 0.0

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "pieces", "block", "steps", "data_tokens", "mfu"):
            if getattr(self, name) < 0:
                raise InputError(f"{option_of(name)} {getattr(self, name)}: a number above 0 is needed")
        if self.mfu > 1:
            raise InputError(f"--mfu {self.mfu:g}: it is a share of the GPU's peak, so at most 1")

    @property
    def rows(self) -> int:
        """Of the vocabulary that is trained, [PAD] included: 49,954 for the recipe's 20,000 Chinese pieces."""
        if self.values.get("tokenizer", self.size.tokenizer) == "keep":
            return self.pieces or self.size.model.rows
        overlap = RECIPES_OVERLAP if self.size.model.rows == LLAMA_PIECES else 0
        return self.pieces or self.size.model.rows + max(self.size.vocab_size - overlap, 0) + 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A training on given machines. Bytes, seconds, tokens."""

    stage: str
    gpu: Gpu | None
    options: TrainingOptions
    setting: Setting
    nodes: int
    per_node: int
    """Processes on each node."""
    steps: int
    mfu: float

    phase: Phase
    """The peak, of one process."""
    needed: int
    """Of a GPU, with what is no tensor; without a GPU, of a process."""
    host_memory: int
    """Of a node at most."""

    tokens_per_step: int
    tokens: int
    tokens_per_second: float | None
    """On all GPUs; None on processors, whose speed nobody states."""
    seconds: float | None
    exchanged: int
    """What each GPU sends for an optimizer step: not in the time."""

    artifact: int
    """What the training publishes: a model, or an adapter in float16."""
    checkpoint: int
    """One checkpoint, of all processes: weights as they are computed with, masters, AdamW's two moments, and with --ema
    their average."""
    checkpoint_count: int
    s3_read: int
    """By all nodes."""
    s3_written: int
    s3_kept: int
    ephemeral: int
    """Of a node: model and dataset as they are fetched, and the adapter before it is sent."""

    @property
    def fits(self) -> bool:
        """Whether it fits a GPU; on processors the node's memory says (warnings)."""
        return self.gpu is None or self.needed <= self.gpu.memory


def plan(stage: str, request: PlanRequest) -> Plan:
    """The plan of a training's stage. InputError for what the training itself would refuse."""
    size, gpu = request.size, request.gpu
    training = size.training(stage)
    options = planned_options(size, stage, request.arguments, request.values)
    nodes = request.nodes or training.nodes
    per_node = request.gpus_per_node or training.processes_per_node
    block = request.block or size.block_size
    s = Setting.of(
        options,
        deepspeed_settings(options),
        model=size.model,
        # the recipe's Chinese-LLaMA has no [PAD]; ours has it from the extension on
        pieces=request.rows,
        new_rows=max(request.rows - size.model.rows, 0),
        processes=nodes * per_node,
        block=block,
        device="cuda" if gpu else "cpu",
    )
    if s.trains == "new" and s.zero.stage == 3:
        raise InputError("--embedding-rows new: not under ZeRO-3; give --deepspeed zero2 or none")
    if gpu and s.compute_bytes == FLOAT32:
        raise InputError("--precision float32: the GPUs' speed is stated for bfloat16; leave it out, or give bfloat16")

    steps = request.steps or max(options.max_steps, 1)
    step = s.tokens * s.accumulation * s.processes
    mfu = request.mfu or (gpu.mfu if gpu else 0.0)
    speed = None
    if gpu:
        # mfu is what is published of trainings that recompute activations: without, that time is saved
        own, again = flops_per_token(s)
        spent = own + again if s.checkpointing else own
        speed = s.processes / (spent / (own + again) * own / (gpu.tflops * 1e12 * mfu))

    phase = peak(s)
    needed = int(phase.total * (1 + FRAGMENTATION)) + RESERVED
    if gpu is None:
        # a host gives no page of a buffer before it is written to
        unwritten = max(phase.parts["buffers"] - s.trained * s.compute_bytes, 0)
        needed = phase.total - unwritten + PROCESS_WITHOUT_GPU

    stored = request.data_tokens or step * steps
    # ids, and of each block where it begins and where its documents end
    dataset = stored * int(token_type(request.rows)[-1]) + -(-stored // block) * 12
    model = s.base_parameters * HALF + TOKENIZER_FILES
    adapter = s.trained * HALF if s.targets else 0
    artifact = adapter + TOKENIZER_FILES if adapter else model
    # of stage 1's model the file of the embeddings is written, the rest is copied in S3
    written = artifact if adapter else s.tables * s.table * HALF
    states = (3 if s.zero.stage else 2) + s.averaged
    checkpoint = s.trained * ((s.compute_bytes if s.zero.stage else FLOAT32) + states * FLOAT32)
    count = (steps - 1) // options.save_steps if options.save_steps else 0
    return Plan(
        stage=stage, gpu=gpu, options=options, setting=s, nodes=nodes, per_node=per_node, steps=steps, mfu=mfu,
        phase=phase, needed=needed, host_memory=per_node * (_process_memory(s) if gpu else needed),
        tokens_per_step=step, tokens=step * steps, tokens_per_second=speed,
        seconds=step * steps / speed if speed else None, exchanged=_exchanged(s),
        artifact=artifact, checkpoint=checkpoint, checkpoint_count=count,
        s3_read=nodes * (model + dataset),
        s3_written=written + count * checkpoint,
        s3_kept=artifact + min(count, options.save_total_limit) * checkpoint,
        ephemeral=model + dataset + adapter + 10**9,
    )  # fmt: skip


def _process_memory(s: Setting) -> int:
    """Of a node's memory: every process loads the model whole before it is moved, except under ZeRO-3."""
    loaded = s.table * s.compute_bytes if s.zero.stage == 3 else s.frozen * s.compute_bytes + s.trained * FLOAT32
    # copies for a checkpoint, in pinned memory; what the optimizer has on the host
    own = part(s, s.trained)
    later = (own if s.zero.stage else s.trained) * 3 * FLOAT32 + s.trained * (1 + s.averaged) * FLOAT32
    if s.zero.offloads_optimizer:
        later += own * (4 * FLOAT32 + 2 * s.compute_bytes)
    return PROCESS + max(loaded, later)


def _exchanged(s: Setting) -> int:
    if s.processes == 1:
        return 0
    gradients = s.trained * (s.compute_bytes if s.zero.stage else FLOAT32)
    if s.zero.stage == 3:
        # the weights of each layer, gathered for each pass forward and again backward
        return 2 * s.accumulation * (s.frozen + s.trained) * s.compute_bytes + s.accumulation * gradients
    # reduced to their owners (every pass under ZeRO-2), and the weights or sums back to all
    return gradients * ((s.accumulation if s.zero.stage == 2 else 1) + 1)


def flops_per_token(s: Setting) -> tuple[float, float]:
    """Operations of a token, as the training's log counts them (metrics.flops_per_token), and those done again for
    recomputed activations: a matrix of n weights takes 2n forward, 2n for its input's gradient, 2n for its own."""
    matrices = s.model.layers * sum(rows * columns for rows, columns in s.matrices.values())
    head_trained = s.trains == "all" or s.head_too or (s.model.tied and s.trains == "embed_tokens")
    head = s.table * (6 if head_trained else 4) * s.learned
    rows = 2 * s.new_rows * s.model.width * s.learned if s.trains == "new" else 0
    return 4.0 * matrices + 6.0 * s.lora_parameters + head + rows, 2.0 * (matrices + s.lora_parameters)


@dataclass(frozen=True, kw_only=True)
class ServingPlan:
    """A served model on the GPUs of one pod. Bytes."""

    gpu: Gpu
    gpus: int
    context: int
    concurrency: int
    weights: int
    """On each GPU."""
    cache: int
    """Keys and values, for `concurrency` requests of a whole context each, on each GPU."""
    needed: int
    available: int
    most: int
    """Requests of a whole context that fit at once."""

    @property
    def fits(self) -> bool:
        return self.needed <= self.available


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
    context, concurrency = context or size.serving.context_length, concurrency or 16
    base = Setting(model=model, pieces=request.rows, trains="", batch=1, block=1)
    weights = -(-base.base_parameters * HALF // split)
    # each GPU keeps whole heads of keys and values, at least one
    token = 2 * model.layers * -(-model.sizes()["key_heads"] // split) * model.sizes()["head"] * HALF
    available = int(request.gpu.memory * VLLM_SHARE)
    cache = token * context * concurrency
    return ServingPlan(
        gpu=request.gpu, gpus=split, context=context, concurrency=concurrency, weights=weights, cache=cache,
        needed=weights + cache + RESERVED, available=available,
        most=max(available - weights - RESERVED, 0) // (token * context),
    )  # fmt: skip
