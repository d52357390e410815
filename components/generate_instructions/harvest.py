"""Items out of answers, in the order of the requests' numbers, whatever order the answers came in.

Which of two near duplicates is kept depends on the order they are looked at in, so that order is fixed: request by
request, item by item. The same answers give the same items, and where a run is cut off and goes on does not show in
the data. An answer that overtakes another waits for it.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from components.generate_instructions.catalogue import Catalogue
from components.generate_instructions.dedup import Seen, question
from components.generate_instructions.parse import objects_in
from components.generate_instructions.validate import RULES, UNNAMED, judged

SAMPLES = 3
"""Of what fell at a rule, for the card."""


@dataclass
class Harvest:
    """The items that were kept, and what became of the others. wanted: 0 for as many as come."""

    catalogue: Catalogue
    seen: Seen
    wanted: int = 0
    items: list[Mapping[str, str]] = field(default_factory=list)
    topics: Counter[str] = field(default_factory=Counter)
    task_types: Counter[str] = field(default_factory=Counter)
    fallen: dict[str, int] = field(default_factory=lambda: dict.fromkeys(RULES, 0))
    """Rule → how many fell at it."""
    samples: dict[str, list[str]] = field(default_factory=dict)
    """Rule → the first texts that fell at it, shortened."""

    @property
    def full(self) -> bool:
        return bool(self.wanted) and len(self.items) >= self.wanted

    def take_text(self, content: str, topics: tuple[str, ...] = (), task_types: tuple[str, ...] = ()) -> int:
        """The items of one answer; topics and task types as the request numbered them. Returns how many were kept."""
        before = len(self.items)
        for value in objects_in(content):
            if self.full:
                break
            self.take(value, topics, task_types)
        return len(self.items) - before

    def take(self, value: Any, topics: tuple[str, ...] = (), task_types: tuple[str, ...] = ()) -> bool:
        """One item, kept or counted where it fell."""
        found = judged(value, self.catalogue)
        rule = found.rule
        if not rule:
            rule = {"exact": "exact duplicate", "near": "near duplicate", "": ""}[
                self.seen.duplicate_of(question(found.item))
            ]
        if rule:
            self.fallen[rule] += 1
            samples = self.samples.setdefault(rule, [])
            if len(samples) < SAMPLES and isinstance(value, dict):
                samples.append(_shortened(value))
            return False
        self.seen.add(question(found.item))
        self.items.append(found.item)
        if topics:
            self.topics[_named(topics, found.topic)] += 1
            self.task_types[_named(task_types, found.task_type)] += 1
        return True


def _named(names: tuple[str, ...], number: int) -> str:
    return names[number - 1] if 1 <= number <= len(names) else UNNAMED


def _shortened(value: Mapping[Any, Any]) -> str:
    parts = [str(value.get(field) or "")[:120] for field in ("instruction", "input", "output")]
    return " ⟶ ".join(part.encode("utf-8", "replace").decode() for part in parts if part.strip()) or str(value)[:120]
