"""The tokenizer decides which ids are special; config.json and generation_config.json are held against it."""

import logging

import pytest

from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from zhllama.tokenizer.sentencepiece_model import CONTROL, NORMAL, parse_model
from zhllama.tokenizer.special_ids import SpecialIds, special_ids
from zhllama.tokenizer.vocabulary import Encoder

OLD = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
"""As the widespread copies of LLaMA 1 have them."""


@pytest.fixture(scope="module")
def encoder(llama_tokenizer: bytes) -> Encoder:
    return SentencePieceEncoder(llama_tokenizer)


@pytest.fixture(scope="module")
def chat_encoder(llama_tokenizer: bytes) -> Encoder:
    """800 pieces, then <|im_start|>, <|im_end|> (special), and an ordinary one."""
    proto = parse_model(llama_tokenizer)
    for text, kind in (("<|im_start|>", CONTROL), ("<|im_end|>", CONTROL), ("☆☆", NORMAL)):
        proto.pieces.add(piece=text, score=0.0, type=kind)
    return SentencePieceEncoder(proto.SerializeToString())


def test_files_that_disagree_are_named_in_one_line_and_do_not_count(encoder, caplog):
    files = {"config.json": OLD, "generation_config.json": OLD | {"pad_token_id": None}}
    with caplog.at_level(logging.WARNING):
        found = special_ids(encoder, files, "--model here")
    assert found == SpecialIds(1, 2, None)
    (line,) = caplog.messages
    assert line == (
        "--model here: config.json says bos 0, eos 1, pad 0 and generation_config.json says bos 0, eos 1; "
        "the tokenizer counts: bos 1, eos 2, pad none"
    )


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"bos_token_id": 1, "eos_token_id": 2},
        {"eos_token_id": [2, None]},
        {"pad_token_id": None},
        {"pad_token_id": -1},
    ],
)
def test_files_that_agree_or_say_nothing_are_not_mentioned(encoder, caplog, content):
    with caplog.at_level(logging.WARNING):
        assert special_ids(encoder, {"config.json": content}, "") == SpecialIds(1, 2, None)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("said", "further"),
    [
        ([2, 801], (801,)), (801, (801,)), ([801, 800, 2], (801, 800)),
        ([2, 802], ()), ([0, 1, 2], ()), ([2, 9999, -1], ()),
    ],
    ids=["one", "alone", "several", "no special piece", "unknown and bos", "out of range"],
)  # fmt: skip
def test_further_ends_count_where_they_are_special_pieces(chat_encoder, said, further):
    found = special_ids(chat_encoder, {"generation_config.json": {"eos_token_id": said}}, "")
    assert (found.eos, found.further, found.stops) == (2, further, (2, *further))


@pytest.mark.parametrize("said", ["</s>", True, 2.0, {"a": 1}, [[2]], 10**400], ids=str)
def test_what_is_no_id_does_not_count(encoder, caplog, said):
    with caplog.at_level(logging.WARNING):
        assert special_ids(encoder, {"config.json": {"eos_token_id": said}}, "").stops == (2,)
    (line,) = caplog.messages
    assert len(line) < 250


def test_what_is_published_is_written_by_the_rule(chat_encoder):
    found = special_ids(chat_encoder, {"generation_config.json": {"eos_token_id": [2, 801]}}, "")
    assert found.config == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    assert found.generation(OLD | {"top_p": 0.9}) == {"top_p": 0.9, "bos_token_id": 1, "eos_token_id": [2, 801]}
