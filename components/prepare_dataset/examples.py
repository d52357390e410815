"""Documents and Alpaca items as segments of ids, encoded in batches on SentencePiece's threads.

A document is BOS + ids + EOS (the recipe's line sample has no EOS). An item is the prompt with BOS, not learned, then
answer + EOS, encoded on its own and learned; cut on the right at the block size. Special ids are put in by id, so a
literal `</s>` in a text stays text.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np

from components.shared.corpus import Document
from components.shared.packed import Segment, token_type
from components.shared.prompt import wrap_item
from components.shared.vocabulary import Encoder

BATCH = 512
Item = TypeVar("Item")


@dataclass(frozen=True)
class Example:
    """What is packed and held out as one: a document, an item, or one of the recipe's blocks."""

    segment: Segment
    identity: bytes
    """Its content, which decides its side of the split; of an item, the prompt."""
    records: list[str]
    """What goes into the held-out file, as JSON."""
    characters: int
    file: str = ""

    @property
    def learned(self) -> bool:
        """Whether any of it is predicted: not when a prompt fills its whole segment."""
        return self.segment.prompt < len(self.segment.ids)


def text_examples(documents: Iterable[Document], encoder: Encoder, end: bool = True) -> Iterator[Example]:
    """Documents as BOS + ids (+ EOS with `end`)."""
    kind = np.dtype(token_type(encoder.size))
    closing = [encoder.eos] if end else []
    for batch in _batches(documents):
        for document, ids in zip(batch, encoder.encode_batch([document.text for document in batch]), strict=True):
            yield Example(
                Segment(np.array([encoder.bos, *ids, *closing], kind)),
                document.text.encode(),
                [json.dumps({"text": document.text}, ensure_ascii=False)],
                len(document.text),
                document.file,
            )


def instruction_examples(items: Iterable[dict[str, str]], encoder: Encoder, block_size: int) -> Iterator[Example]:
    """Items as prompt + answer, cut at `block_size`. A prompt that fills the block leaves a segment of prompt alone."""
    kind = np.dtype(token_type(encoder.size))
    for batch in _batches(items):
        prompts = [wrap_item(item) for item in batch]
        encoded = encoder.encode_batch(prompts), encoder.encode_batch([item["output"] for item in batch])
        for item, prompt, asked, answer in zip(batch, prompts, *encoded, strict=True):
            ids = [encoder.bos, *asked, *answer, encoder.eos][:block_size]
            yield Example(
                Segment(np.array(ids, kind), min(1 + len(asked), len(ids))),
                prompt.encode(),
                [json.dumps(item, ensure_ascii=False)],
                len(prompt) + len(item["output"]),
            )


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    waiting = iter(items)
    while batch := list(islice(waiting, BATCH)):
        yield batch
