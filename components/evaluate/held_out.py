"""What every model is measured on: a bounded part of the held-out data, the same part on every machine.

Documents and items are taken in order of the SHA-256 of their text, until the limit: no seed, no dependence on the
order of files. One pass, memory bounded by what is kept.
"""

import heapq
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from components.evaluate.exams import Exam, read_exam
from components.evaluate.facts import Fact, read_facts
from components.evaluate.options import Evaluate, split
from zhllama.artifacts.cache import materialize
from zhllama.artifacts.reader import Artifact
from zhllama.data.conversations import Item, messages_of
from zhllama.data.corpus import choose_texts, content_hash, read_documents
from zhllama.data.instructions import read_instructions
from zhllama.stage.inputs import Inputs
from zhllama.tokenizer.chat import asked
from zhllama.tokenizer.prompt import question_of

LANGUAGES = ("zh", "en")
CONTINUED = 24
"""Characters of a held-out document that a model is given to continue."""
MAX_CHOICES = 8
"""An instruction with more distinct answers than this is not scored as multiple choice."""
RECURRENCE = 2
"""Nor is one whose answers recur less often than this, on average: they are answers of their own, not choices."""


class HeldOutItem(NamedTuple):
    """An item, and what is scored: of multiple choice its instruction's answers (sorted), else its own answer alone."""

    item: Item
    choices: tuple[str, ...]
    answer: int
    """The index of the right one."""


class Sample(NamedTuple):
    """What every model answers: a fixed prompt, an instruction (both by its chat template), or a text as it is."""

    kind: str
    asked: str
    """As people read it; what a text begins with."""
    expected: str
    messages: Sequence[Mapping[str, str]] = ()
    """What the model is asked; of a text nothing."""


class HeldOut(NamedTuple):
    texts: Mapping[str, Sequence[str]]
    """Language → documents; empty where none was given."""
    items: Sequence[HeldOutItem]
    exams: Sequence[Exam]
    prompts: Sequence[Sample]
    task_folder: Path | None
    """Of the user's own tasks of lm-evaluation-harness."""
    facts: Sequence[Fact] = ()

    def measured(self) -> set[str]:
        """The options that there is something for, as requirements name them."""
        chosen = {
            "text": self.texts["zh"],
            "english": self.texts["en"],
            "instructions": self.items,
            "choices": [item for item in self.items if len(item.choices) > 1],
            "questions": self.facts,
        }
        return {name for name, found in chosen.items() if found}


def select(config: Evaluate, inputs: Inputs) -> tuple[HeldOut, dict[str, Any]]:
    """The held-out data, and what report.json says of the texts."""
    texts: dict[str, list[str]] = {language: [] for language in LANGUAGES}
    said: dict[str, Any] = dict.fromkeys(LANGUAGES)
    for language, option in (("zh", "text_validation" if config.text_validation else "text"), ("en", "english")):
        if artifact := inputs.get(option):
            texts[language] = chosen = choose_texts(read_documents(artifact), config.max_bytes)
            said[language] = {
                "reference": getattr(config, option),
                "documents": len(chosen),
                "bytes": sum(len(text.encode()) for text in chosen),
                "characters": sum(map(len, chosen)),
            }
    artifact = inputs.get("instructions_validation") or inputs.get("instructions")
    items = choose_items(read_instructions(artifact), config.max_items) if artifact else []
    exams = [read_exam(exam, config.max_questions) for exam in inputs.all("exams")]
    task_folder = None
    if config.lm_eval:
        from components.evaluate.harness import check_tasks

        task_folder = materialize(folder) if (folder := inputs.get("lm_eval_tasks")) else None
        check_tasks(split(config.lm_eval), task_folder)
    prompts = fixed_prompts(inputs.get("prompts"), config.max_prompts)
    prompts += choose_samples(texts["zh"], items, config.samples)
    facts = [fact for language in LANGUAGES for fact in read_facts(language, config.questions)]
    return HeldOut(texts, items, exams, prompts, task_folder, facts), said


def choose_items(items: Iterable[Item], max_items: int) -> list[HeldOutItem]:
    """Up to `max_items` items as multiple choice, then a fifth of that by their one answer; duplicates are left out.
    Multiple choice: the instruction has 2 to 8 distinct answers, each twice or more on average."""
    groups: dict[str, dict[str, Item]] = defaultdict(dict)
    for item in items:
        groups[item["instruction"]][content_hash(json.dumps(dict(item), sort_keys=True, ensure_ascii=False))] = item
    choice: dict[str, HeldOutItem] = {}
    free: dict[str, HeldOutItem] = {}
    for group in groups.values():
        choices = tuple(sorted({item["output"] for item in group.values()}))
        if 2 <= len(choices) <= MAX_CHOICES and len(group) >= RECURRENCE * len(choices):
            choice |= {of: HeldOutItem(item, choices, choices.index(item["output"])) for of, item in group.items()}
        else:
            free |= {of: HeldOutItem(item, (item["output"],), 0) for of, item in group.items()}
    best = [choice[of] for of in heapq.nsmallest(max_items, choice)]
    return best + [free[of] for of in heapq.nsmallest(-(-max_items // 5), free)]


def chance(items: Iterable[HeldOutItem]) -> float:
    """The accuracy of always giving each instruction's commonest answer; 0 without items."""
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    for item in items:
        counts[item.item["instruction"]][item.answer] += 1
    total = sum(of.total() for of in counts.values())
    return sum(max(of.values()) for of in counts.values()) / total if total else 0.0


def fixed_prompts(artifact: Artifact | None, count: int) -> list[Sample]:
    """The first `count` of the prompts that are the same in every evaluation: the user's, or the project's own."""
    if artifact and not any(name.endswith(".txt") for name in artifact.names):
        items = read_instructions(artifact, answered=False)
        return [_sample("prompt", item) for item in itertools.islice(items, count)]
    own = Path(__file__).with_name("prompts.txt")
    texts = read_documents(artifact) if artifact else own.read_text("utf-8").splitlines()
    return [Sample("prompt", text, "", asked(text)) for text in itertools.islice(texts, count)]


def _sample(kind: str, item: Item) -> Sample:
    messages = messages_of(item)
    text = "\n\n".join(f"{one['role']}: {one['content']}" for one in messages) if messages[1:] else question_of(item)
    return Sample(kind, text, item["output"], messages)


def choose_samples(texts: Sequence[str], held_out: Sequence[HeldOutItem], count: int) -> list[Sample]:
    """Half instructions (each in turn, the commonest first), half texts to continue; or all of what there is."""
    groups: dict[str, list[Item]] = defaultdict(list)
    for one in held_out:
        groups[one.item["instruction"]].append(one.item)
    commonest = sorted(groups, key=lambda name: (-len(groups[name]), content_hash(name)))
    rounds = itertools.zip_longest(*(groups[name] for name in commonest))
    items = [item for each in rounds for item in each if item][:count]
    long_enough = [text for text in texts if len(text) > 2 * CONTINUED][:count]
    told = min(len(items), max(count - count // 2, count - len(long_enough)))
    return [_sample("instruction", item) for item in items[:told]] + [
        Sample("text", text[:CONTINUED], text[CONTINUED : 4 * CONTINUED]) for text in long_enough[: count - told]
    ]
