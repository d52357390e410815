"""What is scored: a bounded part of the held-out data, the same part on every machine.

Documents and items are taken in order of the SHA-256 of their text, until the limit: no seed, no dependence on the
order of files. One pass, memory bounded by what is kept.
"""

import hashlib
import heapq
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

MAX_CHOICES = 8
"""An instruction with more distinct answers than this is not scored as multiple choice."""
RECURRENCE = 2
"""Nor is one whose answers recur less often than this, on average: they are answers of their own, not choices."""


@dataclass(frozen=True)
class ChoiceItem:
    """An item whose answer is one of its instruction's `choices` (sorted); `answer` is the index of the right one."""

    item: Mapping[str, str]
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Selection:
    """The items to score: as multiple choice, and by their one answer."""

    choice: tuple[ChoiceItem, ...]
    free: tuple[Mapping[str, str], ...]


def content_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def choose_texts(texts: Iterable[str], max_bytes: int) -> list[str]:
    """Distinct texts in order of their hash, `max_bytes` of UTF-8 in all; the last one is cut between characters."""
    kept: list[tuple[int, str]] = []  # a heap with the greatest hash on top: (−hash, text)
    have: set[int] = set()
    size = 0
    for text in texts:
        rank = int(content_hash(text), 16)
        if rank in have or (size >= max_bytes and rank > -kept[0][0]):
            continue
        heapq.heappush(kept, (-rank, text))
        have.add(rank)
        size += len(text.encode())
        while size - len(kept[0][1].encode()) >= max_bytes:
            greatest, dropped = heapq.heappop(kept)
            have.remove(-greatest)
            size -= len(dropped.encode())
    chosen = [text for _, text in sorted(kept, reverse=True)]
    if size > max_bytes:
        # the last one is longer than what there is room for: cut at a character
        room = len(chosen[-1].encode()) - (size - max_bytes)
        chosen[-1] = chosen[-1].encode()[:room].decode(errors="ignore")
    return [text for text in chosen if text]


def choose_items(items: Iterable[Mapping[str, str]], max_items: int) -> Selection:
    """Up to `max_items` items as multiple choice, and a fifth of that by their one answer; duplicates are left out.

    Multiple choice: the instruction has 2 to 8 distinct answers, each twice or more on average.
    """
    groups: dict[str, dict[str, Mapping[str, str]]] = defaultdict(dict)
    for item in items:
        groups[item["instruction"]][content_hash(json.dumps(dict(item), sort_keys=True, ensure_ascii=False))] = item
    choice: list[tuple[str, ChoiceItem]] = []
    free: list[tuple[str, Mapping[str, str]]] = []
    for group in groups.values():
        choices = tuple(sorted({item["output"] for item in group.values()}))
        if 2 <= len(choices) <= MAX_CHOICES and len(group) >= RECURRENCE * len(choices):
            choice += [(rank, ChoiceItem(item, choices, choices.index(item["output"]))) for rank, item in group.items()]
        else:
            free += group.items()
    return Selection(
        tuple(item for _, item in heapq.nsmallest(max_items, choice, key=lambda pair: pair[0])),
        tuple(item for _, item in heapq.nsmallest(-(-max_items // 5), free, key=lambda pair: pair[0])),
    )


def chance(items: Iterable[ChoiceItem]) -> float:
    """The accuracy of always giving each instruction's commonest answer; 0 without items."""
    counts: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for item in items:
        counts[item.item["instruction"]][item.answer] += 1
    total = sum(sum(of.values()) for of in counts.values())
    return sum(max(of.values()) for of in counts.values()) / total if total else 0.0
