"""Llama 3's tokenizer.model ↔ tokenizer.json: transformers' conversion, tiktoken's ids, and what neither can say."""

import base64
import json
from itertools import pairwise
from typing import Any

import pytest

from tests.zhllama.tokenizer.byte_level_models import trained
from tests.zhllama.tokenizer.test_gguf_tokenizer import LINES, ids_of
from zhllama.errors import InputError
from zhllama.tokenizer.byte_alphabet import spelt
from zhllama.tokenizer.gguf_tokenizer import PRE
from zhllama.tokenizer.tiktoken_file import (
    ends_of,
    is_tiktoken,
    merges_of,
    ranks_of,
    special_tokens,
    tiktoken_file_of,
    tokenizer_files_of,
)


def file_of(tokens: dict[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in tokens.items())


@pytest.fixture(scope="session")
def content(english_text: list[str], chinese_text: list[str]) -> bytes:
    """A tokenizer.model of 800 ranks."""
    fast = trained(english_text[:800] + chinese_text[:300], PRE["llama-bpe"], 800, [])
    return file_of(ranks_in(fast))


def ranks_in(fast: dict[str, Any]) -> dict[bytes, int]:
    known = {spelt(bytes([value])): value for value in range(256)}
    return {bytes(known[char] for char in text): rank for text, rank in fast["model"]["vocab"].items()}


@pytest.fixture(scope="session")
def files(content: bytes) -> dict[str, bytes]:
    return tokenizer_files_of(content, True, "here")


def test_the_conversion_is_transformers_own(content, files):
    from transformers.convert_slow_tokenizer import TikTokenConverter

    converter = TikTokenConverter("")
    converter.load_tiktoken_bpe = lambda url: ranks_of(content)
    vocabulary, merges = converter.extract_vocab_merges_from_model("")
    model = json.loads(files["tokenizer.json"])["model"]
    assert model["vocab"] == vocabulary
    assert [tuple(one) for one in model["merges"]] == merges
    assert len(merges) > len(vocabulary) - 256, "some tokens have several splits"
    assert model["ignore_merges"]


def tiktoken_ids(ranks: dict[bytes, int], piece: bytes) -> list[int]:
    """tiktoken's rule: a piece that is a token is that; else the neighbours of the best rank are merged."""
    if piece in ranks:
        return [ranks[piece]]
    parts = [piece[at : at + 1] for at in range(len(piece))]
    while len(parts) > 1:
        best, at = min((ranks.get(one + two, 2**31), at) for at, (one, two) in enumerate(pairwise(parts)))
        if best == 2**31:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [ranks[part] for part in parts]


def test_ids_are_tiktokens(content, files, english_text, chinese_text):
    import regex

    ranks = ranks_of(content)
    pattern = PRE["llama-bpe"].pre_tokenizer["pretokenizers"][0]["pattern"]["Regex"]
    lines = [*LINES, *english_text[-300:], *chinese_text[-300:]]
    wanted = [
        [800, *(index for piece in regex.findall(pattern, line) for index in tiktoken_ids(ranks, piece.encode()))]
        for line in lines
    ]
    assert ids_of(files["tokenizer.json"], lines) == wanted


@pytest.mark.parametrize("scaled", [False, True], ids=["3", "3.1"])
def test_special_ids_are_256_after_the_ranks_by_their_release(content, scaled):
    files = tokenizer_files_of(content, scaled, "here")
    fast, config = (json.loads(files[name]) for name in ("tokenizer.json", "tokenizer_config.json"))
    named = {one["content"]: one["id"] - 800 for one in fast["added_tokens"]}
    assert sorted(named.values()) == list(range(256))
    # as Meta's tokenizer.py has them
    wanted = {
        "<|begin_of_text|>": 0,
        "<|end_of_text|>": 1,
        "<|start_header_id|>": 6,
        "<|end_header_id|>": 7,
        "<|eot_id|>": 9,
    }
    wanted |= {"<|finetune_right_pad_id|>": 4, "<|eom_id|>": 8, "<|python_tag|>": 10} if scaled else {}
    assert named | wanted == named
    assert (config["bos_token"], config["eos_token"]) == ("<|begin_of_text|>", "<|end_of_text|>")
    assert ("pad_token" in config) == scaled
    assert ends_of(files) == ([801, 808, 809] if scaled else [801, 809])
    assert ids_of(files["tokenizer.json"], ["<|eot_id|>"]) == [[800, 809]]


def test_names_of_special_ids_that_lie_beside_it_count(content):
    beside = {"added_tokens_decoder": {"802": {"content": "<|im_start|>"}}, "chat_template": "{{ 1 }}", "other": 1}
    files = tokenizer_files_of(content, True, "here", beside)
    assert {one["id"]: one["content"] for one in json.loads(files["tokenizer.json"])["added_tokens"]}[
        802
    ] == "<|im_start|>"
    config = json.loads(files["tokenizer_config.json"])
    assert config["chat_template"] == "{{ 1 }}"
    assert "other" not in config


def test_it_comes_back_as_it_was(content, files):
    assert tiktoken_file_of(json.loads(files["tokenizer.json"]), "here") == content
    # merges as older files spell them
    fast = json.loads(files["tokenizer.json"])
    fast["model"]["merges"] = [" ".join(one) for one in fast["model"]["merges"]]
    assert tiktoken_file_of(fast, "here") == content


def test_an_extended_vocabulary_keeps_its_special_ids(content, english_text, chinese_text):
    ranks = ranks_of(content)
    texts = [text.encode() for text in ("饕餮", "囍", "你好啊")]
    assert not ranks.keys() & texts
    new = {text: 1056 + number for number, text in enumerate(texts)}
    longer = content + file_of(new)
    files = tokenizer_files_of(longer, True, "here")
    fast = json.loads(files["tokenizer.json"])
    assert [one["id"] for one in fast["added_tokens"]] == list(range(800, 1056))
    assert tiktoken_file_of(fast, "here") == longer
    plain = tokenizer_files_of(content, True, "here")
    lines = [line for line in english_text[-200:] if line.isascii()]
    assert ids_of(files["tokenizer.json"], lines) == ids_of(plain["tokenizer.json"], lines)
    assert max(max(ids) for ids in ids_of(files["tokenizer.json"], ["囍"])) >= 1056


GOOD = {bytes([value]): value for value in range(256)}


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (b"IQ== 0 x\n", "line 1 is no new token"),
        (b"!!!! 0\n", "line 1 is no new token"),
        (b"IQ== 0\nIQ== 1\n", "line 2 is no new token"),
        (b"IQ== 0\n", "the byte 0 is no token"),
        (file_of({**GOOD, b"ab": 255}), "two tokens have one rank"),
        (file_of({**GOOD, b"ab": 257}), "the rank 256 is missing"),
        (file_of({**GOOD, b"ab": 512, b"cd": 514}), "the rank 256 is missing"),
        (file_of({**GOOD, b"a" * 600: 256}), "line 257 is no new token"),
        (b"", "the byte 0 is no token"),
    ],
    ids=["a word more", "no Base64", "twice", "a byte less", "a rank twice", "a hole", "two holes", "long", "empty"],
)
def test_a_file_that_is_none_is_refused(tokens, said):
    with pytest.raises(InputError, match=f"^here: no tokenizer of Llama 3's kind \\({said}"):
        tokenizer_files_of(tokens, True, "here")


def test_it_is_told_from_sentencepieces(content, llama_tokenizer):
    assert is_tiktoken(content)
    assert is_tiktoken(content.replace(b"\n", b"\r\n"))
    assert not is_tiktoken(llama_tokenizer)
    assert not is_tiktoken(b"")


def changed(fast: dict[str, Any], **model: Any) -> dict[str, Any]:
    return fast | {"model": fast["model"] | model}


def test_what_the_file_cannot_say_is_refused(files):
    fast = json.loads(files["tokenizer.json"])
    merges = fast["model"]["merges"]
    cases = {
        "the merges of tokenizer.json do not follow from ranks": changed(fast, merges=merges[:-1]),
        "cuts texts as qwen2": changed(fast, ignore_merges=False)
        | {"pre_tokenizer": PRE["qwen2"].pre_tokenizer, "normalizer": {"type": "NFC"}},
        "has 257 added tokens": fast
        | {"added_tokens": [*fast["added_tokens"], {"id": 1056, "content": "[PAD]", "special": True}]},
        "cannot be said in Meta's tokenizer.model": changed(fast, vocab=fast["model"]["vocab"] | {"你": 1056}),
    }
    for said, one in cases.items():
        with pytest.raises(InputError, match=f"^here: .*{said}"):
            tiktoken_file_of(one, "here")


def test_every_split_is_listed_by_rank():
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"bc": 3, b"ab": 4, b"abc": 5}
    assert merges_of(ranks) == [(b"b", b"c"), (b"a", b"b"), (b"a", b"bc"), (b"ab", b"c")]


@pytest.mark.parametrize("scaled", [False, True])
def test_there_are_256_names(scaled):
    assert len(set(special_tokens(scaled))) == len(special_tokens(scaled)) == 256
