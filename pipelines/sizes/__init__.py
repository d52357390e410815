"""The sizes: everything that differs by model size, one YAML file each, typed and validated.

Pipeline defaults, rendered manifests and docs/pipeline.md's table come from here. `load("13b")` gives a `Size`; a wrong
field or value is an InputError that names the file and the field.
"""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from zhllama import models
from zhllama.artifacts.yaml_file import documents_of
from zhllama.errors import InputError
from zhllama.kubernetes.names import check_value, option_in
from zhllama.stage.command_line import nearest

FOLDER = Path(__file__).parent
STAGES = ("embeddings", "lora", "sft")
"""The three trainings: continued pre-training's two stages, then instruction tuning."""

RECIPE = ("tiny", "7b", "13b", "33b", "65b")
"""The sizes of LLaMA 1 and 2; others are called after their model."""
SIZED = {"warmup_steps": "warmup_ratio", "weight_decay": "weight_decay", "save_steps": "save_steps",
         "deepspeed": "deepspeed"}  # fmt: skip
"""Options of a training that a size says and that are written into the compiled pipeline → what sizes call them."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The shape of the model. The weights that are trained say their own; this is what the planner reckons with."""

    width: int
    """Of the hidden states."""
    layers: int
    heads: int
    """Of attention."""
    feed_forward: int
    """Width within a layer's second half."""
    type: str = "llama"
    """model_type of its config.json."""
    key_value_heads: int = 0
    """Heads of keys and values, which several of attention share; 0: each has its own."""
    head_width: int = 0
    """Of one head; 0: width / heads."""
    tied: bool = False
    """Whether the embedding is the head as well."""
    rows: int = 32_000
    """Of the embedding, before any piece is added."""

    @property
    def kind(self) -> models.Architecture:
        """What is known of its architecture."""
        return models.architecture({"model_type": self.type}, f"the size's model.type {self.type}")

    def config(self, rows: int = 0) -> dict[str, Any]:
        """As config.json says it, with so many rows (0: its own)."""
        return {
            "model_type": self.type, "vocab_size": rows or self.rows, "hidden_size": self.width,
            "intermediate_size": self.feed_forward, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.key_value_heads or None,
            "head_dim": self.head_width or None, "tie_word_embeddings": self.tied,
        }  # fmt: skip

    def sizes(self, rows: int = 0) -> dict[str, int]:
        """By name, as zhllama.models has them."""
        return self.kind.sizes(self.config(rows))


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The shape of the LoRA matrices: W + (alpha / rank) · B·A."""

    rank: int
    alpha: int
    dropout: float


@dataclass(frozen=True, kw_only=True)
class Pod:
    """What a pod may use: Kubernetes quantities."""

    cpu: str
    memory: str
    ephemeral_storage: str
    """Of the node's disk: a step's /tmp, the copies of base model and data."""


@dataclass(frozen=True, kw_only=True)
class Step(Pod):
    """The pod of a step of the pipeline."""

    deadline_seconds: int
    """The pod is ended after this long."""


@dataclass(frozen=True, kw_only=True)
class EvaluationStep(Step):
    gpu: bool
    """Whether it runs on a GPU, and not in float32 on processors. A model has to fit one GPU for that."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The kinds of steps that a pipeline has beside its trainings."""

    control: Step
    """Those that pass references on, and those that start and follow jobs."""
    data: Step
    """Weights as they come, texts, instructions, datasets."""
    weights: Step
    """Those that stream a whole model: convert, extend, merge."""
    evaluation: EvaluationStep
    """Those that run a model."""


@dataclass(frozen=True, kw_only=True)
class Training(Pod):
    """One training and the pods it runs on."""

    steps: int
    """Optimizer steps."""
    learning_rate: float
    batch: int
    """Blocks per process and forward pass."""
    accumulation: int
    """Forward passes per optimizer step."""
    warmup_ratio: float
    """Share of the steps over which the rate rises."""
    weight_decay: float
    save_steps: int
    """Steps between checkpoints."""
    deepspeed: Literal["zero2", "zero2_offload", "zero3", "none"]
    """A configuration that ships with the training (docs/training.md)."""
    nodes: int
    processes_per_node: int
    """One per GPU."""
    gpu: str
    """The resource name of a GPU, one per process; empty for none."""
    shared_memory: str
    """Size of /dev/shm."""
    deadline_seconds: int
    """The job is ended after this long (waiting in a queue not counted)."""
    arguments: str
    """More options of the training's command, as one text."""

    @property
    def gpus(self) -> int:
        """GPUs on each node."""
        return self.processes_per_node if self.gpu else 0

    @property
    def processes(self) -> int:
        return self.nodes * self.processes_per_node

    @property
    def global_batch(self) -> int:
        """Blocks per optimizer step, over all processes."""
        return self.batch * self.accumulation * self.processes


@dataclass(frozen=True, kw_only=True)
class Serving(Pod):
    """The pods that serve a model."""

    replicas: int
    gpus: int
    """Of a pod; the model is split between them."""
    gpu: str
    """The resource name of a GPU; empty: this size is not served on a cluster."""
    shared_memory: str
    context_length: int
    """Tokens of prompt and answer together."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """One model size."""

    name: str
    model: Architecture
    shards: int = 1
    """consolidated.NN.pth files, where it is Meta's release that is fetched."""
    vocab_size: int
    """Pieces of the Chinese tokenizer, before it is merged into the base's; of continued merges, the new ones."""
    block_size: int
    """Tokens per training block."""
    validation_fraction: float
    adapter: Adapter
    sft_trains_embeddings: bool
    """Whether instruction tuning trains embed_tokens and lm_head too, as the recipe does. Without it the adapter is a
    plain LoRA, which serving engines load as it is."""
    work: Work
    embeddings: Training
    lora: Training
    sft: Training
    serving: Serving
    tokenizer: Literal["train", "continue", "keep"] = "train"
    """What becomes of the base's vocabulary: a SentencePiece model is trained and appended, its own merges are
    continued, or it is kept."""
    questions: int = 0
    """Questions with known answers that the evaluation asks in each language."""
    require: str = ""
    """What has to hold of the result before it is deployed (zhllama/stage/requirements.py)."""

    @property
    def served_as(self) -> str:
        """What the served model is called where nothing is said: a name that Kubernetes takes."""
        return f"llama-{self.name}" if self.name in RECIPE else self.name.replace(".", "-")

    def training(self, stage: str) -> Training:
        """The training of a stage: embeddings, lora or sft."""
        if stage not in STAGES:
            raise InputError(f"there is no training stage {stage!r}{nearest(stage, STAGES)}; use {', '.join(STAGES)}")
        return typing.cast(Training, getattr(self, stage))


Record = TypeVar("Record")


def names() -> list[str]:
    """The sizes that there are: the recipe's, smallest first, then those of today."""
    return [*RECIPE, *sorted({path.stem for path in FOLDER.glob("*.yaml")} - {*RECIPE})]


def load(name: str) -> Size:
    """The size of that name. InputError names the nearest when there is none."""
    wanted = "33b" if name.lower() == "30b" else name.lower()
    if wanted not in names():
        raise InputError(f"there is no size {name!r}{nearest(wanted, names())}; the sizes are {', '.join(names())}")
    return read(FOLDER / f"{wanted}.yaml")


def read(path: Path) -> Size:
    """A size from a YAML file, checked. InputError names the file and the field."""
    size = record(Size, read_yaml(path, path.name), path.name)
    if size.name != path.stem:
        raise InputError(f"{path.name}: name: {size.name!r} where the file's name says {path.stem!r}")
    return size


def read_yaml(path: Path, called: str) -> Any:
    """What is in a YAML file. InputError names it as it is `called`."""
    try:
        value, *more = documents_of(path.read_bytes()) or [None]
        if more:
            raise ValueError("it holds several documents")
        return value
    except (OSError, ValueError) as error:
        raise InputError(f"{called}: not a readable YAML file ({' '.join(str(error).split())})") from error


def record(kind: type[Record], value: Any, file: str, prefix: str = "", **known: Any) -> Record:
    """A dataclass from a mapping: every field there or `known`, none else, each of its type and in its range."""
    if not isinstance(value, Mapping):
        where = f"{file}: {prefix.rstrip('.')}" if prefix else file
        raise InputError(f"{where}: {value!r} where a mapping is needed")
    hints = typing.get_type_hints(kind)
    for name in value:
        if name not in hints:
            raise InputError(f"{file}: there is no field {prefix}{name}{nearest(str(name), hints)}")
    for name, hint in hints.items():
        # a field's default is an attribute of its class
        if name in known or (name not in value and hasattr(kind, name)):
            continue
        if name not in value:
            raise InputError(f"{file}: the field {prefix}{name} is missing")
        if dataclasses.is_dataclass(hint):
            known[name] = record(typing.cast(type, hint), value[name], file, f"{prefix}{name}.")
        else:
            known[name] = _scalar(hint, name, value[name], f"{file}: {prefix}{name}")
    return kind(**known)


_RATIOS = ("validation_fraction", "warmup_ratio", "dropout", "weight_decay")
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _scalar(hint: Any, name: str, value: Any, field: str) -> Any:
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise InputError(f"{field}: {value!r}; use {' or '.join(typing.get_args(hint))}")
        return value
    if name == "type" and value not in models.ARCHITECTURES:
        raise InputError(f"{field}: {value!r}; use {' or '.join(models.ARCHITECTURES)}")
    if isinstance(value, bool) != (hint is bool) or not isinstance(value, (int, float) if hint is float else hint):
        raise InputError(f"{field}: {value!r} where {WORDS[hint]} is needed")
    if name in _RATIOS and not 0 <= value < 1:
        raise InputError(f"{field}: {value} is not in [0, 1)")
    if name not in _RATIOS and hint in (int, float) and value <= 0:
        raise InputError(f"{field}: {value} where a positive number is needed")
    check_pod(name, value, field)
    return hint(value)


def check_pod(name: str, value: Any, where: str) -> None:
    """InputError for a value that Kubernetes does not take, by the name of what it is."""
    option = "gpu_resource" if name == "gpu" and isinstance(value, str) else option_in(name)
    if option:
        check_value(option, value, where)
