"""Documents and Alpaca items as segments of ids, encoded in batches, a few of them ahead of the packing.

A document is BOS + ids + EOS (the recipe's line sample has no EOS). An item is the prompt with BOS, not learned, then
answer + EOS, encoded on its own and learned; cut on the right at the block size. Special ids are put in by id, so a
literal `</s>` in a text stays text.

Batches go through the stage as arrays, since what is done in Python to one document after another costs more than the
encoding: of a review of 75 characters, 11 µs against 8 (4 by segments, zhllama/tokenizer/segments.py).
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np

from zhllama.data.corpus import Documents
from zhllama.data.packed import Segments, token_type
from zhllama.tokenizer.prompt import wrap_item
from zhllama.tokenizer.spans import spans
from zhllama.tokenizer.vocabulary import Encoder

BATCH = 512
"""Items that are encoded together."""
BATCH_CHARACTERS = 500_000
"""Fewer, when they are long: some 10 MB of ids."""
THREADS = 2
"""That encode, while earlier batches are packed."""
AHEAD = 4
"""Batches that wait, encoded or being so."""
Item = TypeVar("Item")
Made = TypeVar("Made")


class Kind(NamedTuple):
    """What is made of a content, when it is asked for."""

    records: Callable[[Any], list[str]]
    """What goes into the held-out file, as JSON."""
    text: Callable[[Any], str]
    """What near-duplicates are found by; of an item, all of it."""
    subject: Callable[[Any], str]
    """What must not be seen before an evaluation: the text; of an item, the input (else the instruction) and answer."""


@dataclass(frozen=True)
class Examples:
    """What is packed and held out as one, many of it: documents, items, or the recipe's blocks."""

    segments: Segments
    identities: list[bytes]
    """The content of each, which decides its side of the split; of an item, the prompt."""
    contents: list[Any]
    """Each as it was: a text, an item, the ids of a block."""
    characters: np.ndarray
    """int64 [examples]"""
    kind: Kind
    file: str = ""

    def __len__(self) -> int:
        return len(self.contents)

    @property
    def has_loss(self) -> np.ndarray:
        """Whether any of each is predicted: not when a prompt fills its whole segment."""
        return self.segments.prompts < self.segments.lengths

    def records(self) -> Iterator[str]:
        """What goes into the held-out file."""
        for content in self.contents:
            yield from self.kind.records(content)

    def part(self, begin: int, end: int) -> Self:
        """The examples from `begin` to `end`."""
        return replace(
            self,
            segments=self.segments.part(begin, end),
            identities=self.identities[begin:end],
            contents=self.contents[begin:end],
            characters=self.characters[begin:end],
        )

    def where(self, kept: np.ndarray) -> Self:
        """The examples for which `kept` is true."""
        if kept.all():
            return self
        return replace(
            self,
            segments=self.segments.where(kept),
            identities=list(compress(self.identities, kept)),
            contents=list(compress(self.contents, kept)),
            characters=self.characters[kept],
        )

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The examples of all parts, at least one, in order. They are of one kind."""
        if len(parts) == 1:
            return parts[0]
        return replace(
            parts[0],
            segments=Segments.joined([part.segments for part in parts]),
            identities=[identity for part in parts for identity in part.identities],
            contents=[content for part in parts for content in part.contents],
            characters=np.concatenate([part.characters for part in parts]),
        )


def text_examples(batches: Iterable[Documents], encoder: Encoder, end: bool = True) -> Iterator[Examples]:
    """Documents as BOS + ids (+ EOS with `end`)."""
    id_type = np.dtype(token_type(encoder.size))

    def made(documents: Documents) -> Examples:
        texts = documents.texts
        ids, lengths = encoder.encode_flat(texts, begin=True, end=end)
        return Examples(
            Segments(ids.astype(id_type), lengths, np.zeros_like(lengths)),
            [text.encode() for text in texts],
            texts,
            np.fromiter(map(len, texts), np.int64, len(texts)),
            TEXT,
            documents.file,
        )

    return _ahead(made, batches)


def _text_record(text: str) -> list[str]:
    return [json.dumps({"text": text}, ensure_ascii=False)]


TEXT = Kind(_text_record, str, str)


def instruction_examples(items: Iterable[dict[str, str]], encoder: Encoder, block_size: int) -> Iterator[Examples]:
    """Items as prompt + answer, cut at `block_size`. A prompt that fills the block leaves a segment of prompt alone."""
    id_type = np.dtype(token_type(encoder.size))

    def made(batch: list[dict[str, str]]) -> Examples:
        prompts = [wrap_item(item) for item in batch]
        asked, asked_lengths = encoder.encode_flat(prompts, begin=True)
        answers, answer_lengths = encoder.encode_flat([item["output"] for item in batch], end=True)
        # of each item, the prompt's ids and the answer's
        starts = np.stack([asked_lengths, answer_lengths]).cumsum(axis=1) - [asked_lengths, answer_lengths]
        starts[1] += len(asked)
        kept = np.minimum(asked_lengths, block_size)
        lengths = np.stack([kept, np.minimum(answer_lengths, block_size - kept)])
        ids = np.concatenate([asked, answers])[spans(starts.T.ravel(), lengths.T.ravel())]
        return Examples(
            Segments(ids.astype(id_type), lengths.sum(axis=0), kept),
            [prompt.encode() for prompt in prompts],
            batch,
            np.array([len(prompt) + len(item["output"]) for prompt, item in zip(prompts, batch, strict=True)]),
            ITEM,
        )

    return _ahead(made, _batches(items))


def subject_of(item: dict[str, str]) -> str:
    """What an item is about: its input, without which its instruction, and its answer. Instructions are shared by many
    items, so one alone says nothing."""
    return f"{item['input'] or item['instruction']}\n{item['output']}"


def _item_record(item: dict[str, str]) -> list[str]:
    return [json.dumps(item, ensure_ascii=False)]


def _item_text(item: dict[str, str]) -> str:
    return "\n".join(item.values())


ITEM = Kind(_item_record, _item_text, subject_of)


def _batches(items: Iterable[dict[str, str]]) -> Iterator[list[dict[str, str]]]:
    batch: list[dict[str, str]] = []
    characters = 0
    for item in items:
        batch.append(item)
        characters += sum(map(len, item.values()))
        if len(batch) == BATCH or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _ahead(work: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """`work(item)` for each item, which threads do for the next ones meanwhile (SentencePiece and numpy free the lock).

    The items are read here, not in the thread (as prefetch.py does): the bad lines that are counted while reading
    must not depend on how far ahead a thread has come when a mixture ends.
    """
    waiting: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(THREADS, thread_name_prefix="encode") as threads:
        for item in items:
            waiting.append(threads.submit(work, item))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
