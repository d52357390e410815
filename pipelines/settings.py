"""What a run can be told: every name that `--set` and a team's file take, with its type, its default and what it means.

A setting is *compiled* (it decides the pipeline's shape, or is written into its steps) or a *parameter* of the compiled
pipeline, which each run may change. Where it is an option of a stage, type, default, choices and text are that option's
own; where the size file has a value, that is the default.
"""

import dataclasses
from collections.abc import Mapping
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
from pipelines.setting import Group, Setting
from pipelines.sizes import SIZED, STAGES, Training
from zhllama.kubernetes.pod_security import USER
from zhllama.stage.images import DIGESTS, REGISTRY, TAG
from zhllama.stage.options import PLUMBING, described, references_in
from zhllama.training.options import EACH_RUN, FinetuneOptions, PretrainOptions

OPTIONS: Mapping[str, type] = {"embeddings": PretrainOptions, "lora": PretrainOptions, "sft": FinetuneOptions}
"""Whose options each training has."""


TRAININGS = {"embeddings": "Embeddings", "lora": "LoRA", "sft": "Instruction tuning"}
"""The three trainings → what people call them."""


KINDS = {str: "text", int: "whole number", float: "number", bool: "true or false", dict: "JSON", list: "JSON list"}


MACHINE = (
    "processes_per_node", "gpu_resource", "cpu", "memory", "shared_memory", "ephemeral_storage", "deadline_seconds",
    "waiting_seconds", "grace_seconds", "attempts", "min_nodes", "max_nodes",
)  # fmt: skip
"""Options of launch_training that each training has a setting of its own for, as `lora_memory`; and one for all."""


_SIZE_FIELD = {"gpu_resource": "gpu"}


_SIZED = {one.name for one in dataclasses.fields(Training)}
"""What a size says of each training; the rest of MACHINE is launch_training's default."""


def of_all(option: str) -> str:
    """What the setting of an option of MACHINE is called that is for all three trainings."""
    return option if option in ("processes_per_node", "gpu_resource") else f"training_{option}"


def _all() -> list[Setting]:
    groups: list[Group] = []

    def group(heading: str) -> Group:
        groups.append(Group(heading))
        return groups[-1]

    first = group("")
    first.parameter("store", kind=str, default=None, note="Where everything is put: an s3:// prefix.")
    _model(group("The model"))
    _data(group("What it learns from"))
    _generated(group("Instructions that a model writes"))
    _shape(group("Which stages run"))
    _trainings(group("How it is trained"))
    _jobs(group("The training jobs"))
    for training in STAGES:
        _own_machine(group(f"{TRAININGS[training]}: a machine of its own"), training)
    _steps(group("The steps"))
    _places(group("Where pods run"))
    _secrets(group("Secrets, certificates, proxy"))
    _served(group("The served model"))
    _images(group("Images"))
    return [one for made in groups for one in made.found]


def _model(group: Group) -> None:
    group.compiled(
        "start", kind=Literal["weights", "model", "extended", "adapters"], default="weights",
        note="What the run starts from: weights as they were published, a ready model, a model with its Chinese "
        "vocabulary, or published adapters. Follows from the address that is given.",
    )  # fmt: skip
    group.compiled(
        "base", kind=Literal["weights", "model", "extended"], default=None,
        note="With start=adapters, what they are merged into; with start=extended, model is what the result is "
        "compared with. Follows from the addresses.",
    )  # fmt: skip
    group.parameter(
        "weights", (FetchWeights, "source"), default="", address=True,
        note="The model's weights: Meta's files or a Hugging Face model; an s3://, https:// or hf:// address.",
    )  # fmt: skip
    group.parameter("expect", (FetchWeights, "expect"), default="", address=True)
    group.compiled(
        "size", kind=str, default=lambda size: size.name,
        note="The model's size, which the weights must have; a label on what is made.",
    )  # fmt: skip
    group.parameter(
        "model", kind=str, default="", address=True, note="A model that is ready (a reference), instead of `weights`."
    )
    group.compiled(
        "tokenizer", kind=Literal["train", "given"], default="train",
        note="Whether the Chinese tokenizer is trained on `text` or given. Follows from chinese_tokenizer.",
    )  # fmt: skip
    group.parameter("chinese_tokenizer", (ExtendTokenizer, "chinese_tokenizer"), default="", address=True)
    group.parameter(
        "extended_model", kind=str, default="", address=True,
        note="A model with its Chinese vocabulary, instead of all that makes one.",
    )  # fmt: skip
    group.parameter(
        "adapters", kind=str, default="", address=True,
        note="Published adapters, in order: they are merged and measured, and nothing is trained.",
    )  # fmt: skip
    group.parameter(
        "lora_adapter", kind=str, default="", address=True,
        note="An adapter that the LoRA phase goes on from, trained on the model that comes in; the embeddings' phase "
        "is left out.",
    )  # fmt: skip
    group.parameter(
        "sft_adapter", kind=str, default="", address=True,
        note="An adapter that instruction tuning goes on from, trained on the model that comes to it.",
    )  # fmt: skip


def _data(group: Group) -> None:
    group.parameter(
        "text", (PrepareDataset, "text"), default="", address=True,
        note="Chinese text to learn from: folders or prefixes, with weights as in zh:0.9,en:0.1.",
    )  # fmt: skip
    group.parameter(
        "text_validation", kind=str, default="", address=True,
        note="Text that is held out; without it a share of `text` is.",
    )  # fmt: skip
    group.parameter(
        "english_text", (Evaluate, "english"), default="", address=True,
        note="English text, to measure what is forgotten.",
    )  # fmt: skip
    group.parameter("exams", (Evaluate, "exams"), default="", address=True)
    group.parameter(
        "instructions", (PrepareDataset, "instructions"), default="", address=True,
        note="Alpaca items to learn from. Or a word, which is compiled: given, import, generate (a model writes them) "
        "or none; it follows from what else is given.",
    )  # fmt: skip
    group.parameter(
        "instructions_validation", kind=str, default="", address=True,
        note="Items that are held out; without them a share of `instructions` is.",
    )  # fmt: skip
    group.parameter(
        "import_instructions", (GenerateInstructions, "import_from"), default="", address=True,
        note="Public data sets to take instructions from, where none are given.",
    )  # fmt: skip
    group.parameter(
        "prompts", (Generate, "input"), default="", address=True, note="A file of instructions that the result answers."
    )
    group.parameter(
        "prompt", (Generate, "prompt"), default="请介绍一下你自己。", note="What it answers without such a file."
    )
    group.parameter("vocab_size", (TrainTokenizer, "vocab_size"), fields=(("vocab_size",),))
    group.parameter("block_size", (PrepareDataset, "block_size"), fields=(("block_size",),))
    group.parameter("validation_fraction", (PrepareDataset, "validation_fraction"), fields=(("validation_fraction",),))
    group.parameter("evaluation", (PrepareDataset, "evaluation"), default="", address=True)
    group.compiled("skip_bad", (PrepareDataset, "skip_bad"))
    group.compiled("drop_near_duplicates", (PrepareDataset, "drop_near_duplicates"))


def _generated(group: Group) -> None:
    for name in (
        "items", "base_url", "model", "seeds", "against", "catalogue", "max_cost", "max_tokens", "price_prompt",
        "price_answer", "requests_per_minute", "tokens_per_minute",
    ):  # fmt: skip
        group.parameter(
            f"generate_{name}", (GenerateInstructions, name), address=name in ("seeds", "against", "catalogue")
        )
    group.compiled("generate_concurrency", (GenerateInstructions, "concurrency"))
    group.compiled("generate_batch", (GenerateInstructions, "batch"))
    group.compiled(
        "generate_secret", kind=str, default="zhllama-openai",
        note="Secret with its key, under OPENAI_API_KEY; it may be absent.",
    )  # fmt: skip


def _shape(group: Group) -> None:
    group.compiled(
        "run_pretraining", kind=bool, default=True,
        note="Whether there is continued pre-training (embeddings, then LoRA); false leaves out both of its phases.",
    )  # fmt: skip
    group.compiled(
        "run_stage1", kind=bool, default=True,
        note="Whether its first phase (the embeddings alone) runs. False with lora_adapter.",
    )  # fmt: skip
    group.compiled("run_sft", kind=bool, default=True, note="Whether there is instruction tuning.")
    group.compiled(
        "check_merge", kind=bool, default=lambda size: not size.sft.gpu,
        note="Whether both adapters are also merged in one call, which must give the same weights.",
    )  # fmt: skip
    group.compiled(
        "deploy", (Serve, "deploy"), note="Whether the result is served on the cluster: none, kubernetes or kserve."
    )


def _trainings(group: Group) -> None:
    for training, called in TRAININGS.items():
        options = OPTIONS[training]
        for option, name in EACH_RUN.items():
            sized = ((training, name),) if name in _SIZED else ()
            if sized or training == "lora":
                group.parameter(f"{training}_{name}", (options, option), of=called, fields=sized)
        group.compiled(f"{training}_nodes", (LaunchTraining, "nodes"), of=called, fields=((training, "nodes"),))
        for option in compiled_options(options):
            sized = ((training, SIZED[option]),) if option in SIZED else ()
            group.compiled(f"{training}_{option}", (options, option), of=called, fields=sized)
        group.compiled(
            f"{training}_arguments", (LaunchTraining, "arguments"), of=called, fields=((training, "arguments"),),
            note="More options of the training, as one text; they come last, and win.",
        )  # fmt: skip
    group.compiled(
        "sft_trains_embeddings", (FinetuneOptions, "train_embeddings"), of=TRAININGS["sft"],
        fields=(("sft_trains_embeddings",),),
    )  # fmt: skip
    for name in ("rank", "alpha", "dropout"):
        option = {"rank": "lora_r"}.get(name, f"lora_{name}")
        group.compiled(f"lora_{name}", (PretrainOptions, option), fields=(("adapter", name),))


def compiled_options(kind: type) -> list[str]:
    """Of a training's options, those that each of the three has a compiled setting for: no addresses, none that the
    launcher gives, none that has a name of its own for all trainings."""
    refs = references_in(kind)
    own = {"stage", "train_embeddings", "lora_r", "lora_alpha", "lora_dropout", "resume_from_checkpoint"}
    return [one for one in described(kind) if one not in {*PLUMBING, *refs, *own, *EACH_RUN}]


def _jobs(group: Group) -> None:
    group.parameter("backend", (LaunchTraining, "backend"))
    group.compiled(
        "namespace", (LaunchTraining, "namespace"), note="Where jobs and the served model are; empty, the run's own."
    )
    for option in MACHINE:
        field = _SIZE_FIELD.get(option, option)
        sized = tuple((training, field) for training in STAGES)
        note = "What the cluster calls a GPU; empty, none is used." if option == "gpu_resource" else ""
        if option == "gpu_resource":
            sized += (("serving", "gpu"),)
        # where the sizes say it, training by training, the setting for all three has no default of its own
        told: dict[str, Any] = {"fields": sized, "default": None} if field in _SIZED else {}
        group.compiled(of_all(option), (LaunchTraining, option), note=note, **told)
    group.compiled("training_account", (LaunchTraining, "service_account"), default="zhllama-training")
    for option in ("queue", "priority_class", "team"):
        group.compiled(option, (LaunchTraining, option))
    group.compiled(
        "labels", kind=dict, default={}, note="More labels of the jobs, the served model and their pods, as JSON."
    )
    group.compiled("annotations", kind=dict, default={}, note="Annotations of the jobs, as JSON.")


def _own_machine(group: Group, training: str) -> None:
    for option in MACHINE:
        field = _SIZE_FIELD.get(option, option)
        told: dict[str, Any] = {"fields": ((training, field),)} if field in _SIZED else {"default": None}
        group.compiled(f"{training}_{option}", (LaunchTraining, option), of=TRAININGS[training], **told)


def _steps(group: Group) -> None:
    kinds = {
        "control": "Of the steps that follow jobs",
        "data": "Of the steps that fetch weights, prepare data and deploy",
        "weights": "Of the steps that convert, extend and merge models",
        "evaluation": "Of the steps that run a model",
    }
    for kind, whose in kinds.items():
        for name, called in (("cpu", "CPU"), ("memory", "memory")):
            note = f"{whose}: {called}."
            group.compiled(f"{kind}_{name}", kind=str, note=note, fields=(("work", kind, name),))
    group.compiled(
        "evaluation_gpus", kind=str, default=lambda size: "1" if size.work.evaluation.gpu else "0",
        note="Of the steps that run a model: GPUs, 1 or 0; of no effect at a size whose steps have none.",
    )  # fmt: skip
    group.compiled("step_labels", kind=dict, default={}, note="More labels of the steps' pods, as JSON.")
    group.compiled("step_annotations", kind=dict, default={}, note="Annotations of the steps' pods, as JSON.")
    group.compiled(
        "run_as_user", kind=str, default=str(USER),
        note="The uid of the pods of steps, jobs and the served model; none leaves it to the cluster, as OpenShift "
        "wants it.",
    )  # fmt: skip
    group.compiled(
        "pull_policy", kind=Literal["", "Always", "IfNotPresent", "Never"], default="",
        note="When the steps' images are pulled; empty, the cluster's default.",
    )  # fmt: skip


def _places(group: Group) -> None:
    for gpu, whose in (
        ("", "steps without a GPU"),
        ("gpu_", "jobs, the served model and steps with a GPU"),
    ):
        group.compiled(f"{gpu}node_selector", kind=dict, default={}, note=f"Labels of the nodes for {whose}, as JSON.")
        group.compiled(
            f"{gpu}tolerations", kind=list, default=[], note=f"Taints that are tolerated by {whose}, as a JSON list."
        )


def _secrets(group: Group) -> None:
    group.compiled(
        "s3_secret", kind=str, default="zhllama-s3",
        note="Secret with the S3 settings, for steps, jobs and the served model; none, web identity.",
    )  # fmt: skip
    group.compiled(
        "pull_secret", kind=str, default="zhllama-pull", note="Secret to pull images with; it may be absent."
    )
    group.compiled(
        "proxy_secret", kind=str, default="zhllama-proxy",
        note="Secret with HTTPS_PROXY, HTTP_PROXY and NO_PROXY; it may be absent.",
    )  # fmt: skip
    group.compiled(
        "ca_config_map", kind=str, default="zhllama-ca",
        note="ConfigMap with certificates to trust (*.crt, *.pem); it may be absent.",
    )  # fmt: skip


def _served(group: Group) -> None:
    group.compiled(
        "serve_name", kind=str, default=lambda size: f"llama-{size.name}",
        note="What requests call the served model, and what its objects are called.",
    )  # fmt: skip
    for name in ("replicas", "gpus", "cpu", "memory", "shared_memory", "ephemeral_storage", "context_length"):
        group.compiled(f"serve_{name}", (Serve, name), fields=(("serving", name),))
    for name in ("stop_first", "openshift", "wait_minutes"):
        group.compiled(f"serve_{name}", (Serve, name))
    group.compiled("serve_image", (Serve, "vllm_image"))
    group.compiled(
        "serve_secret", kind=str, default="zhllama-api-key",
        note="Secret with the key that requests must give, under API_KEY.",
    )  # fmt: skip


def _images(group: Group) -> None:
    group.compiled("registry", kind=str, default="", note=f"Where the images are; empty: {REGISTRY}, or no registry.")
    group.compiled("tag", kind=str, default="", note=f"Of the images; empty: {TAG}, or this version.")
    group.compiled("digests", kind=str, default="", note=f"A file with the images' digests; empty: {DIGESTS}, or none.")


SETTINGS: Mapping[str, Setting] = {one.name: one for one in _all()}
