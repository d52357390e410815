"""What the jobs of trainings and the served model are made of, as the steps that make them are told: one JSON argument,
written when the pipeline is compiled.

A launch_training with sixty inputs made Workflow nodes of 16 to 32 kB; they may not grow past a megabyte together. What
is wrong with a machine is said here, with the code that makes the job, and not after days of preparation.
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from components.generate_instructions.options import GenerateInstructions
from components.launch_training.command import parse_training
from components.launch_training.command import training_arguments as launched_arguments
from components.launch_training.options import LaunchTraining
from components.prepare_dataset.options import PrepareDataset
from components.serve.options import Serve
from components.train_tokenizer.options import TrainTokenizer
from pipelines.configuration import Configuration
from pipelines.local.placeholders import Value, text_of
from pipelines.settings import (
    ADAPTER,
    GENERATED,
    MACHINE,
    OPTIONS,
    SERVED,
    SETTINGS,
    STEERING,
    compiled_options,
    of_all,
)
from pipelines.sizes import SIZED, Size
from zhllama.errors import InputError
from zhllama.kubernetes.job_manifest import job_manifest
from zhllama.stage.command_line import parse
from zhllama.stage.options import StageOptions, described, option_of
from zhllama.training.options import EACH_RUN, TrainingOptions

_ANYWHERE = "s3://bucket/prefix"
_ALONE: Mapping[Any, Mapping[str, str]] = {
    TrainTokenizer: {"store": _ANYWHERE, "text": _ANYWHERE},
    PrepareDataset: {"store": _ANYWHERE, "text": _ANYWHERE, "tokenizer": _ANYWHERE},
    GenerateInstructions: {
        "store": _ANYWHERE, "base_url": "http://model/v1", "model": "one", "items": "1", "max_tokens": "1",
        "price_prompt": "1", "price_answer": "1",
    },
}  # fmt: skip
"""Stages whose options are numbers and the like → beside what each takes any good value of one of them."""


def training_options(size: Size, training: str, values: Mapping[str, Value]) -> dict[str, Any]:
    """Options of a training's command: what a size says, and what else was set (`values`, by the setting's name)."""
    of = size.training(training)
    of_command, names = described(OPTIONS[training]), EACH_RUN | SIZED
    options = {name: getattr(of, names[name]) for name in of_command if name in names and hasattr(of, names[name])}
    if training != "embeddings":
        # 0, 0 and -1 mean an adapter's own, which no size says
        options |= {option: values.get(f"lora_{name}", getattr(size.adapter, name)) for name, option in ADAPTER.items()}
    if training == "sft" and size.sft_trains_embeddings:
        options["train_embeddings"] = True
    for option in compiled_options(OPTIONS[training]):
        default = of_command[option].default
        if option not in SIZED and values.get(f"{training}_{option}", default) != default:
            options[option] = values[f"{training}_{option}"]
    return options


def fixed_arguments(told: Configuration, training: str) -> str:
    """What no run changes of them, as one text: launch_training's --arguments."""
    said = training_options(told.size, training, told.values)
    for option in STEERING if told.shape.replay != "none" else ("ema",):
        if told[option] != described(OPTIONS[training])[option].default:
            said[option] = told[option]
    options = {
        name: f"{value:g}" if isinstance(value, float) else value
        for name, value in said.items()
        if name not in EACH_RUN
    }
    return " ".join(filter(None, (as_words(options), told[f"{training}_arguments"])))


def as_words(options: Mapping[str, Any]) -> str:
    """Options as a shell reads them."""
    shown = {name: text_of(value) if isinstance(value, bool) else str(value) for name, value in options.items()}
    return shlex.join(word for name, value in shown.items() for word in (option_of(name), value))


def training_arguments(
    size: Size, stage: str, given: Mapping[str, str], more: str, values: Mapping[str, Value]
) -> list[str]:
    """The training's own arguments. InputError for what the training would not take."""
    _words(more)
    words = shlex.split(training_text(size, stage, more, values))
    return launched_arguments(stage=stage, output="", more=tuple(words), **{"adapter": "", **given})


def _words(arguments: str) -> list[str]:
    try:
        return shlex.split(arguments)
    except ValueError as error:
        raise InputError(f"--arguments {arguments}: {error}; quote it as in a shell") from error


def training_text(size: Size, stage: str, more: str, values: Mapping[str, Value]) -> str:
    """The training's options, as one text: the size's, and those that come last."""
    words = as_words(training_options(size, stage, values))
    return " ".join(filter(None, (words, size.training(stage).arguments, more)))


def planned_options(size: Size, stage: str, more: str, values: Mapping[str, Value]) -> TrainingOptions:
    """A training's options with the size's values, as its command reads them."""
    given = dict.fromkeys(("model", "dataset", "store"), "-")
    return parse_training(stage, training_arguments(size, stage, given, more, values))


def check_given(told: Configuration) -> None:
    """InputError, by the names of `--set`, for what no job and no server can be made of, and for what a stage would not
    take: of those that this course has, and of those that it leaves out where something was said of them."""
    for name in sorted(told.given & SETTINGS.keys()):
        stage, option = SETTINGS[name].option or (StageOptions, "")
        if stage in _ALONE and not SETTINGS[name].address and told[name] not in (None, ""):
            continued = {"base": _ANYWHERE} if stage is TrainTokenizer and told["tokenizer"] == "continue" else {}
            words = {**_ALONE[stage], **continued, option: text_of(told[name])}
            with _by_settings(told, {option: (name,)}):
                parse(stage, [f"{option_of(one)}={text}" for one, text in words.items()])
    shape = told.shape
    used = {name for name, runs in (("embeddings", shape.stage1), ("lora", shape.stage2), ("sft", shape.sft)) if runs}
    for training in OPTIONS:
        own = any(name.startswith(f"{training}_") for name in told.given)
        if training in used or own or (not used and any(of_all(option) in told.given for option in MACHINE)):
            training_machine(told, training)
    if told["deploy"] != "none" or any(name.startswith("serve_") for name in told.given):
        serving_machine(told)


def check_generation(told: Configuration) -> None:
    """InputError, by the names of `--set`, for a run whose instructions no model could be asked for: nobody is named,
    nothing says when to stop, … A pipeline that is only compiled may be told later."""
    if told.shape.instructions == "generate":
        names = {option: f"generate_{option}" for option in (*GENERATED, "concurrency", "batch")}
        words = [f"{option_of(option)}={text_of(told[name])}" for option, name in names.items() if told[name] != ""]
        called = names | {"import_from": "import_instructions"}
        with _by_settings(told, {option: (name,) for option, name in called.items()}):
            parse(GenerateInstructions, [f"--store={_ANYWHERE}", *words])


@contextmanager
def _by_settings(told: Configuration, names: Mapping[str, tuple[str, ...]]) -> Iterator[None]:
    """Errors name settings. names: option → the settings that it comes of; the first that was given, else the first.
    What was given as one text is left as it is there, after the text's own name."""
    texts = [one for one in names.get("arguments", ()) if one in told.given]
    within = {_named(word.partition("=")[0]) for one in texts for word in told[one].split() if word.startswith("--")}

    def setting(found: re.Match[str]) -> str:
        those = () if _named(found[0]) in within else names.get(_named(found[0]), ())
        return f"--set {next((one for one in those if one in told.given), those[0])}" if those else found[0]

    try:
        yield
    except InputError as error:
        said = _OPTION.sub(setting, str(error))
        # a word that is no option of a training can only be among those that are given as one text
        in_text = said.startswith("components.") or any(_named(one) in within for one in _OPTION.findall(str(error)))
        unnamed = in_text and texts and not said.startswith(f"--set {texts[0]} ")
        raise InputError(f"--set {texts[0]}: {said}" if unnamed else said) from error


_OPTION = re.compile(r"--[a-z0-9]+(?:[-_][a-z0-9]+)*")


def _named(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def training_machine(told: Configuration, training: str) -> dict[str, Any]:
    """launch_training's options for the machines of a training. InputError for what no job can be made of."""
    addresses = {"store": _ANYWHERE, "model": _ANYWHERE, "dataset": _ANYWHERE}
    if told.shape.replay != "none":
        addresses["replay"] = _ANYWHERE
    with _by_settings(told, _settings_of(training)):
        _words(told[f"{training}_arguments"])
        launch = launch_options(told, training, fixed_arguments(told, training), backend=told["backend"], **addresses)
        if launch.backend != "local":
            job = launch.job("run", (), {})
            # what the API server would refuse of it is refused by its rendering
            job_manifest(job, launch.backend)
        settings = {option: f"{training}_{name}" for option, name in EACH_RUN.items()}
        each_run = {option: told[name] for option, name in settings.items() if name in told.given}
        parse_training(training, [*launch.training_arguments("/unknown-yet"), *shlex.split(as_words(each_run))])
    return _said(LaunchTraining, _training_machine(told, training))


def _settings_of(training: str) -> dict[str, tuple[str, ...]]:
    """Options of a training's launch and command → the settings that they come of."""
    options = EACH_RUN | {option: option for option in (*compiled_options(OPTIONS[training]), "nodes", "arguments")}
    names: dict[str, tuple[str, ...]] = {option: (f"{training}_{name}",) for option, name in options.items()}
    names |= {option: (f"{training}_{option}", of_all(option)) for option in MACHINE}
    names |= {option: (f"lora_{name}",) for name, option in ADAPTER.items()}
    names |= {option: (option,) for option in STEERING}
    return names | {name: (_CALLED_OF_JOBS.get(name, name),) for name in (*_OF_JOBS, *_SECRETS, "backend")}


def launch_options(told: Configuration, training: str, arguments: str, **given: str) -> LaunchTraining:
    """What launch_training is told of a training; `given`: its addresses, and what no setting says."""
    words = [f"{option_of(name)}={value}" for name, value in {"stage": training, **given}.items()]
    machine = as_json(_training_machine(told, training))
    return parse(LaunchTraining, [*words, f"--arguments={arguments}", f"--machine={machine}"])


def _training_machine(told: Configuration, training: str) -> dict[str, Any]:
    of_jobs = {name: told[_CALLED_OF_JOBS.get(name, name)] for name in _OF_JOBS}
    return told.machine(training) | {"nodes": told[f"{training}_nodes"]} | of_jobs | _secrets(told)


_OF_JOBS = (
    "size", "namespace", "service_account", "queue", "priority_class", "team", "labels", "annotations",
    "node_selector", "tolerations", "run_as_user",
)  # fmt: skip
"""Options of launch_training that have one setting for all trainings."""
_CALLED_OF_JOBS = {
    "service_account": "training_account", "node_selector": "gpu_node_selector", "tolerations": "gpu_tolerations",
}  # fmt: skip
_SECRETS = ("s3_secret", "pull_secret", "proxy_secret", "ca_config_map")
_CALLED = {
    **_CALLED_OF_JOBS, "name": "serve_name", "vllm_image": "serve_image", "api_key_secret": "serve_secret",
    **{name: f"serve_{name}" for name in SERVED},
}  # fmt: skip
"""Options of launch_training and of serve → their settings, where those are called otherwise."""


def serving_machine(told: Configuration) -> dict[str, Any]:
    """serve's options for the model that is served. InputError for what no server can be made of."""
    from components.serve.deploy import server_of

    names = (
        "deploy", "name", "namespace", "gpu_resource", *SERVED, "vllm_image", "api_key_secret", "size", "labels",
        "node_selector", "tolerations",
    )  # fmt: skip
    machine = {name: told[_CALLED.get(name, name)] for name in names} | _secrets(told)
    # that setting stands over what the size says, and is None where nobody says it
    machine["gpu_resource"] = told.size.serving.gpu
    if told["deploy"] != "none" and told["gpu_resource"] == "":
        raise InputError("--set gpu_resource: a served model runs on GPUs; name them, or leave deploy out")
    machine["openshift"] = machine["openshift"] or told["run_as_user"] == "none"
    with _by_settings(told, {name: (_CALLED.get(name, name),) for name in machine}):
        server_of(parse(Serve, [f"--model={_ANYWHERE}", f"--machine={as_json(machine)}"]))
    return _said(Serve, machine)


def _said(kind: type, machine: Mapping[str, Any]) -> dict[str, Any]:
    """What is not the command's default anyway."""
    options = described(kind)
    return {name: value for name, value in machine.items() if value != options[name].default}


def _secrets(told: Configuration) -> dict[str, Any]:
    # an empty one is left out of a machine, where it would mean the command's default
    return {name: told[name] for name in _SECRETS} | {"s3_secret": told["s3_secret"] or "none"}


def as_json(machine: Mapping[str, Any]) -> str:
    """A machine as a step's constant argument, short: options that say nothing are left out."""
    said = {name: value for name, value in machine.items() if value not in ("", {}, [], None)}
    return json.dumps(said, separators=(",", ":"), ensure_ascii=False)
