"""The recipe's blocks: lines concatenated and cut, 1,000 lines at a time.

A line is BOS + ids, without EOS; a blank one is BOS alone. Of each 1,000 lines of a file the remainder beyond whole
blocks is dropped, unless it is all there is. Lines are not kept apart: a block is one segment. As in the recipe, it is
blocks that are held out, not lines.
"""

import json
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby

import numpy as np

from components.prepare_dataset.examples import Examples, Kind
from zhllama.data.packed import Segments
from zhllama.tokenizer.vocabulary import Encoder

LINES = 1000


def line_groups(lines: Iterable[Examples], block_size: int, encoder: Encoder) -> Iterator[Examples]:
    """The blocks of a corpus's lines, given in order, file after file. A block's records are its lines, decoded."""
    kind = Kind(partial(_lines_of, encoder), _no_text, _no_text)
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
                np.rint(group.characters.sum() / len(joined) * lengths).astype(np.int64),
                kind,
            )


def _in_groups(batches: Iterable[Examples]) -> Iterator[Examples]:
    """The same lines, 1,000 together and in the end the rest."""
    waiting: list[Examples] = []
    room = LINES
    for batch in batches:
        at = 0
        while len(batch) - at >= room:
            yield Examples.joined([*waiting, batch.part(at, at + room)])
            waiting, at, room = [], at + room, LINES
        if at < len(batch):
            waiting.append(batch.part(at, len(batch)))
            room -= len(batch) - at
    if waiting:
        yield Examples.joined(waiting)


def _lines_of(encoder: Encoder, ids: np.ndarray) -> list[str]:
    begins = np.flatnonzero(ids == encoder.bos)
    texts = [encoder.decode(line[line != encoder.bos]) for line in np.split(ids, begins)]
    return [json.dumps({"text": text}, ensure_ascii=False) for text in texts if text.strip()]


def _no_text(_: np.ndarray) -> str:
    return ""
