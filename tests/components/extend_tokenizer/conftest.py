"""What both test files of this stage use."""

import itertools
from collections import Counter

import pytest

from tests.texts import unigram_model
from zhllama.tokenizer.sentencepiece_model import parse_model


@pytest.fixture(scope="session")
def tying_tokenizer(chinese_tokenizer: bytes, chinese_text: list[str]) -> bytes:
    """`chinese_tokenizer` with more pairs of common characters, the last first: ABC may merge as AB C or as A BC."""
    proto = parse_model(chinese_tokenizer)
    have = {piece.piece for piece in proto.pieces}
    common = [letter for letter, _ in Counter("".join(chinese_text)).most_common(12)]
    for pair in reversed(list(itertools.product(common, repeat=2))):
        if "".join(pair) not in have:
            proto.pieces.add(piece="".join(pair), score=-2000)
    return bytes(proto.SerializeToString())


@pytest.fixture(scope="session")
def unigram_tokenizer(chinese_text: list[str]) -> bytes:
    """A Chinese unigram model: 700 pieces, of which merges alone cannot make all."""
    return unigram_model(chinese_text, 700)
