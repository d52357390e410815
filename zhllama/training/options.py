"""The options of a training, named as in transformers' TrainingArguments where it has them. No torch here: the
launcher checks a command line against these classes before it starts a job in an image that has torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from zhllama.artifacts.json_file import value_of
from zhllama.artifacts.manifest import Input, digest_of
from zhllama.errors import InputError
from zhllama.stage.options import Later, NotKeyed, Ref, StageOptions, option_of

SHIPPED_DEEPSPEED = ("zero2", "zero2_offload", "zero3")
"""Names that `--deepspeed` takes instead of a path: JSON files beside this one. docs/training.md says which is for
what."""
_NO_ROWS = "nothing of the embeddings is trained; leave it out, or train them"
_NO_FILE = f"no such file; give a JSON file, {', '.join(SHIPPED_DEEPSPEED)} or none"

EACH_RUN = {
    "max_steps": "steps",
    "learning_rate": "learning_rate",
    "per_device_train_batch_size": "batch",
    "gradient_accumulation_steps": "accumulation",
    "embedding_lr": "embedding_learning_rate",
}
"""Options that a run of a compiled pipeline may change → what sizes and settings call them."""

_ABOVE_0 = (
    "num_train_epochs", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps",
    "per_device_eval_batch_size", "logging_steps", "save_total_limit", "ddp_timeout",
)  # fmt: skip
_AT_LEAST_0 = (
    "seed", "embedding_lr", "warmup_steps", "weight_decay", "max_grad_norm", "eval_steps", "save_steps", "peak_tflops",
    "max_minutes_without_checkpoint", "replay_share", "forgetting_budget", "ema",
)  # fmt: skip
_SHARE = 0.1
_OF_REPLAY = ("forgetting_budget", "forgetting_base")
_NOT_REPLAYED = "there is no replay text to do it with; give --replay, or leave it out"
_NOT_MEASURED = "a number above 0 is needed to measure --forgetting-budget"


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(StageOptions):
    """What every training takes."""

    cache_version: ClassVar[int] = 2
    steps_version: ClassVar[int] = 1
    """Of what a step computes: checkpoints of another one are not gone on with. What is published around the trained
    weights (a chat template, say) raises `cache_version` alone, and what was under way goes on."""
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "peft", "accelerate", "deepspeed")

    model: Ref
    """Reference to the model that is trained (a Hugging Face model)."""
    dataset: Ref
    """Reference to the packed dataset, made with this model's tokenizer."""
    max_steps: int = -1
    """Optimizer steps; -1: as many as `num_train_epochs` gives."""
    num_train_epochs: float = 1.0
    """Passes over the dataset, when `max_steps` does not say."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    embedding_lr: float = 0.0
    """Peak learning rate of embed_tokens and lm_head; 0: as `learning_rate`."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup", "polynomial"] = "cosine"
    """LR schedule after warmup."""
    warmup_steps: float = 0.05
    """Warmup: a number of steps, or (below 1) a share of them."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    per_device_train_batch_size: int = 8
    """Blocks per process and forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step."""
    per_device_eval_batch_size: NotKeyed[int] = 8
    """Blocks per process and pass of an evaluation."""
    seed: int = 42
    """One seed for every node: order of the data, dropout, LoRA's initial values."""
    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of the computation; trainable weights keep float32 masters. auto: bfloat16 on a GPU, float32 on a CPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    faithful: bool = False
    """The recipe's batches, for comparison: padded to the longest, documents of a block not kept apart."""
    peak_tflops: NotKeyed[float] = 0.0
    """What one GPU can do at best, in TFLOP/s, for the utilisation (MFU) in the log; 0: known by its name."""
    logging_steps: NotKeyed[int] = 10
    """Steps between two lines of metrics.jsonl."""
    eval_steps: int = 250
    """Steps between two evaluations; 0: only after the last step."""
    save_steps: NotKeyed[int] = 500
    """Steps between two checkpoints; 0: none."""
    deepspeed: str = "zero2"
    """DeepSpeed configuration: zero2, zero2_offload, zero3, a JSON file, or `none` for plain data parallelism."""
    save_total_limit: NotKeyed[int] = 3
    """Checkpoints that are kept in the store."""
    resume_from_checkpoint: NotKeyed[str] = ""
    """Reference to the checkpoint to go on from; empty: the newest of this training, if there is one."""
    publish_checkpoint: Ref = ""
    """Reference to a checkpoint of this training: publish it as the training's result would be, and train nothing."""
    max_minutes_without_checkpoint: NotKeyed[float] = 120.0
    """Minutes for which checkpoints may fail to reach the store before the training stops; 0: it never does."""
    ddp_timeout: NotKeyed[int] = 30_000
    """Seconds that a collective operation may take."""

    replay: Ref = ""
    """Reference to a packed dataset of what must not be lost, made like the dataset; mixed into every step."""
    replay_share: Later[float] = _SHARE
    """Share of a step's learned tokens that are of --replay, in place of the dataset's; a budget moves it."""
    forgetting_budget: Later[float] = 0.0
    """By how much of itself the loss of held-out --replay text may rise over the base's (0.03: 3%), in bits per byte
    likewise: replay and learning rate are steered by it, every --eval-steps. 0: they stay as they are."""
    forgetting_base: Ref = ""
    """Reference to an earlier training of the same course with the same --replay: the budget counts from where that one
    counted from. Without it: from this training's own step 0."""
    ema: Later[float] = 0.0
    """Publish an average of the weights over the course in place of the last ones: what is kept of it in a step, at
    most (0.999, say). 0: the last ones."""

    adapter: Ref = ""
    """Reference to an adapter to go on from; its LoRA shape is kept."""
    lora_r: int = 0
    """LoRA rank; 0: 8, or the continued adapter's."""
    lora_alpha: float = 0.0
    """LoRA alpha; 0: 32, or the continued adapter's."""
    lora_dropout: float = -1.0
    """LoRA dropout; below 0: 0.05, or the continued adapter's."""
    lora_targets: str = ""
    """Layers that get LoRA weights, by the last part of their name, comma-separated. Not given: every projection of a
    layer, or the continued adapter's."""
    embedding_rows: Literal["auto", "all", "new"] = "auto"
    """Rows of embed_tokens and lm_head that are trained, where they are: all (the recipe), or those that
    extend_tokenizer added, for a fraction of the optimizer's memory. auto: all, or the continued adapter's."""

    def __post_init__(self) -> None:
        rows = sorted({"embed_tokens", "lm_head"}.intersection(self.targets))
        words, path = ("none", *SHIPPED_DEEPSPEED), Path(self.deepspeed)
        # which file, only the place where it trains knows
        file = path.suffix == ".json" or "/" in self.deepspeed or path.is_file()
        whole = self.warmup_steps < 1 or self.warmup_steps % 1 == 0
        for name, holds, mend in (
            *((name, getattr(self, name) > 0, "a number above 0 is needed") for name in _ABOVE_0),
            *((name, getattr(self, name) >= 0, "a number of at least 0 is needed") for name in _AT_LEAST_0),
            ("max_steps", self.max_steps > 0 or self.max_steps == -1, "give a number of steps, or -1"),
            ("seed", 0 <= self.seed < 2**32, "a number from 0 to 4294967295 is needed"),
            ("warmup_steps", whole, "give whole steps, or a share below 1"),
            ("seed", self.seed < 2**32, "a number below 4294967296 is needed"),
            ("deepspeed", file or self.deepspeed in words, _NO_FILE),
            ("lora_r", self.lora_r >= 0, "a rank of at least 1 is needed (0: the default)"),
            ("lora_alpha", self.lora_alpha >= 0, "a number above 0 is needed (0: the default)"),
            ("lora_dropout", self.lora_dropout < 1, "a share below 1 is needed"),
            ("lora_targets", bool(self.targets) or not self.lora_targets, "name at least one layer"),
            ("embedding_rows", self.embedding_rows == "auto" or self.trains_embeddings or self.adapter, _NO_ROWS),
            ("replay_share", self.replay_share < 1, "a share below 1 is needed"),
            ("ema", self.ema < 1, "a share below 1 is needed"),
            ("replay_share", self.replay or self.replay_share == _SHARE, _NOT_REPLAYED),
            *((name, self.replay or not getattr(self, name), _NOT_REPLAYED) for name in _OF_REPLAY),
            ("eval_steps", self.eval_steps or not self.forgetting_budget, _NOT_MEASURED),
            (
                "faithful",
                not (self.faithful and self.replay),
                "--replay is none of the recipe's; leave one of them out",
            ),
            *(("lora_targets", False, f"{row} is trained by rows, not by LoRA; leave it out") for row in rows),
        ):
            if not holds:
                raise InputError(f"{option_of(name)} {getattr(self, name)}: {mend}")

    def more_inputs(self) -> dict[str, Input]:
        """What a DeepSpeed file of one's own says: edited, it is another training's."""
        if self.deepspeed in ("none", *SHIPPED_DEEPSPEED):
            return {}
        return {"deepspeed": Input(str(Path(self.deepspeed).absolute()), digest_of(deepspeed_settings(self)))}

    @property
    def targets(self) -> list[str]:
        """The layers named by `lora_targets`; empty when it is not given."""
        return [name.strip() for name in self.lora_targets.split(",") if name.strip()]

    @property
    def gives_adapter(self) -> bool:
        """Whether the result is an adapter, and not a model."""
        return True

    @property
    def trains_embeddings(self) -> bool:
        """Whether embed_tokens and lm_head are trained; a continued adapter decides this itself."""
        return True

    @property
    def trained_rows(self) -> Literal["", "all", "new"]:
        """Of the embeddings in a new adapter: nothing, all rows, or the new ones."""
        return ("new" if self.embedding_rows == "new" else "all") if self.trains_embeddings else ""


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(TrainingOptions):
    """Continue the pre-training of a model on text."""

    PROGRAM: ClassVar[str] = "components.pretrain"

    stage: Literal["embeddings", "lora"]
    """embeddings: all but embed_tokens is frozen, gives a model; lora: LoRA, embed_tokens and lm_head, an adapter."""
    also_lm_head: bool = False
    """With `--stage embeddings`: train lm_head too."""
    freeze_embeddings: Later[bool] = False
    """With `--stage lora`: leave embed_tokens and lm_head as they are, and train LoRA alone: for a base that keeps its
    vocabulary."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage == "embeddings" and self.adapter:
            said = "--stage embeddings trains no adapter; leave it out, or merge it"
            raise InputError(f"--adapter {self.adapter}: {said}")
        if self.stage == "lora" and self.also_lm_head:
            raise InputError("--also-lm-head: --stage lora always trains lm_head; leave the option out")
        if self.stage == "embeddings" and self.freeze_embeddings:
            raise InputError("--freeze-embeddings: --stage embeddings trains nothing else; leave it out")
        if self.stage == "embeddings" and self.embedding_rows == "new":
            raise InputError("--embedding-rows new: --stage embeddings trains all rows; leave it out, or use lora")

    @property
    def gives_adapter(self) -> bool:
        return self.stage == "lora"

    @property
    def trains_embeddings(self) -> bool:
        return not self.freeze_embeddings


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(TrainingOptions):
    """Tune a model on instructions."""

    PROGRAM: ClassVar[str] = "components.finetune"

    learning_rate: float = 1e-4
    """Peak learning rate."""
    warmup_steps: float = 0.03
    """Warmup: a number of steps, or (below 1) a share of them."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    train_embeddings: bool = False
    """Train embed_tokens and lm_head too. A continued adapter decides this itself."""

    @property
    def trains_embeddings(self) -> bool:
        return self.train_embeddings


def deepspeed_settings(options: TrainingOptions) -> dict[str, Any] | None:
    """What `--deepspeed` says, what it leaves open being as the options say; None for `none`. InputError when it cannot
    be read or contradicts the options."""
    if options.deepspeed == "none":
        return None
    path, where = Path(options.deepspeed), f"--deepspeed {options.deepspeed}"
    if options.deepspeed in SHIPPED_DEEPSPEED:
        path = Path(__file__).with_name(f"{options.deepspeed}.json")
    elif not path.is_file():
        raise InputError(f"{where}: {_NO_FILE}")
    try:
        settings: dict[str, Any] = value_of(path.read_bytes())
    except (ValueError, OSError) as error:
        raise InputError(f"{where}: not a readable JSON file ({error})") from error
    if not isinstance(settings, dict):
        raise InputError(f"{where}: a JSON object is needed; docs/training.md shows one")
    for name in ("zero_optimization", "fp16", "bf16"):
        if not isinstance(settings.get(name, {}), dict):
            raise InputError(f"{where}: {name} is {json.dumps(settings[name])} where an object is needed")
    for name, option, value in (
        ("train_micro_batch_size_per_gpu", "--per-device-train-batch-size", options.per_device_train_batch_size),
        ("gradient_accumulation_steps", "--gradient-accumulation-steps", options.gradient_accumulation_steps),
        ("gradient_clipping", "--max-grad-norm", options.max_grad_norm),
        ("train_batch_size", "the number of processes times their batch", "auto"),
        ("fp16.enabled", "--precision", options.precision),
        ("bf16.enabled", "--precision", options.precision),
    ):
        section, _, field = name.rpartition(".")
        found = (settings.setdefault(section, {}) if section else settings).setdefault(field, "auto")
        meant = value == {"fp16": "float16", "bf16": "bfloat16"}[section] if section else value
        if found != "auto" and (found is not meant if section else found != meant):
            raise InputError(f"{where}: {name} is {json.dumps(found)}, but {option} is {value}; write auto there")
    for name in ("optimizer", "scheduler"):
        if name in settings:
            instead = "--learning-rate, --embedding-lr, --weight-decay and --lr-scheduler-type"
            raise InputError(f"{where}: its {name} would take the place of {instead}; leave the section out")
    if settings.get("zero_optimization", {}).get("stage") not in (1, 2, 3):
        mend = "write one there, or give --deepspeed none"
        raise InputError(f"{where}: zero_optimization names no stage of 1, 2 or 3; {mend}")
    return settings


def zero_stage(settings: dict[str, Any] | None) -> int:
    """ZeRO's stage in a DeepSpeed configuration: what is kept in parts (2: optimizer and gradients, 3: weights too)."""
    return int(((settings or {}).get("zero_optimization") or {}).get("stage", 0))
