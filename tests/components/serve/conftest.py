"""An engine of the tests' own, for what stands before one."""

from collections.abc import Iterator

import pytest

from tests.fake_engine import FakeEngine
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from zhllama.tokenizer.vocabulary import Encoder


@pytest.fixture(scope="module")
def encoder(llama_tokenizer: bytes) -> Encoder:
    return SentencePieceEncoder(llama_tokenizer)


@pytest.fixture
def engine(encoder: Encoder) -> Iterator[FakeEngine]:
    with FakeEngine(encoder) as made:
        yield made
