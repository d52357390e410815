"""`--packing faithful` on text: the recipe's grouping of lines, exactly."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.prepare_dataset.examples import Example, text_examples
from components.prepare_dataset.line_groups import line_groups
from components.shared.corpus import Document
from components.shared.packed import Segment
from components.shared.vocabulary import Encoder

BLOCK = 16


@pytest.fixture(scope="module")
def encoder(llama_tokenizer) -> Encoder:
    return Encoder(llama_tokenizer)


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


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=2300), data=st.data())
def test_the_blocks_are_the_recipes(encoder, sizes, data):
    border = data.draw(st.integers(0, len(sizes)))
    lines = [[index % 700 + 3] * size for index, size in enumerate(sizes)]
    examples = [
        Example(Segment(np.array(ids)), b"", list, "", "", 0, "a" if index < border else "b")
        for index, ids in enumerate(lines)
    ]
    expected = recipes_blocks(lines[:border], BLOCK) + recipes_blocks(lines[border:], BLOCK)
    assert [block.segment.ids.tolist() for block in line_groups(examples, BLOCK, encoder)] == expected


def test_a_line_is_bos_and_ids_and_a_blank_one_bos_alone(encoder):
    documents = [Document("one line", "a.txt", 1), Document("", "a.txt", 2)]
    examples = list(text_examples(documents, encoder, end=False))
    assert examples[0].segment.ids.tolist() == [encoder.bos, *encoder.encode("one line")]
    assert examples[1].segment.ids.tolist() == [encoder.bos]


def test_a_blocks_records_are_its_lines(encoder):
    documents = [Document(text, "a.txt", number) for number, text in enumerate(["first one", "", "second one"])]
    (block,) = line_groups(text_examples(documents, encoder, end=False), 200, encoder)
    assert [json.loads(record)["text"] for record in block.records()] == ["first one", "second one"]
