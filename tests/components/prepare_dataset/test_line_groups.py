"""`--packing faithful` on text: the recipe's grouping of lines, exactly."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.prepare_dataset.examples import Examples, line_groups, text_examples
from tests.packed_data import Segment, in_arrays
from zhllama.data.corpus import Documents
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from zhllama.tokenizer.vocabulary import Encoder

BLOCK = 16


@pytest.fixture(scope="module")
def encoder(llama_tokenizer) -> Encoder:
    return SentencePieceEncoder(llama_tokenizer)


def recipes_blocks(lines, block_size):
    """The recipe's grouping in its own terms: concatenate a batch of 1,000 samples, drop the remainder, cut."""
    blocks = []
    for start in range(0, len(lines), 1000):
        joined = [token for line in lines[start : start + 1000] for token in line]
        total = len(joined)
        if total >= block_size:
            total = (total // block_size) * block_size
        blocks += [joined[at : at + block_size] for at in range(0, total, block_size)]
    return blocks


def examples_of(lines, file):
    """Lines of ids as one batch of a file."""
    segments = in_arrays([Segment(np.array(ids)) for ids in lines])
    texts = [""] * len(lines)
    return Examples(segments, [b""] * len(lines), texts, [1] * len(lines), file)


def ids_of(batches):
    """The ids of each block."""
    return [batch.part(at, at + 1).segments.ids.tolist() for batch in batches for at in range(len(batch))]


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=2300), batch=st.integers(1, 1500), data=st.data())
def test_the_blocks_are_the_recipes(encoder, sizes, batch, data):
    border = data.draw(st.integers(0, len(sizes)))
    lines = [[index % 700 + 3] * size for index, size in enumerate(sizes)]
    batches = [
        examples_of(of_file[at : at + batch], file)
        for file, of_file in (("a", lines[:border]), ("b", lines[border:]))
        for at in range(0, len(of_file), batch)
    ]
    expected = recipes_blocks(lines[:border], BLOCK) + recipes_blocks(lines[border:], BLOCK)
    made = list(line_groups(batches, BLOCK))
    assert ids_of(made) == expected


def test_a_line_is_bos_and_ids_and_a_blank_one_bos_alone(encoder):
    (lines,) = text_examples([Documents(["one line", ""], "a.txt")], encoder, end=False)
    assert ids_of([lines]) == [[encoder.bos, *encoder.encode("one line")], [encoder.bos]]


def test_a_blocks_records_are_its_lines(encoder):
    documents = [Documents(["first one", "", "second one"], "a.txt")]
    (block,) = line_groups(text_examples(documents, encoder, end=False), 200)
    assert [json.loads(record)["text"] for record in block.records(encoder)] == ["first one", "second one"]
