"""The options of a stage's command, for tests of what is said of them."""

import ast
import importlib
from pathlib import Path

from zhllama.stage.options import StageOptions, described

ROOT = Path(__file__).resolve().parents[1]


def options_class(stage: str) -> type:
    """The dataclass that the stage's command parses: train_tokenizer's is TrainTokenizer."""
    name = "".join(word.capitalize() for word in stage.split("_"))
    tree = ast.parse((ROOT / "components" / stage / "component.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and name in [one.name for one in node.names]:
            found = getattr(importlib.import_module(str(node.module)), name)
            assert issubclass(found, StageOptions)
            return found
    raise AssertionError(f"{stage}: its component names no {name}")


def options_of(stage: str) -> set[str]:
    """Names of fields. launch_training hands some on to the training, after `--`."""
    from zhllama.training.options import FinetuneOptions, PretrainOptions

    more = (PretrainOptions, FinetuneOptions) if stage == "launch_training" else ()
    return {name for kind in (options_class(stage), *more) for name in described(kind)}
