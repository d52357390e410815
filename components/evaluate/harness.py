"""EleutherAI's lm-evaluation-harness as another back end: its tasks, run on the model that is loaded already.

Optional (`pip install 'zhllama[lm-eval]'`): it brings thirty packages. Tasks are named as the harness names them; those
of a folder of the user's own (`--lm-eval-tasks`) are YAML as the harness has it, and may run code that they name.
"""

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zhllama.errors import InputError
from zhllama.inference.load import LoadedModel

INSTALL = "pip install 'zhllama[lm-eval]'"


def check_tasks(tasks: Sequence[str], folder: Path | None) -> None:
    """InputError, before a model is loaded, where the harness is not installed or does not know a task."""
    try:
        import lm_eval.tasks  # noqa: F401 - _manager needs it
    except ModuleNotFoundError as error:
        raise InputError(f"--lm-eval: the harness is not installed ({error.name} is missing); {INSTALL}") from error
    _quiet()
    known = _manager(folder).all_tasks
    if unknown := [task for task in tasks if task not in known]:
        raise InputError(
            f"--lm-eval {unknown[0]}: the harness knows no such task; `lm-eval ls tasks` lists them, or give a folder "
            "with the task's YAML file as --lm-eval-tasks"
        )


def run_tasks(
    loaded: LoadedModel, tasks: Sequence[str], folder: Path | None, limit: int
) -> dict[str, dict[str, float]]:
    """Task → metric → value, the harness's own names (`acc,none`); `limit`: questions of each task, 0 for all."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    from zhllama.tokenizer.fast_tokenizer import load_fast

    _quiet()
    encoder = loaded.encoder
    # the ids that training and serving have; HFLM would else make a tokenizer of its own kind
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=load_fast(encoder.files()),
        bos_token=encoder.pieces[encoder.context[0]],
        eos_token=encoder.pieces[encoder.eos],
        pad_token=encoder.pieces[loaded.padding],
    )
    model = HFLM(pretrained=loaded.model, tokenizer=tokenizer, batch_size=8, max_length=loaded.positions)
    results = simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=_manager(folder),
        limit=limit or None,
        bootstrap_iters=0,
        log_samples=False,
    )
    return {
        task: {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}
        for task, figures in sorted(results["results"].items())
    }


@functools.cache
def _manager(folder: Path | None) -> Any:
    """The harness's tasks and the folder's. Made once: it reads an index of thousands of files."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder) if folder else None)


def _quiet() -> None:
    for name in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
