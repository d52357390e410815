"""The recipe's blocks: lines concatenated and cut, 1,000 lines at a time.

A line is BOS + ids, without EOS; a blank one is BOS alone. Of each 1,000 lines of a file the remainder beyond whole
blocks is dropped, unless it is all there is. Lines are not kept apart: a block is one segment. As in the recipe, it is
blocks that are held out, not lines.
"""

import json
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby, islice

import numpy as np

from components.prepare_dataset.examples import Example
from components.shared.packed import Segment
from components.shared.vocabulary import Encoder

LINES = 1000


def line_groups(lines: Iterable[Example], block_size: int, encoder: Encoder) -> Iterator[Example]:
    """The blocks of a corpus's lines, given in order, file after file. A block's records are its lines, decoded."""
    for _, of_file in groupby(lines, key=lambda line: line.file):
        while group := list(islice(of_file, LINES)):
            joined = np.concatenate([line.segment.ids for line in group])
            whole = len(joined) // block_size * block_size
            characters = sum(line.characters for line in group) / len(joined)
            for start in range(0, whole or len(joined), block_size):
                ids = joined[start : start + block_size]
                records = partial(_lines_of, ids, encoder)
                yield Example(Segment(ids), ids.tobytes(), records, "", "", round(characters * len(ids)))


def _lines_of(ids: np.ndarray, encoder: Encoder) -> list[str]:
    begins = np.flatnonzero(ids == encoder.bos)
    texts = [encoder.decode(line[line != encoder.bos]) for line in np.split(ids, begins)]
    return [json.dumps({"text": text}, ensure_ascii=False) for text in texts if text.strip()]
