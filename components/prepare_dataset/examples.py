"""Documents and Alpaca items as segments of ids, encoded in batches, a few of them ahead of the packing.

A document is BOS + ids + EOS (the recipe's line sample has no EOS). An item is the prompt with BOS, not learned, then
answer + EOS, encoded on its own and learned; cut on the right at the block size. Special ids are put in by id, so a
literal `</s>` in a text stays text.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np

from components.shared.corpus import Document
from components.shared.packed import Segment, token_type
from components.shared.prompt import wrap_item
from components.shared.vocabulary import Encoder

BATCH = 512
"""Documents that are encoded together."""
BATCH_CHARACTERS = 500_000
"""Fewer, when they are long: some 10 MB of ids."""
THREADS = 2
"""That encode, while earlier batches are packed."""
AHEAD = 4
"""Batches that wait, encoded or being so."""
Item = TypeVar("Item")
Made = TypeVar("Made")


class Example(NamedTuple):
    """What is packed and held out as one: a document, an item, or one of the recipe's blocks."""

    segment: Segment
    identity: bytes
    """Its content, which decides its side of the split; of an item, the prompt."""
    records: Callable[[], list[str]]
    """What goes into the held-out file, as JSON; made only for what is held out."""
    text: str
    """What near-duplicates are found by; of an item, all of it."""
    subject: str
    """What must not be seen before an evaluation: the text; of an item, the input (else the instruction) and answer."""
    characters: int
    file: str = ""

    @property
    def learned(self) -> bool:
        """Whether any of it is predicted: not when a prompt fills its whole segment."""
        return self.segment.prompt < len(self.segment.ids)


def text_examples(documents: Iterable[Document], encoder: Encoder, end: bool = True) -> Iterator[Example]:
    """Documents as BOS + ids (+ EOS with `end`)."""
    kind = np.dtype(token_type(encoder.size))

    def encoded(batch: list[Document]) -> list[np.ndarray]:
        return encoder.encode_arrays([document.text for document in batch], begin=True, end=end)

    for batch, found in _ahead(encoded, _batches(documents, lambda document: len(document.text))):
        for (text, file, _), ids in zip(batch, found, strict=True):
            record = partial(_text_record, text)
            yield Example(Segment(ids.astype(kind)), text.encode(), record, text, text, len(text), file)


def _text_record(text: str) -> list[str]:
    return [json.dumps({"text": text}, ensure_ascii=False)]


def instruction_examples(items: Iterable[dict[str, str]], encoder: Encoder, block_size: int) -> Iterator[Example]:
    """Items as prompt + answer, cut at `block_size`. A prompt that fills the block leaves a segment of prompt alone."""
    kind = np.dtype(token_type(encoder.size))

    def encoded(batch: list[dict[str, str]]) -> list[tuple[str, np.ndarray, np.ndarray]]:
        prompts = [wrap_item(item) for item in batch]
        asked = encoder.encode_arrays(prompts, begin=True)
        answers = encoder.encode_arrays([item["output"] for item in batch], end=True)
        return list(zip(prompts, asked, answers, strict=True))

    for batch, found in _ahead(encoded, _batches(items, lambda item: sum(map(len, item.values())))):
        for item, (prompt, asked, answer) in zip(batch, found, strict=True):
            ids = np.concatenate([asked, answer])[:block_size].astype(kind)
            yield Example(
                Segment(ids, min(len(asked), len(ids))),
                prompt.encode(),
                partial(_item_record, item),
                "\n".join(item.values()),
                subject_of(item),
                len(prompt) + len(item["output"]),
            )


def subject_of(item: dict[str, str]) -> str:
    """What an item is about: its input, without which its instruction, and its answer. Instructions are shared by many
    items, so one alone says nothing."""
    return f"{item['input'] or item['instruction']}\n{item['output']}"


def _item_record(item: dict[str, str]) -> list[str]:
    return [json.dumps(item, ensure_ascii=False)]


def _batches(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    characters = 0
    for item in items:
        batch.append(item)
        characters += size(item)
        if len(batch) == BATCH or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _ahead(work: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[tuple[Item, Made]]:
    """Each item with `work(item)`, which threads do for the next ones meanwhile (SentencePiece frees the lock).

    The items are read here, not in the thread (as shared/ahead.py does): the bad lines that are counted while reading
    must not depend on how far ahead a thread has come when a mixture ends.
    """
    waiting: deque[tuple[Item, Future[Made]]] = deque()
    with ThreadPoolExecutor(THREADS, thread_name_prefix="encode") as threads:
        for item in items:
            waiting.append((item, threads.submit(work, item)))
            if len(waiting) > AHEAD:
                first, made = waiting.popleft()
                yield first, made.result()
        for first, made in waiting:
            yield first, made.result()
