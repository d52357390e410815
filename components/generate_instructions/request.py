"""Request number n: made of the seed and its number alone, so that a run that goes on asks what it would have asked.

The recipe's request: 20 items on 10 topics of 10 task types, short inputs and outputs, answers in Chinese unless the
task asks otherwise, nothing that text alone cannot do. Topics and task types are numbered in it and each item names
its own by number: a few tokens an item, for a data card that knows what the data is about.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Template
from typing import Any

from components.generate_instructions.catalogue import Catalogue

MESSAGE_OVERHEAD = 64
"""Tokens that a chat template puts around one message, at most."""


@dataclass(frozen=True)
class Request:
    """One request: its number, messages, and the topics and task types in the order it numbers them, from 1."""

    number: int
    messages: list[dict[str, str]]
    topics: tuple[str, ...]
    task_types: tuple[str, ...]

    @property
    def most_prompt_tokens(self) -> int:
        """No tokenizer makes more tokens of a text than it has bytes; the schema may be put into the prompt too."""
        texts = [message["content"] for message in self.messages]
        texts.append(json.dumps(SCHEMA))
        return sum(len(text.encode()) for text in texts) + MESSAGE_OVERHEAD * len(self.messages)


@dataclass(frozen=True)
class Requests:
    """All requests there can be: `requests[n]` for n = 0, 1, …"""

    catalogue: Catalogue
    count: int
    """Items that one request asks for."""
    seeds: Sequence[Mapping[str, str]]
    seed: int

    def __getitem__(self, number: int) -> Request:
        chance = random.Random(f"{self.seed}/{number}")
        asked = self.catalogue.asked
        topics = tuple(chance.sample(self.catalogue.topics, min(asked["topics"], len(self.catalogue.topics))))
        types = tuple(
            chance.sample(self.catalogue.task_types, min(asked["task_types"], len(self.catalogue.task_types)))
        )
        text = Template(self.catalogue.request).substitute(
            count=self.count,
            language=self.catalogue.language,
            topics=_numbered(topics),
            task_types=_numbered(types),
            input=asked["input"],
            output=asked["output"],
        )
        shown = chance.sample(list(self.seeds), min(asked["examples"], len(self.seeds)))
        if shown:
            text += "\n例子（不要照抄）：\n" + "\n".join(json.dumps(dict(one), ensure_ascii=False) for one in shown)
        return Request(number, [{"role": "user", "content": text.strip()}], topics, types)


def _numbered(names: Sequence[str]) -> str:
    return "\n".join(f"{number}. {name}" for number, name in enumerate(names, start=1))


SCHEMA: dict[str, Any] = {
    "name": "instructions",
    "strict": True,
    "schema": {
        "type": "object",
        "properties": {
            "items": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {
                        "topic": {"type": "integer"},
                        "task_type": {"type": "integer"},
                        "instruction": {"type": "string"},
                        "input": {"type": "string"},
                        "output": {"type": "string"},
                    },
                    "required": ["topic", "task_type", "instruction", "input", "output"],
                    "additionalProperties": False,
                },
            }
        },
        "required": ["items"],
        "additionalProperties": False,
    },
}
"""The answer's form, as structured output wants it: strict, every field required, nothing else."""
