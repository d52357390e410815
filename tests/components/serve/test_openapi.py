"""What /openapi.json says of a request is what the server does with it."""

from contextlib import nullcontext
from typing import Any

import jsonschema
import pytest

from components.serve.openapi import described
from components.serve.requests import ApiError, Limits, detokenized
from zhllama.tokenizer.chat import Chat
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder as Encoder


@pytest.mark.parametrize(
    ("more", "taken"),
    [({}, True), ({"": None}, True), ({"unheard": None}, True), ({"": 1}, False), ({"unheard": False}, False)],
)
def test_a_field_that_nobody_knows_is_taken_where_it_says_nothing(
    llama_tokenizer: bytes, more: dict[str, Any], taken: bool
) -> None:
    limits, body = Limits("zhllama", Chat(Encoder(llama_tokenizer)), 256), {"model": "zhllama", "tokens": [5], **more}
    post = described(limits)["paths"]["/detokenize"]["post"]
    schema = post["requestBody"]["content"]["application/json"]["schema"]
    assert jsonschema.Draft202012Validator(schema).is_valid(body) == taken
    with nullcontext() if taken else pytest.raises(ApiError, match="is nothing that this server knows"):
        detokenized(body, limits)
