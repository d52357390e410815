"""What a run can be told: every name that `--set` and a team's file take, with its type, its default and what it means.

A setting is *compiled* (it decides the pipeline's shape, or is written into its steps) or a *parameter* of the compiled
pipeline, which each run may change. Where it is an option of a stage, type, default, choices and text are that option's
own; where the size file has a value, that is the default.
"""

import dataclasses
import functools
import operator
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from components.evaluate.options import Evaluate
from components.extend_tokenizer.options import ExtendTokenizer
from components.fetch_weights.options import FetchWeights
from components.generate.options import Generate
from components.generate_instructions.options import GenerateInstructions
from components.launch_training.options import LaunchTraining
from components.prepare_dataset.options import PrepareDataset
from components.serve.options import Serve
from components.train_tokenizer.options import TrainTokenizer
from pipelines.local.placeholders import Value
from pipelines.sizes import SIZED, STAGES, Serving, Size, Training
from zhllama.kubernetes.pods import USER
from zhllama.stage.images import DIGESTS, REGISTRY, TAG
from zhllama.stage.options import PLUMBING, described, references_in
from zhllama.training.options import EACH_RUN, FinetuneOptions, PretrainOptions

KINDS = {str: "text", int: "whole number", float: "number", bool: "true or false", dict: "JSON", list: "JSON list"}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One name."""

    name: str
    group: str
    kind: type
    """Of the value: str, int, float, bool; dict and list are JSON."""
    note: str
    default: Callable[[Size], Value]
    """None: it says nothing, and what is more general counts."""
    compiled: bool
    choices: tuple[str, ...] = ()
    address: bool = False
    """Whether it is a reference to data (several, comma-separated)."""
    fields: tuple[str, ...] = ()
    """Fields of the size that it stands over: ("lora.steps",)."""
    option: tuple[type, str] | None = None
    """Of a stage, whose option it is."""

    def described(self) -> tuple[str, str]:
        """For people: when it is said (compile, or run: each run may say it), and what kind of value it has."""
        return "compile" if self.compiled else "run", KINDS[self.kind]


class Settings(dict[str, Setting]):
    """By name, in the order in which they were declared."""

    _heading = ""

    def heading(self, text: str) -> None:
        """Those that follow stand under it."""
        self._heading = text

    def _add(
        self,
        name: str,
        option: tuple[type, str] | None = None,
        *,
        compiled: bool,
        kind: Any = None,
        default: Any = dataclasses.MISSING,
        note: str = "",
        of: str = "",
        fields: tuple[str, ...] = (),
        address: bool = False,
    ) -> None:
        """`option`: whose type, default and text are the setting's where nothing else is told; without one the type
        follows from the default. `of`: what the text is said of."""
        if option:
            one = described(option[0])[option[1]]
            kind, note = kind or one.kind, note or one.note
            default = one.default if default is dataclasses.MISSING and not fields else default
        kind = kind or type(default)
        reader = default if callable(default) else lambda _: default
        if fields and default is dataclasses.MISSING:
            reader = operator.attrgetter(fields[0])
        choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
        if of:
            # a sentence after a colon begins small, unless a name or CPU begins it
            note = f"{of}: {note if note[1:2].isupper() else note[:1].lower() + note[1:]}"
        self[name] = Setting(
            name=name, group=self._heading, kind=str if choices else kind, note=note, default=reader, compiled=compiled,
            choices=choices, address=address, fields=fields, option=option,
        )  # fmt: skip

    compiled = functools.partialmethod(_add, compiled=True)
    """What is decided when the pipeline is compiled."""
    parameter = functools.partialmethod(_add, compiled=False)
    """What a run of the compiled pipeline may change."""
    address = functools.partialmethod(_add, compiled=False, address=True, default="")
    """A parameter that is a reference to data."""


# --- the settings, heading by heading ---------------------------------------------------------------------------------

OPTIONS: Mapping[str, type] = {"embeddings": PretrainOptions, "lora": PretrainOptions, "sft": FinetuneOptions}
"""Whose options each training has."""
TRAININGS = {"embeddings": "Embeddings", "lora": "LoRA", "sft": "Instruction tuning"}
"""The three trainings → what people call them."""
MACHINE = (
    "processes_per_node", "gpu_resource", "cpu", "memory", "shared_memory", "ephemeral_storage", "deadline_seconds",
    "waiting_seconds", "starting_seconds", "grace_seconds", "attempts", "min_nodes", "max_nodes", "pods",
)  # fmt: skip
"""Options of launch_training that each training has a setting of its own for, as `lora_memory`; and one for all."""
_AS_JSON: dict[str, dict[str, Any]] = {"pods": {"kind": dict, "default": {}}}
"""Those of them that are JSON."""
GENERATED = (
    "items", "base_url", "model", "seeds", "against", "catalogue", "max_cost", "max_tokens", "price_prompt",
    "price_answer", "requests_per_minute", "tokens_per_minute",
)  # fmt: skip
"""Options of generate_instructions that a run may change, as `generate_items`."""
SERVED = (
    "replicas", "gpus", "cpu", "memory", "shared_memory", "ephemeral_storage", "context_length", "stop_first",
    "openshift", "istio", "wait_minutes",
)  # fmt: skip
"""Options of serve that have a setting each, as `serve_gpus`."""
ADAPTER = {"rank": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
"""What sizes say of the adapter → the trainings' options."""
STEERING = {
    "replay_share": "Of the tokens that a step learns, the share that is replayed; a budget moves it.",
    "forgetting_budget": "By how much of itself the loss of replayed text that is held out (and with it its bits per "
    "byte) may rise over the base's, by all trainings together (0.03: 3%): it steers what is replayed and the learning "
    "rate. 0: nothing is steered.",
    "ema": "Of an average of the weights that is published in place of the last ones: what is kept in a step, at most "
    "(0.999, say). 0: the last ones are.",
}
"""Options that all trainings have together, in the pipeline's words."""
_SIZED = {one.name for one in dataclasses.fields(Training)}
"""What a size says of each training; the rest of MACHINE is launch_training's default."""


def of_all(option: str) -> str:
    """What the setting of an option of MACHINE is called that is for all three trainings."""
    return option if option in ("processes_per_node", "gpu_resource") else f"training_{option}"


def compiled_options(kind: type) -> list[str]:
    """Of a training's options, those that each of the three has a compiled setting for: no addresses, none that the
    launcher gives, none that has a name of its own for all trainings."""
    refs = references_in(kind)
    own = {"stage", "train_embeddings", "resume_from_checkpoint", *ADAPTER.values(), *STEERING}
    return [one for one in described(kind) if one not in {*PLUMBING, *refs, *own, *EACH_RUN}]


def _in_size(option: str) -> str:
    """The field of a size's training that says an option of MACHINE; "" where none does."""
    field = "gpu" if option == "gpu_resource" else option
    return field if field in _SIZED else ""


SETTINGS = Settings()
heading, compiled, parameter, address = SETTINGS.heading, SETTINGS.compiled, SETTINGS.parameter, SETTINGS.address

parameter("store", kind=str, default=None, note="Where everything is put: an s3:// prefix.")

heading("The model")
compiled(
    "start", kind=Literal["weights", "model", "extended", "adapters"], default="weights",
    note="What the run starts from: weights as they were published, a ready model, a model with its Chinese "
    "vocabulary, or published adapters. Follows from the address that is given.",
)  # fmt: skip
compiled(
    "base", kind=Literal["weights", "model", "extended"], default=None,
    note="With start=adapters, what they are merged into; with start=extended, model is what the result is "
    "compared with. Follows from the addresses.",
)  # fmt: skip
address(
    "weights", (FetchWeights, "source"),
    note="The model's weights: Meta's files or a Hugging Face model; an s3://, https:// or hf:// address.",
)  # fmt: skip
address("expect", (FetchWeights, "expect"))
compiled(
    "size", kind=str, default=lambda size: size.name,
    note="The model's size, which the weights must have; a label on what is made.",
)  # fmt: skip
address("model", note="A model that is ready (a reference), instead of `weights`.")
compiled(
    "tokenizer", kind=Literal["train", "continue", "given", "keep"], default=operator.attrgetter("tokenizer"),
    note="The vocabulary: train a SentencePiece model on `text` and append it, continue a byte-level base's own merges "
    "on `text`, append a given one, or keep the base's as it is. Given follows from chinese_tokenizer.",
)  # fmt: skip
address("chinese_tokenizer", (ExtendTokenizer, "chinese_tokenizer"))
address("extended_model", note="A model with its Chinese vocabulary, instead of all that makes one.")
address("adapters", note="Published adapters, in order: they are merged and measured, and nothing is trained.")
address(
    "lora_adapter",
    note="An adapter that the LoRA phase goes on from, trained on the model that comes in; the embeddings' phase "
    "is left out.",
)
address("sft_adapter", note="An adapter that instruction tuning goes on from, trained on the model that comes to it.")

heading("What it learns from")
address(
    "text", (PrepareDataset, "text"),
    note="Chinese text to learn from: folders or prefixes, with weights as in zh:0.9,en:0.1.",
)  # fmt: skip
address("text_validation", note="Text that is held out; without it a share of `text` is.")
address(
    "english_text", (Evaluate, "english"),
    note="English text, to measure what is forgotten. Where it is replayed, on its held-out part alone.",
)  # fmt: skip
compiled(
    "replay", kind=Literal["auto", "text", "own", "none"], default="auto",
    note="What must not be lost, mixed into every training. text: `replay_text`, or without it `english_text`, a tenth "
    "of it held out. own: text that the base writes itself. auto: text where it is given, else none.",
)  # fmt: skip
address("replay_text", note="Text in the languages that must not be lost, to learn from beside `text`.")
parameter(
    "replay_documents", (Generate, "replay_documents"), default=2000,
    note="With replay=own: documents that the base writes; those that are no good are left out.",
)  # fmt: skip
for name, note in STEERING.items():
    compiled(name, (PretrainOptions, name), note=note)
address("exams", (Evaluate, "exams"))
address(
    "instructions", (PrepareDataset, "instructions"),
    note="Alpaca items or conversations to learn from. Or a word, which is compiled: given, import, generate (a model "
    "writes them) or none; it follows from what else is given.",
)  # fmt: skip
address("instructions_validation", note="Items that are held out; without them a share of `instructions` is.")
address(
    "import_instructions", (GenerateInstructions, "import_from"),
    note="Public data sets to take instructions from, where none are given.",
)  # fmt: skip
compiled("template", (PrepareDataset, "template"))
address(
    "prompts", (Generate, "input"),
    note="A file of instructions that the result answers, and in the report every model that is compared.",
)  # fmt: skip
parameter("prompt", (Generate, "prompt"), default="请介绍一下你自己。", note="What it answers without such a file.")
parameter("vocab_size", (TrainTokenizer, "vocab_size"), fields=("vocab_size",))
parameter("block_size", (PrepareDataset, "block_size"), fields=("block_size",))
parameter("validation_fraction", (PrepareDataset, "validation_fraction"), fields=("validation_fraction",))
address("evaluation", (PrepareDataset, "evaluation"))
compiled("skip_bad", (PrepareDataset, "skip_bad"))
compiled("drop_near_duplicates", (PrepareDataset, "drop_near_duplicates"))

heading("Instructions that a model writes")
for name in GENERATED:
    declare = address if name in ("seeds", "against", "catalogue") else parameter
    declare(f"generate_{name}", (GenerateInstructions, name))
compiled("generate_concurrency", (GenerateInstructions, "concurrency"))
compiled("generate_batch", (GenerateInstructions, "batch"))
compiled(
    "generate_secret", default="zhllama-openai", note="Secret with its key, under OPENAI_API_KEY; it may be absent."
)

heading("Which stages run")
compiled(
    "run_pretraining", default=True,
    note="Whether there is continued pre-training (embeddings, then LoRA); false leaves out both of its phases.",
)  # fmt: skip
compiled(
    "run_stage1", default=True,
    note="Whether its first phase (the embeddings alone) runs. False with lora_adapter, and with tokenizer=keep unless "
    "it is said.",
)  # fmt: skip
compiled("run_sft", default=True, note="Whether there is instruction tuning.")
compiled(
    "check_merge", kind=bool, default=lambda size: not size.sft.gpu,
    note="Whether both adapters are also merged in one call, which must give the same weights.",
)  # fmt: skip
compiled("deploy", (Serve, "deploy"), note="Whether the result is served on the cluster: none, kubernetes or kserve.")

heading("What the result is asked, and what has to hold")
parameter("questions", (Evaluate, "questions"), fields=("questions",))
parameter("require", (Evaluate, "require"), fields=("require",))

heading("How it is trained")
for training, called in TRAININGS.items():
    options = OPTIONS[training]
    for option, name in EACH_RUN.items():
        sized = (f"{training}.{name}",) if name in _SIZED else ()
        if sized or training == "lora":
            parameter(f"{training}_{name}", (options, option), of=called, fields=sized)
    compiled(f"{training}_nodes", (LaunchTraining, "nodes"), of=called, fields=(f"{training}.nodes",))
    for option in compiled_options(options):
        if (training, option) == ("embeddings", "freeze_embeddings"):
            # it would train nothing
            continue
        sized = (f"{training}.{SIZED[option]}",) if option in SIZED else ()
        compiled(f"{training}_{option}", (options, option), of=called, fields=sized)
    compiled(
        f"{training}_arguments", (LaunchTraining, "arguments"), of=called, fields=(f"{training}.arguments",),
        note="More options of the training, as one text; they come last, and win.",
    )  # fmt: skip
compiled(
    "sft_trains_embeddings", (FinetuneOptions, "train_embeddings"), of=TRAININGS["sft"],
    fields=("sft_trains_embeddings",),
)  # fmt: skip
for name, option in ADAPTER.items():
    compiled(f"lora_{name}", (PretrainOptions, option), fields=(f"adapter.{name}",))

heading("The training jobs")
parameter("backend", (LaunchTraining, "backend"))
compiled("namespace", (LaunchTraining, "namespace"), note="Where jobs and the served model are; empty, the run's own.")
for option in MACHINE:
    # where the sizes say it, training by training, the setting for all three has no default of its own
    told: dict[str, Any] = {}
    if field := _in_size(option):
        told = {"fields": tuple(f"{training}.{field}" for training in STAGES), "default": None}
    if option == "gpu_resource":
        told["fields"] += ("serving.gpu",)
        told["note"] = "What the cluster calls a GPU; empty, none is used."
    compiled(of_all(option), (LaunchTraining, option), **told | _AS_JSON.get(option, {}))
compiled("training_account", (LaunchTraining, "service_account"), default="zhllama-training")
for option in ("queue", "priority_class", "team"):
    compiled(option, (LaunchTraining, option))
compiled("labels", default={}, note="More labels of the jobs, the served model and their pods, as JSON.")
compiled("annotations", default={}, note="Annotations of the jobs, as JSON; those that are read on pods land there.")

for training in STAGES:
    heading(f"{TRAININGS[training]}: a machine of its own")
    for option in MACHINE:
        field = _in_size(option)
        told = {"fields": (f"{training}.{field}",)} if field else {**_AS_JSON.get(option, {}), "default": None}
        compiled(f"{training}_{option}", (LaunchTraining, option), of=TRAININGS[training], **told)

heading("The steps")
for kind, whose in (
    ("control", "Of the steps that follow jobs"),
    ("data", "Of the steps that fetch weights, prepare data and deploy"),
    ("weights", "Of the steps that convert, extend and merge models"),
    ("evaluation", "Of the steps that run a model"),
):
    for name, called in (("cpu", "CPU"), ("memory", "memory")):
        compiled(f"{kind}_{name}", kind=str, note=f"{whose}: {called}.", fields=(f"work.{kind}.{name}",))
compiled(
    "evaluation_gpus", kind=str, default=lambda size: "1" if size.work.evaluation.gpu else "0",
    note="Of the steps that run a model: GPUs, 1 or 0; of no effect at a size whose steps have none.",
)  # fmt: skip
for option in ("max_bytes", "max_items", "max_prompts", "samples", "front"):
    compiled(f"evaluation_{option}", (Evaluate, option))
compiled("step_labels", default={}, note="More labels of the steps' pods, as JSON.")
compiled("step_annotations", default={}, note="Annotations of the steps' pods, as JSON.")
compiled(
    "run_as_user", default=str(USER),
    note="The uid of the pods of steps, jobs and the served model; none leaves it to the cluster, as OpenShift "
    "wants it.",
)  # fmt: skip
compiled(
    "pull_policy", kind=Literal["", "Always", "IfNotPresent", "Never"], default="",
    note="When the steps' images are pulled; empty, the cluster's default.",
)  # fmt: skip

heading("Where pods run")
for gpu, whose in (("", "steps without a GPU"), ("gpu_", "jobs, the served model and steps with a GPU")):
    compiled(f"{gpu}node_selector", default={}, note=f"Labels of the nodes for {whose}, as JSON.")
    compiled(f"{gpu}tolerations", default=[], note=f"Taints that are tolerated by {whose}, as a JSON list.")

heading("Secrets, certificates, proxy")
compiled(
    "s3_secret", default="zhllama-s3",
    note="Secret with the S3 settings, for steps, jobs and the served model; none, web identity.",
)  # fmt: skip
compiled("pull_secret", default="zhllama-pull", note="Secret to pull images with; it may be absent.")
compiled(
    "proxy_secret", default="zhllama-proxy", note="Secret with HTTPS_PROXY, HTTP_PROXY and NO_PROXY; it may be absent."
)
compiled(
    "ca_config_map", default="zhllama-ca", note="ConfigMap with certificates to trust (*.crt, *.pem); it may be absent."
)

heading("The served model")
compiled(
    "serve_name", kind=str, default=operator.attrgetter("served_as"),
    note="What requests call the served model, and what its objects are called.",
)  # fmt: skip
for name in SERVED:
    sized = (f"serving.{name}",) if name in {one.name for one in dataclasses.fields(Serving)} else ()
    compiled(f"serve_{name}", (Serve, name), fields=sized)
compiled("serve_image", (Serve, "vllm_image"))
compiled("serve_secret", default="zhllama-api-key", note="Secret with the key that requests must give, under API_KEY.")

heading("Images")
compiled("registry", default="", note=f"Where the images are; empty: {REGISTRY}, or no registry.")
compiled("tag", default="", note=f"Of the images; empty: {TAG}, or this version.")
compiled("digests", default="", note=f"A file with the images' digests; empty: {DIGESTS}, or none.")
