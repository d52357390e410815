"""What every model is measured on: texts, instructions, exams, and the prompts that all of them answer."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.evaluate.exams import Exam, read_exam
from components.evaluate.options import Evaluate, shots_of, split
from components.evaluate.selection import Selection, choose_items, choose_texts, content_hash
from zhllama.artifacts.cache import materialize
from zhllama.artifacts.reader import Artifact
from zhllama.stage.inputs import Inputs

LANGUAGES = ("zh", "en")
CONTINUED = 24
"""Characters of a held-out document that a model is given to continue."""


@dataclass(frozen=True)
class HeldOut:
    """What the models are scored on."""

    texts: Mapping[str, Sequence[str]]
    """Language → documents; empty where none was given."""
    selection: Selection
    exams: Sequence[Exam]
    shots: Sequence[int]
    prompts: Sequence["Sample"]
    tasks: Sequence[str] = ()
    """Of lm-evaluation-harness, with the folder of the user's own ones."""
    task_folder: Path | None = None
    max_questions: int = 0


@dataclass(frozen=True)
class Sample:
    """A prompt that every model answers: a fixed one, an instruction (both wrapped as in training), or a text."""

    kind: str
    prompt: str
    asked: str
    expected: str


# --- what is measured on ----------------------------------------------------------------------------------------------
def select(config: Evaluate, inputs: Inputs) -> tuple[HeldOut, dict[str, Any]]:
    """The held-out data, and what report.json says of the texts."""
    from zhllama.data.corpus import read_documents
    from zhllama.data.instructions import read_instructions

    texts: dict[str, list[str]] = {language: [] for language in LANGUAGES}
    said: dict[str, Any] = dict.fromkeys(LANGUAGES)
    given = {"zh": ("text_validation" if config.text_validation else "text"), "en": "english"}
    for language, option in given.items():
        artifact = inputs.get(option)
        if artifact is None:
            continue
        chosen = choose_texts(read_documents(artifact), config.max_bytes)
        texts[language] = chosen
        said[language] = {
            "reference": getattr(config, option),
            "documents": len(chosen),
            "bytes": sum(len(text.encode()) for text in chosen),
            "characters": sum(map(len, chosen)),
        }
    selection = Selection((), ())
    if artifact := inputs.get("instructions_validation") or inputs.get("instructions"):
        selection = choose_items(read_instructions(artifact), config.max_items)
    exams = [read_exam(exam, config.max_questions) for exam in inputs.all("exams")]
    tasks, task_folder = split(config.lm_eval), None
    if tasks:
        from components.evaluate.harness import check_tasks

        if folder := inputs.get("lm_eval_tasks"):
            task_folder = materialize(folder)
        check_tasks(tasks, task_folder)
    samples = [
        *fixed_prompts(inputs.get("prompts"), config.max_prompts),
        *choose_samples(texts["zh"], selection, config.samples),
    ]
    held_out = HeldOut(
        texts, selection, exams, shots_of(config.shots), samples, tasks, task_folder, config.max_questions
    )
    return held_out, said


def fixed_prompts(artifact: Artifact | None, count: int) -> list[Sample]:
    """The first `count` of the prompts that are the same in every evaluation: the user's, or the project's own."""
    from zhllama.data.corpus import read_documents
    from zhllama.data.instructions import read_instructions
    from zhllama.tokenizer.prompt import wrap

    if artifact is None:
        lines = (Path(__file__).parent / "prompts.txt").read_text("utf-8").splitlines()
        return [Sample("prompt", wrap(line), line, "") for line in lines[:count]]
    if any(name.endswith(".txt") for name in artifact.names):
        texts = read_documents(artifact)
        return [Sample("prompt", wrap(text), text, "") for text in itertools.islice(texts, count)]
    return [_sample("prompt", item) for item in itertools.islice(read_instructions(artifact, answered=False), count)]


def _sample(kind: str, item: Mapping[str, str]) -> Sample:
    from zhllama.tokenizer.prompt import wrap_item

    asked = "\n".join(filter(None, (item["instruction"], item["input"])))
    return Sample(kind, wrap_item(item), asked, item["output"])


def choose_samples(texts: Sequence[str], selection: Selection, count: int) -> list[Sample]:
    """Half instructions (each in turn, the commonest first), half texts to continue; or all of what there is."""
    groups: dict[str, list[Mapping[str, str]]] = {}
    for item in [*(choice.item for choice in selection.choice), *selection.free]:
        groups.setdefault(item["instruction"], []).append(item)
    items: list[Mapping[str, str]] = []
    waiting = [groups[name] for name in sorted(groups, key=lambda name: (-len(groups[name]), content_hash(name)))]
    while waiting and len(items) < count:
        items += [group.pop(0) for group in waiting][: count - len(items)]
        waiting = [group for group in waiting if group]
    long_enough = [text for text in texts if len(text) > 2 * CONTINUED][:count]
    asked = min(len(items), max(count - count // 2, count - len(long_enough)))
    continued = [
        Sample("text", text[:CONTINUED], text[:CONTINUED], text[CONTINUED : 4 * CONTINUED])
        for text in long_enough[: count - asked]
    ]
    return [_sample("instruction", item) for item in items[:asked]] + continued
