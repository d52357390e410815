"""Documents, Alpaca items and the recipe's blocks as segments of ids, encoded in batches, a few ahead of the packing.

A document is BOS + ids + EOS (the recipe's line sample has no EOS). An item is BOS and the prompt, not learned, then
answer and EOS, learned; cut on the right at the block size. Prompt and answer are encoded as one text, or the answer on
its own as in the recipe (zhllama/tokenizer/prompt.py). Conversations, and another template than Alpaca's:
conversations.py. Special ids are put in by id, so a literal `</s>` in a text
stays text. Batches go through the stage as arrays, since what is done in Python to one document after another costs
more than the encoding: of a review of 75 characters, 11 µs against 8.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import compress, groupby
from typing import Any, Self

import numpy as np

from components.prepare_dataset.conversations import characters_of, encoded, identity
from zhllama.data.conversations import Item, is_conversation
from zhllama.data.corpus import Documents, Skipped, leave_out
from zhllama.data.packed import token_type
from zhllama.data.segments import Segments
from zhllama.errors import InputError
from zhllama.storage.prefetch import map_ordered
from zhllama.tokenizer.chat import Chat
from zhllama.tokenizer.prompt import RECIPE, Prompt, question_of
from zhllama.tokenizer.spans import spans
from zhllama.tokenizer.vocabulary import Encoder

BATCH = 512
"""Items that are encoded together."""
BATCH_CHARACTERS = 500_000
"""Fewer, when they are long: some 10 MB of ids."""
THREADS = 2
"""That encode, while earlier batches are packed."""
AHEAD = 2
"""Batches that wait, encoded. They are read by one thread, so how many bad lines are counted depends on no other."""
LINES = 1000
"""That the recipe concatenates and cuts into blocks."""
_LISTS = ("identities", "contents", "characters")


@dataclass(frozen=True)
class Examples:
    """What is packed and held out as one, many of it: documents, items, or the recipe's blocks."""

    segments: Segments
    identities: list[bytes]
    """The content of each, which decides its side of the split; of an item, the prompt."""
    contents: list[Any]
    """Each as it was: a text, an item, the ids of a block."""
    characters: list[int]
    file: str = ""

    def __len__(self) -> int:
        return len(self.contents)

    @property
    def has_loss(self) -> np.ndarray:
        """Whether any of each is predicted: not when a prompt fills its whole segment."""
        return self.segments.prompts < self.segments.lengths

    def records(self, encoder: Encoder) -> Iterator[str]:
        """What goes into the held-out file, as JSON; of a block of the recipe, its lines."""
        for content in self.contents:
            if isinstance(content, dict):
                yield json.dumps(content, ensure_ascii=False)
                continue
            texts = [content]
            if not isinstance(content, str):
                lines = np.split(content, np.flatnonzero(content == encoder.bos))
                texts = [text for ids in lines if (text := encoder.decode(ids[ids != encoder.bos])).strip()]
            for text in texts:
                yield json.dumps({"text": text}, ensure_ascii=False)

    def part(self, begin: int, end: int) -> Self:
        """The examples from `begin` to `end`."""
        return self._picked(self.segments.part(begin, end), lambda some: some[begin:end])

    def where(self, kept: np.ndarray) -> Self:
        """The examples for which `kept` is true."""
        return self if kept.all() else self._picked(self.segments.where(kept), lambda some: list(compress(some, kept)))

    def _picked(self, segments: Segments, pick: Callable[[list[Any]], list[Any]]) -> Self:
        lists: dict[str, Any] = {name: pick(getattr(self, name)) for name in _LISTS}
        return replace(self, segments=segments, **lists)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The examples of all parts, at least one, in order. They are of one kind."""
        if len(parts) == 1:
            return parts[0]
        segments = Segments.joined([part.segments for part in parts])
        lists: dict[str, Any] = {name: [one for part in parts for one in getattr(part, name)] for name in _LISTS}
        return replace(parts[0], segments=segments, **lists)


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
            list(map(len, texts)),
            documents.file,
        )

    return map_ordered(made, batches, THREADS, AHEAD)


def instruction_examples(
    items: Iterable[Item],
    encoder: Encoder,
    block_size: int,
    prompt: Prompt,
    template: str = "",
    skipped: Skipped | None = None,
) -> Iterator[Examples]:
    """Items as prompt + answer, cut at `block_size`. A prompt that fills the block leaves a segment of prompt alone. An
    answer whose first piece would span the end of the prompt is encoded on its own, as Chat.answered does. With a
    `template`, by that in place of the prompt. InputError for a conversation that the template refuses; with `skipped`
    it is counted there and left out."""
    id_type = np.dtype(token_type(encoder.size))
    chat = Chat(encoder, template or prompt.template)

    def made(batch: list[Item]) -> tuple[Examples, list[InputError]]:
        if template or any(map(is_conversation, batch)):
            segments, kept, faults = encoded(chat, batch, block_size, id_type)
            return Examples(segments, [*map(identity, kept)], kept, [*map(characters_of, kept)]), faults
        questions, answers = [question_of(item) for item in batch], [item["output"] for item in batch]
        prompts = [prompt.wrap(text) for text in questions]
        asked, asked_lengths = encoder.encode_flat(prompts, begin=True)
        if prompt is RECIPE:
            ids, lengths = _joined(asked, asked_lengths, *encoder.encode_flat(answers, end=True))
        else:
            ids, lengths = encoder.encode_flat([*map(str.__add__, prompts, answers)], begin=True, end=True)
            shared = np.minimum(asked_lengths, lengths)
            one, two = (some[spans(of.cumsum() - of, shared)] for some, of in ((asked, asked_lengths), (ids, lengths)))
            number = np.arange(len(batch))
            if apart := sorted({*number.repeat(shared)[one != two], *number[shared < asked_lengths]}):
                # a piece would span the two, and what is asked would not be what was learned
                ids, lengths = _replaced(ids, lengths, apart, [
                    np.concatenate(some) for some in zip(
                        _cut(*encoder.encode_flat([prompts[at] for at in apart], begin=True)),
                        _cut(*encoder.encode_flat([answers[at] for at in apart], end=True)),
                        strict=True,
                    )
                ])  # fmt: skip
        kept = np.minimum(lengths, block_size)
        return Examples(
            Segments(
                ids[spans(lengths.cumsum() - lengths, kept)].astype(id_type),
                kept,
                np.minimum(asked_lengths, block_size),
            ),
            [*map(identity, batch)],
            batch,
            [len(text) + len(answer) for text, answer in zip(prompts, answers, strict=True)],
        ), []

    for examples, faults in map_ordered(made, _batches(items), THREADS, AHEAD):
        for fault in faults:
            leave_out(fault, skipped)
        if len(examples):
            yield examples


def _cut(ids: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(ids, lengths.cumsum()[:-1])


def _replaced(
    ids: np.ndarray, lengths: np.ndarray, which: Sequence[int], by: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """With other ids of these items."""
    parts = _cut(ids, lengths)
    for at, new in zip(which, by, strict=True):
        parts[at] = new
    return np.concatenate(parts), np.fromiter(map(len, parts), np.int64, len(parts))


def _joined(
    asked: np.ndarray, asked_lengths: np.ndarray, said: np.ndarray, said_lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of each item the prompt's ids and the answer's, one item after another, and how many each has."""
    lengths = np.stack([asked_lengths, said_lengths])
    starts = lengths.cumsum(axis=1) - lengths
    starts[1] += len(asked)
    return np.concatenate([asked, said])[spans(starts.T.ravel(), lengths.T.ravel())], lengths.sum(axis=0)


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    characters = 0
    for item in items:
        batch.append(item)
        characters += characters_of(item)
        if len(batch) == BATCH or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def line_groups(lines: Iterable[Examples], block_size: int) -> Iterator[Examples]:
    """The recipe's blocks of a corpus's lines (BOS + ids, without EOS): 1,000 of a file at a time are concatenated and
    cut; the remainder beyond whole blocks is dropped, unless it is all there is. A block is one segment, and held out
    as one."""
    for _, of_file in groupby(lines, key=lambda some: some.file):
        for group in _in_groups(of_file):
            joined = group.segments.ids
            whole = len(joined) // block_size * block_size or len(joined)
            blocks = [joined[start : start + block_size] for start in range(0, whole, block_size)]
            lengths = np.array([len(ids) for ids in blocks])
            yield Examples(
                Segments(joined[:whole], lengths, np.zeros_like(lengths)),
                [ids.tobytes() for ids in blocks],
                blocks,
                np.rint(sum(group.characters) / len(joined) * lengths).astype(int).tolist(),
            )


def _in_groups(batches: Iterable[Examples]) -> Iterator[Examples]:
    """The same lines, LINES together and in the end the rest."""
    waiting: list[Examples] = []
    for batch in batches:
        waiting.append(batch)
        while sum(map(len, waiting)) >= LINES:
            joined = Examples.joined(waiting)
            yield joined.part(0, LINES)
            waiting = [joined.part(LINES, len(joined))]
    if any(map(len, waiting)):
        yield Examples.joined(waiting)
