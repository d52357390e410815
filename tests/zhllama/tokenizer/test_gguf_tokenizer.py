"""A GGUF's tokenizer as a model folder's files and back: the same ids in `tokenizers`, SentencePiece and llama.cpp."""

import json
from typing import Any

import pytest

from tests.gguf_models import add, sentencepiece_fields
from tests.zhllama.tokenizer.byte_level_models import trained
from zhllama.errors import InputError
from zhllama.tokenizer.gguf_tokenizer import (
    PRE,
    byte_level_fields,
    ends_of,
    pre_named,
    pre_of,
    sentencepiece_of,
    tokenizer_files_of,
)
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder

LINES = [
    "Hello, World! It's 12345 tests, DON'T WE'LL 3.14159.", "\n\n\tindent\r\n  two  spaces   \n",
    "你好，世界！2024年12月 全角１２３", "  a", "x" * 70, "ﬁ ½ ② १२३ é e\u0301 🤗 \u3000 \xa0", "a\x00b\x01",
    "||=>^~ $5+3<4 -- ?!?! ...",
    "don't—“quoted”", "",
]  # fmt: skip
SPECIAL = ["<|begin|>", "<|end|>", "<|turn|>"]


@pytest.fixture(scope="session")
def fast(english_text: list[str], chinese_text: list[str]) -> dict[str, dict[str, Any]]:
    """A tokenizer.json's object for each way to cut a text."""
    lines = english_text[:800] + chinese_text[:300]
    return {name: trained(lines, pre, 700, SPECIAL, first=name == "smollm") for name, pre in PRE.items()}


def fields_of(fast: dict[str, Any], **more: Any) -> dict[str, Any]:
    ids = {one["content"]: one["id"] for one in fast["added_tokens"]}
    said = {"bos_token_id": ids["<|begin|>"], "eos_token_id": ids["<|end|>"], "eot_token_id": ids["<|turn|>"], **more}
    return byte_level_fields(fast, "here") | {f"tokenizer.ggml.{name}": value for name, value in said.items()}


def ids_of(fast: bytes | dict[str, Any], lines: list[str] = LINES) -> list[list[int]]:
    from tokenizers import Tokenizer

    content = fast if isinstance(fast, bytes) else json.dumps(fast).encode()
    return [one.ids for one in Tokenizer.from_str(content.decode()).encode_batch(lines)]


@pytest.mark.parametrize("name", PRE)
def test_a_byte_level_tokenizer_comes_back_as_it_was(fast, name):
    fields = fields_of(fast[name], padding_token_id=None)
    assert fields["tokenizer.ggml.pre"] == name
    files = tokenizer_files_of({key: value for key, value in fields.items() if value is not None}, "here")
    assert json.loads(files["tokenizer.json"]) == fast[name]
    config = json.loads(files["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"]) == ("<|begin|>", "<|end|>")
    assert "pad_token" not in config
    assert ids_of(files["tokenizer.json"]) == ids_of(fast[name])
    assert ends_of(fields) == [fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.eot_token_id"]]


@pytest.mark.gguf
@pytest.mark.parametrize("name", PRE)
def test_llama_cpp_gives_the_same_ids(tmp_path, fast, name, english_text, chinese_text):
    import unicodedata

    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make gguf")
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "vocabulary.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, value in {"context_length": 64, "embedding_length": 8, "block_count": 1, "head_count": 2}.items():
        getattr(writer, f"add_{key}")(value)
    writer.add_feed_forward_length(12)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in fields_of(fast[name]).items():
        add(writer, key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    # llama.cpp normalises nothing
    lines = [
        unicodedata.normalize("NFC", line) for line in [*LINES, *english_text[-500:], *chinese_text[-500:]] if line
    ]
    found = [model.tokenize(line.encode(), add_bos=True, special=False) for line in lines]
    differing = [line for line, one, other in zip(lines, found, ids_of(fast[name], lines)) if one != other]
    assert differing == []


def test_rows_without_a_token_are_named_as_llama_cpp_does(fast):
    fields = fields_of(fast["qwen2"]) | byte_level_fields(fast["qwen2"], "here", rows=720)
    assert fields["tokenizer.ggml.tokens"][-1] == "[PAD719]"
    assert fields["tokenizer.ggml.token_type"][-1] == 5
    assert json.loads(tokenizer_files_of(fields, "here")["tokenizer.json"]) == fast["qwen2"]
    with pytest.raises(InputError, match="and there are 701 rows"):
        byte_level_fields(fast["qwen2"], "here", rows=701)


def test_words_of_the_users_own_stay_words(fast):
    fields = fields_of(fast["gpt-2"])
    fields["tokenizer.ggml.tokens"] = [*fields["tokenizer.ggml.tokens"], "<tool>"]
    fields["tokenizer.ggml.token_type"] = [*fields["tokenizer.ggml.token_type"], 4]
    found = json.loads(tokenizer_files_of(fields, "here")["tokenizer.json"])
    assert found["added_tokens"][-1]["content"] == "<tool>"
    assert not found["added_tokens"][-1]["special"]


def test_offsets_and_a_sequence_of_one_are_no_other_way_to_cut(fast):
    other = json.loads(json.dumps(fast["llama-bpe"]).replace('"trim_offsets": true', '"trim_offsets": false'))
    assert pre_of(other, "here") == "llama-bpe"
    other = fast["gpt-2"] | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [fast["gpt-2"]["pre_tokenizer"]]}}
    assert pre_of(other, "here") == "gpt-2"


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"normalizer": {"type": "Lowercase"}},
    ],
    ids=["none", "a space before", "lower case"],
)
def test_another_way_to_cut_is_refused(fast, change):
    with pytest.raises(InputError, match=r"^here: tokenizer\.json cuts texts in a way that llama\.cpp has no name for"):
        pre_of(fast["gpt-2"] | change, "here")


def test_another_rule_of_merging_is_another_way(fast):
    model = fast["llama-bpe"]["model"] | {"ignore_merges": False}
    with pytest.raises(InputError, match="no name for"):
        pre_of(fast["llama-bpe"] | {"model": model}, "here")


def test_names_for_the_same_are_known_and_others_refused():
    assert pre_named("llama3", "here") is PRE["llama-bpe"]
    with pytest.raises(InputError, match=r"^here: its tokenizer cuts texts as tekken \(tokenizer\.ggml\.pre\)"):
        pre_named("tekken", "here")


def spoilt(fields: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    key = f"tokenizer.ggml.{name}"
    return {**fields, key: value(fields[key]) if callable(value) else value}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("model", "t5", "is of the kind t5"),
        ("model", 7, "is of the kind 7"),
        ("tokens", lambda tokens: tokens[:-1], "shorter|longer|argument"),
        ("tokens", lambda tokens: [*tokens[:-1], tokens[0]], "twice"),
        ("tokens", "a", "there are 1 tokens"),
        ("tokens", lambda tokens: list(range(len(tokens))), "no texts|expected str"),
        ("merges", ["a b c"], "'a b c' is no merge"),
        ("merges", ["Ġt hequick"], "of tokens that are not in it"),
        ("merges", [1], "split"),
        ("eos_token_id", 100_000, "eos_token_id is 100000"),
        ("eos_token_id", "a", "eos_token_id is 'a'"),
        ("pre", "tekken", "cuts texts as tekken"),
        ("pre", 3, "cuts texts as 3"),
    ],
)
def test_fields_that_are_no_vocabulary_are_refused(fast, name, value, said):
    with pytest.raises(InputError, match=f"^here: .*({said})"):
        tokenizer_files_of(spoilt(fields_of(fast["gpt-2"]), name, value), "here")


def test_a_field_that_is_not_there_is_named(fast):
    fields = fields_of(fast["gpt-2"])
    del fields["tokenizer.ggml.merges"]
    with pytest.raises(InputError, match=r"it has no tokenizer\.ggml\.merges"):
        tokenizer_files_of(fields, "here")
    with pytest.raises(InputError, match="no tokenizer is in it"):
        tokenizer_files_of({}, "here")


# --- SentencePiece's --------------------------------------------------------------------------------------------------


def test_a_sentencepiece_model_comes_back_as_it_was(llama_tokenizer, english_text, chinese_text):
    fields = sentencepiece_fields(llama_tokenizer)
    found, own = SentencePieceEncoder(sentencepiece_of(fields)), SentencePieceEncoder(llama_tokenizer)
    lines = [*LINES, *english_text[:500], *chinese_text[:500]]
    assert found.encode_batch(lines) == own.encode_batch(lines)
    assert found.vocabulary() == own.vocabulary()
    files = tokenizer_files_of({**fields, "tokenizer.chat_template": "{{ 1 }}"}, "here")
    assert json.loads(files["tokenizer_config.json"])["chat_template"] == "{{ 1 }}"


def test_rows_that_only_pad_are_no_pieces(llama_tokenizer):
    fields = sentencepiece_fields(llama_tokenizer)
    for name, more in {"tokens": ["[PAD800]", "[PAD801]"], "scores": [0.0, 0.0], "token_type": [5, 5]}.items():
        fields[f"tokenizer.ggml.{name}"] += more
    assert SentencePieceEncoder(sentencepiece_of(fields)).size == 800


def test_settings_of_sentencepiece_count(llama_tokenizer):
    fields = sentencepiece_fields(llama_tokenizer)
    plain = SentencePieceEncoder(sentencepiece_of(fields))
    without = SentencePieceEncoder(
        sentencepiece_of(spoilt(fields | {"tokenizer.ggml.add_space_prefix": True}, "add_space_prefix", False))
    )
    assert plain.encode("hello") != without.encode("hello")
    removing = SentencePieceEncoder(sentencepiece_of({**fields, "tokenizer.ggml.remove_extra_whitespaces": True}))
    assert removing.encode("a  b ") == plain.encode("a b")


def test_ids_that_say_none_are_none(llama_tokenizer):
    fields = sentencepiece_fields(llama_tokenizer, **{"tokenizer.ggml.padding_token_id": 2**32 - 1})
    assert SentencePieceEncoder(sentencepiece_of(fields)).pad is None


def test_pieces_without_scores_are_refused(llama_tokenizer):
    fields = sentencepiece_fields(llama_tokenizer)
    del fields["tokenizer.ggml.scores"]
    with pytest.raises(InputError, match=r"it has no tokenizer\.ggml\.scores"):
        tokenizer_files_of(fields, "here")
