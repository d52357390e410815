"""The memory of one process of a training, at its peak: formulae, tensor by tensor, of what the training does.

A step has five phases that can be the peak: the loss (activations whole, the chunk of logits), the start of the
backward pass (the head's gradient), the backward pass of the last layer (with recomputed activations, where they are),
its end (the embeddings' gradient), and the optimizer. Each is a sum of named parts; the peak is the largest sum. What
is in them was read off the operations of the training itself, and a test holds the sums against torch's measured peak.

Symbols, as in docs/planning.md: h width, f feed-forward width, L layers, V rows of the vocabulary, T tokens of a pass
(batch × block), c bytes of the computation (2 or 4), n processes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.sizes import Architecture
from zhllama.models.architecture import Place
from zhllama.training.hardware import CHUNK_BYTES, SMALLEST_CHUNK
from zhllama.training.inputs import new_shape
from zhllama.training.options import PretrainOptions, TrainingOptions, zero_stage

FLOAT32, FLOAT64 = 4, 8
INT64 = 8


@dataclass(frozen=True, kw_only=True)
class Zero:
    """What a DeepSpeed configuration says of memory; stage 0: plain data parallelism, without DeepSpeed."""

    stage: int = 0
    offloads_optimizer: bool = False
    overlaps: bool = False
    reduce_bucket: int = 0
    """Elements of the buffer that gradients are reduced in."""
    prefetch_bucket: int = 0
    live: int = 0
    """ZeRO-3: elements of weights that may be whole at once."""

    @classmethod
    def of(cls, settings: dict[str, Any] | None, device: str) -> "Zero":
        """From a configuration as `deepspeed_settings` gives it; DeepSpeed's own defaults where it says nothing."""
        if settings is None:
            return cls()
        given = settings.get("zero_optimization") or {}
        return cls(
            stage=(stage := zero_stage(settings)),
            offloads_optimizer=(given.get("offload_optimizer") or {}).get("device", "none") != "none",
            # on a CPU the training switches it off
            overlaps=bool(given.get("overlap_comm", stage == 3)) and device == "cuda",
            reduce_bucket=int(given.get("reduce_bucket_size", 5e8)),
            prefetch_bucket=int(given.get("stage3_prefetch_bucket_size", 5e7)),
            live=int(given.get("stage3_max_live_parameters", 1e9)),
        )


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A training as memory sees it."""

    model: Architecture
    pieces: int
    """Rows of embed_tokens and of lm_head."""
    trains: Literal["", "embed_tokens", "all", "new"]
    """Of the embeddings: nothing, embed_tokens alone, both whole, or the new rows of both."""
    head_too: bool = False
    """With embed_tokens alone: lm_head too."""
    new_rows: int = 0
    rank: int = 0
    """Of LoRA; 0: none."""
    targets: tuple[str, ...] = ()
    dropout: float = 0.0
    compute_bytes: int = 2
    zero: Zero = Zero()
    processes: int = 1
    batch: int
    block: int
    accumulation: int = 1
    checkpointing: bool = False
    device: Literal["cuda", "cpu"] = "cuda"
    learned: float = 1.0
    """Share of the tokens that have a label."""
    averaged: bool = False
    """Whether an average of the trained weights is kept beside them, in float32."""

    @classmethod
    def of(cls, options: TrainingOptions, settings: dict[str, Any] | None, **more: Any) -> "Setting":
        """From the training's own options. `more`: model, pieces, new_rows, processes, block and where it runs."""
        device, shape = more.get("device", "cuda"), new_shape(options, more["model"].kind.lora_modules)
        whole = options.precision == "float32" or (options.precision == "auto" and device != "cuda")
        lora: dict[str, Any] = {"rank": shape.r, "targets": tuple(shape.targets), "dropout": shape.dropout}
        return cls(
            trains=options.trained_rows if options.gives_adapter else "embed_tokens",
            head_too=isinstance(options, PretrainOptions) and options.also_lm_head,
            **(lora if options.gives_adapter else {}),
            compute_bytes=FLOAT32 if whole else 2,
            zero=Zero.of(settings, device),
            batch=options.per_device_train_batch_size,
            accumulation=options.gradient_accumulation_steps,
            checkpointing=options.gradient_checkpointing,
            averaged=options.ema > 0,
            **more,
        )

    # --- parameters ---------------------------------------------------------------------------------------------------

    @property
    def table(self) -> int:
        """Elements of embed_tokens, and of lm_head."""
        return self.pieces * self.model.width

    @property
    def tables(self) -> int:
        """embed_tokens and lm_head, or the one that is both."""
        return 1 if self.model.tied else 2

    @property
    def layer(self) -> list[Place]:
        """The tensors of one layer."""
        found = self.model.kind.places(self.model.config(self.pieces) | {"num_hidden_layers": 1})
        return [place for place in found if ".layers." in place.hf]

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Of a layer: name → (width in, width out)."""
        return {
            place.hf.split(".")[-2]: (place.shape[1], place.shape[0]) for place in self.layer if place.kind == "linear"
        }

    @property
    def normed(self) -> list[str]:
        """What has a norm of its own heads: queries, keys."""
        names = {place.hf.split(".")[-2] for place in self.layer if place.kind == "norm"}
        return [size for name, size in (("q_norm", "queries"), ("k_norm", "keys")) if name in names]

    @property
    def layer_parameters(self) -> int:
        return sum(math.prod(place.shape) for place in self.layer)

    @property
    def base_parameters(self) -> int:
        return self.tables * self.table + self.model.layers * self.layer_parameters + self.model.width

    @property
    def lora_parameters(self) -> int:
        widths = (sum(self.matrices[target]) for target in self.targets if target in self.matrices)
        return self.model.layers * self.rank * sum(widths)

    @property
    def trained_tables(self) -> list[int]:
        """Elements of each embedding matrix that is trained, in the order of the model."""
        if self.trains == "embed_tokens":
            return [self.table] * (self.tables if self.head_too else 1)
        rows = {"all": self.pieces, "new": self.new_rows, "": 0}[self.trains]
        return [rows * self.model.width] * self.tables if rows else []

    @property
    def trained(self) -> int:
        """Parameters that are trained."""
        return sum(self.trained_tables) + self.lora_parameters

    @property
    def frozen(self) -> int:
        """Parameters that are not, copies of trained ones included: peft keeps the originals of embed_tokens and
        lm_head beside those that it trains."""
        return self.base_parameters - (sum(self.trained_tables) if self.trains == "embed_tokens" else 0)

    @property
    def trains_head(self) -> bool:
        return self.trains in ("all", "new") or self.head_too or (self.model.tied and bool(self.trains))

    @property
    def tokens(self) -> int:
        """Of one pass of one process."""
        return self.batch * self.block


@dataclass(frozen=True)
class Phase:
    """A phase of the step: what is in memory, in bytes."""

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


# --- what a layer keeps for its backward pass -------------------------------------------------------------------------


def autocasts(s: Setting) -> bool:
    """Plain data parallelism in half precision: float32 weights, cast where they are used. DeepSpeed casts for good."""
    return s.zero.stage == 0 and s.compute_bytes == 2


def stream_bytes(s: Setting) -> int:
    """Of an element of the residual stream: float32 where trained embeddings begin it so."""
    return FLOAT32 if autocasts(s) and s.trains in ("embed_tokens", "all") else s.compute_bytes


def layer_activations(s: Setting) -> int:
    """Bytes that one layer keeps of a pass."""
    h, f, c, size = s.model.width, s.model.feed_forward, s.compute_bytes, s.model.sizes()
    kept = 2 * FLOAT32 * h  # the two norms' inputs, in float32
    # queries, what attention gives, keys and values: these once for each head that shares them, where there is a mask
    kept += 4 * size["queries"] * c
    kept += sum(FLOAT32 * size[name] for name in s.normed)  # the inputs of norms of queries and keys
    kept += FLOAT32 * s.model.heads + s.block * c  # attention's sums, and the mask, once a block
    kept += 3 * f * c  # gate, its SiLU, up
    # what LoRA is applied to is kept once for all that share it, unless each drops values of its own
    shared = {"attention"}
    if s.zero.stage == 3:
        # DeepSpeed's own product keeps its input whether the weight is trained or not
        kept += (2 * h + f) * c
        shared = set(SOURCES.values())
    for target in s.targets:
        if target not in s.matrices:
            continue
        width = s.matrices[target][0]
        kept += s.rank * c
        if s.dropout:
            kept += width * (c + dropout_mask_bytes(s))
        elif autocasts(s) or SOURCES[target] not in shared:
            kept += width * c
            shared.add(SOURCES[target])
    return s.tokens * kept


SOURCES = {
    "q_proj": "norm", "k_proj": "norm", "v_proj": "norm", "o_proj": "attention", "gate_proj": "second norm",
    "up_proj": "second norm", "down_proj": "product",
}  # fmt: skip
"""What each layer is applied to: without dropout LoRA keeps it once for all that share it."""


def dropout_mask_bytes(s: Setting) -> int:
    """Of an element: a GPU keeps a byte, a CPU the factors, in the type that LoRA's weights have."""
    return 1 if s.device == "cuda" else FLOAT32 if autocasts(s) else s.compute_bytes


# --- the phases -------------------------------------------------------------------------------------------------------


def peak(s: Setting) -> Phase:
    """The phase at which the most is in memory, of all that can be it."""
    h, f, c, layers, tokens = s.model.width, s.model.feed_forward, s.compute_bytes, s.model.layers, s.tokens
    head_gradient = s.table * FLOAT32 if s.trains_head else 0
    before, with_head, at_end, for_step = gradients(s)
    # what ZeRO gathers gradients in before it reduces them: made when the first comes; under ZeRO-3 from the start
    buffers = s.zero.reduce_bucket * c * (2 if s.zero.overlaps and s.zero.stage == 2 else 1) if s.zero.stage else 0
    always = buffers if s.zero.stage == 3 else 0

    stream = tokens * h * stream_bytes(s)
    whole = layers * layer_activations(s)
    if not s.trains:
        # the first layer's input needs no gradient: what it would take is not kept
        masks = sum(target in ("q_proj", "k_proj", "v_proj") for target in s.targets) if s.dropout else 0
        whole -= tokens * h * (FLOAT32 + masks * dropout_mask_bytes(s))
    kept = layers * stream if s.checkpointing else whole
    around = 2 * tokens * s.model.sizes()["head"] * (FLOAT32 if autocasts(s) else c)  # cosines and sines
    around += tokens * s.block  # the mask
    around += 3 * tokens * INT64  # ids, positions, labels
    kept += around

    # the last norm: its input in float32, its output, and the rows of it that have labels
    rows = int(tokens * s.learned)
    norm = tokens * h * (FLOAT32 + stream_bytes(s)) + rows * h * (c + (FLOAT32 if autocasts(s) else 0))
    chunk = min(rows, max(SMALLEST_CHUNK, CHUNK_BYTES[s.device] // (FLOAT32 * s.pieces)))
    logits = chunk * s.pieces
    # the head as the loss computes with it: cast by autocast, or with the trained rows put in
    other_head = s.table * c if s.trains == "new" or (autocasts(s) and s.trains_head) else 0
    loss = rows * h * FLOAT32 + head_gradient + logits * FLOAT32 + other_head
    if c != FLOAT32:
        # the factors of a chunk, beside them the head's product or the next chunk's logits before they are cast
        following = min(rows - chunk, chunk) * s.pieces * c
        loss += logits * c + max(following, s.table * c if s.trains_head else 0)
    hidden_gradient = rows * h * (FLOAT32 + (c if c != FLOAT32 else 0))
    cast_gradient = s.table * c if s.trains_head and c != FLOAT32 else 0
    begin = hidden_gradient + head_gradient + cast_gradient + other_head

    layer = layer_activations(s) if s.checkpointing else 0
    work = stream + tokens * h * c + tokens * f * c * (2 if s.targets and s.dropout else 3)
    # gradients, activations, loss, buffers
    sums = {
        "loss": (before, kept + norm, loss, always),
        "head's gradient": (before, kept + norm, begin, always),
        "last norm": (with_head, kept + norm + tokens * h * 4 * FLOAT32, 0, buffers if s.trains_head else always),
        "last layer": (with_head, kept + layer + work, 0, buffers if s.trains_head or s.targets else always),
        "backward's end": (at_end, around + stream, 0, buffers),
        "optimizer": (for_step, 0, 0, always),
    }
    name = max(sums, key=lambda phase: sum(sums[phase]))
    return Phase(name, dict(zip(PARTS, (*standing(s), *sums[name]), strict=True)))


PARTS = ("weights", "optimizer", "gradients", "activations", "loss", "buffers")


def standing(s: Setting) -> tuple[int, int]:
    """Weights and optimizer: there at every phase."""
    c = s.compute_bytes
    # of single rows that are trained peft keeps what they were
    originals = sum(s.trained_tables) * c if s.trains == "new" else 0
    # AdamW's moments, and the average of the weights
    kept = 2 + s.averaged
    if s.zero.stage == 0:
        return s.frozen * c + originals + s.trained * FLOAT32, s.trained * kept * FLOAT32
    # with the weights in float32
    states = 0 if s.zero.offloads_optimizer else part(s, s.trained) * (1 + kept) * FLOAT32
    everything = s.frozen + s.trained
    if s.zero.stage == 3:
        whole = min(everything, max(s.zero.live, s.layer_parameters, s.table) + s.zero.prefetch_bucket)
        return (part(s, everything) + whole) * c, states
    return everything * c + originals, states


def part(s: Setting, elements: int) -> int:
    """Of elements that are divided among the processes, one's share."""
    return -(-elements // s.processes)


def gradients(s: Setting) -> tuple[int, int, int, int]:
    """What is there of gradients: before a pass, once the head's has come, when the embeddings' comes (dense), and for
    the optimizer, which takes them in float32."""
    c, tables = s.compute_bytes, s.trained_tables
    if s.zero.stage == 0:
        # plain data parallelism exchanges them in buffers of its own, made once
        exchanged = s.trained * FLOAT32 if s.processes > 1 else 0
        whole = exchanged + s.trained * FLOAT32
        if s.accumulation > 1:
            return whole, whole, whole + (s.table * FLOAT32 if tables else 0), whole
        return exchanged, exchanged + (tables[-1] * FLOAT32 if s.trains_head else 0), whole, whole
    own = part(s, s.trained)
    # ZeRO-2 keeps the gradients of all parameters that reach into this process's part, whole: a part of the embeddings
    # that is a sixteenth of two matrices still holds one of them, or both where it spans their border
    border = len(tables) > 1 and s.processes % 2 == 1
    reached = sum(tables if border or s.processes == 1 else tables[:1])
    kept = (reached + part(s, s.lora_parameters)) * c
    several = s.accumulation > 1 or s.zero.stage == 3
    before = (own * c if s.zero.stage == 3 else kept) if several and not s.zero.offloads_optimizer else 0
    # in the reducing buffer, or where that is too small beside it
    head = tables[-1] * c if s.trains_head and tables[-1] > s.zero.reduce_bucket else 0
    # itself, its copy to be reduced, and under ZeRO-2 what was reduced before
    reduced = 0 if s.zero.stage == 3 or s.zero.offloads_optimizer else kept
    end = before + (2 * s.table * c + reduced if tables else own * c)
    if s.zero.offloads_optimizer:
        return before, before + head, end, before
    # before they are cast DeepSpeed takes the norm of each piece, in float64
    largest = min(max(tables, default=0), part(s, sum(tables)))
    step = max(own * FLOAT32, largest * FLOAT64) + (kept if s.zero.stage == 2 else before)
    return before, before + head, end, step
