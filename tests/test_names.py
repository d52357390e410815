"""What users type, and what their clusters hold by name, stays: the names of the first release are all still there.

`goldens/names.json` was written by `names()` before anything was moved. A name that is gone fails; new ones are free.
"""

import argparse
import dataclasses
import importlib
import json
import re
from pathlib import Path

import yaml

from pipelines.__main__ import parser

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "goldens" / "names.json"
COMMANDS = {
    "convert_weights": "options.ConvertWeights", "evaluate": "options.Evaluate",
    "export_model": "options.ExportModel", "extend_tokenizer": "options.ExtendTokenizer",
    "fetch_weights": "options.FetchWeights", "finetune": "options.Finetune", "generate": "options.Generate",
    "generate_instructions": "options.GenerateInstructions", "launch_training": "options.LaunchTraining",
    "launch_training.cleanup": "cleanup.Cleanup", "launch_training.reap": "reap.Reap",
    "merge_adapters": "options.MergeAdapters", "merge_models": "options.MergeModels",
    "prepare_dataset": "options.PrepareDataset",
    "pretrain": "options.Pretrain", "serve": "options.Serve", "serve.check": "check.Check",
    "train_tokenizer": "options.TrainTokenizer",
}  # fmt: skip
"""`python -m components.<command>` → the class of its options."""


def zhllama_options() -> dict[str, list[str]]:
    """Subcommand, as `render serving` → its options, aliases included, and its positionals in capitals."""
    found: dict[str, list[str]] = {}

    def walk(one: argparse.ArgumentParser, words: tuple[str, ...]) -> None:
        names = []
        for action in one._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, inner in action.choices.items():
                    walk(inner, (*words, name))
            else:
                names += action.option_strings or [str(action.metavar or action.dest).upper()]
        found[" ".join(words)] = sorted(names)

    walk(parser(), ())
    return found


def stage_options() -> dict[str, list[str]]:
    """`python -m components.<command>` → its options."""
    found = {}
    for command, place in COMMANDS.items():
        module, name = place.split(".")
        options = getattr(importlib.import_module(f"components.{command.split('.')[0]}.{module}"), name)
        found[command] = sorted(f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(options))
    return found


def settings() -> list[str]:
    """What `--set` takes."""
    from pipelines.settings import SETTINGS

    return sorted(SETTINGS)


def product_texts() -> str:
    folders = ("components", "pipelines", "images", "k8s", "zhllama")
    kinds = (".py", ".yaml", ".html", ".jinja", ".txt", "")
    files = [path for name in folders if (ROOT / name).is_dir() for path in sorted((ROOT / name).rglob("*"))]
    return "\n".join(path.read_text() for path in files if path.is_file() and path.suffix in kinds)


def cluster_objects() -> list[str]:
    """`Role/zhllama-runner`: every object of k8s/ but the examples of jobs and servers."""
    found = set()
    for path in sorted((ROOT / "k8s").rglob("*.yaml")):
        for one in yaml.safe_load_all(path.read_text()):
            if isinstance(one, dict) and "name" in one.get("metadata", {}) and path.parts[-3] not in (
                "pytorchjob", "serving",
            ):  # fmt: skip
                found.add(f"{one['kind']}/{one['metadata']['name']}")
    return sorted(found)


def names() -> dict[str, object]:
    texts = product_texts()
    return {
        "zhllama": zhllama_options(),
        "stages": stage_options(),
        "settings": settings(),
        "variables": sorted(set(re.findall(r"\bZHLLAMA_[A-Z0-9_]*[A-Z0-9]\b", texts))),
        "labels": sorted(set(re.findall(r"\bzhllama\.io/[a-z-]+", texts))),
        "objects": cluster_objects(),
        "secrets, accounts, maps": sorted(set(re.findall(r"\bzhllama-[a-z0-9-]*[a-z0-9]\b", texts))),
        "k8s": sorted(str(path.relative_to(ROOT)) for path in (ROOT / "k8s").rglob("*.yaml")),
        "images": sorted(path.name for path in (ROOT / "images").iterdir() if (path / "Dockerfile").exists()),
        "make": sorted(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)),
    }


def flat(found: dict[str, object]) -> set[str]:
    """`zhllama/run/--size`: one line a name."""
    lines = set()
    for group, held in found.items():
        if isinstance(held, dict):
            lines |= {f"{group}/{one}" for one in held}
            lines |= {f"{group}/{one}/{name}" for one, inner in held.items() for name in inner}
        else:
            lines |= {f"{group}/{name}" for name in held}
    return lines


def test_no_name_is_taken_away():
    gone = flat(json.loads(GOLDEN.read_text())) - flat(names())
    assert not gone, f"{len(gone)} names that users type are gone: {sorted(gone)[:20]}"


def test_exit_codes_stay():
    from zhllama import errors

    assert (errors.EXIT_DONE, errors.EXIT_FAULT, errors.EXIT_INPUT, errors.EXIT_CANCELLED) == (0, 1, 2, 143)
