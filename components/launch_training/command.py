"""The command of the job. The training's options are parsed against its own classes (zhllama/training/options.py, no
torch) before anything is started: a misspelt one is exit code 2 in a second, not a failed job after the queue."""

from dataclasses import dataclass

from zhllama import storage
from zhllama.artifacts.open import is_bare_name
from zhllama.errors import InputError
from zhllama.stage.command_line import parse
from zhllama.training.options import FinetuneOptions, PretrainOptions, TrainingOptions


@dataclass(frozen=True, kw_only=True)
class PretrainArguments(PretrainOptions):
    """pretrain's options, given to launch_training after `--`."""


@dataclass(frozen=True, kw_only=True)
class FinetuneArguments(FinetuneOptions):
    """finetune's options, given to launch_training after `--`."""


_GIVEN = ("--store", "--model", "--dataset", "--adapter", "--replay", "--forgetting-base", "--stage")
OURS = {
    **{name: f"it is launch_training's {name}" for name in _GIVEN},
    **dict.fromkeys(
        ("--output", "--reference", "--report", "--executor-output", "--executor-input"), "launch_training sets it"
    ),
    "--publish-checkpoint": "it trains nothing, so it needs no job: run the training's own command with it",
}


def training_module(stage: str) -> str:
    return "finetune" if stage == "sft" else "pretrain"


def training_arguments(
    *, stage: str, store: str, model: str, dataset: str, adapter: str, output: str, more: tuple[str, ...],
    replay: str = "", forgetting_base: str = "",
) -> list[str]:  # fmt: skip
    """The training's arguments, `more` being the user's. InputError for what the training would not take."""
    for word in more:
        name = word.partition("=")[0].replace("_", "-")
        if name in OURS:
            raise InputError(f"training option {name}: {OURS[name]}; leave it out")
    arguments = [] if stage == "sft" else ["--stage", stage]
    arguments += ["--store", storage.normalise(store)]
    given = {"--model": model, "--dataset": dataset, "--adapter": adapter, "--replay": replay}
    given |= {"--forgetting-base": forgetting_base, "--output": output}
    for name, value in given.items():
        if value:
            # as another process reads it, which may be in another folder
            arguments += [name, value if on_hub(value) else storage.normalise(value)]
    arguments += _without_absent(more, stage)
    parse_training(stage, arguments)
    return arguments


def parse_training(stage: str, arguments: list[str]) -> TrainingOptions:
    """The arguments as the training will read them."""
    return parse(FinetuneArguments if stage == "sft" else PretrainArguments, arguments)


def on_hub(reference: str) -> bool:
    """Whether it names a repository of the Hugging Face Hub: hf://owner/name, or owner/name where no such folder is."""
    return reference.startswith("hf://") or is_bare_name(reference)


_ONLY_OF = {
    "--train-embeddings": ("sft",),
    "--also-lm-head": ("embeddings",),
    "--freeze-embeddings": ("lora",),
}
"""Switches that one training has. A KFP step passes them to each, as false."""


def _without_absent(words: tuple[str, ...], stage: str) -> list[str]:
    """The words without what says nothing: options with an empty value, and another training's switch that is off."""
    kept: list[str] = []
    for word in words:
        name = kept[-1].replace("_", "-") if kept else ""
        absent = word == "" and name.startswith("--") and "=" not in name
        foreign = word.lower() == "false" and stage not in _ONLY_OF.get(name, (stage,))
        if absent or foreign:
            kept.pop()
        elif word != "" and not (word.startswith("--") and word.endswith("=")):
            kept.append(word)
    return kept


def command_line(stage: str, arguments: list[str], python: str = "python") -> tuple[str, ...]:
    """`python -m components.pretrain …`; `python`: the interpreter, in an image the one on its path."""
    return (python, "-m", f"components.{training_module(stage)}", *arguments)
