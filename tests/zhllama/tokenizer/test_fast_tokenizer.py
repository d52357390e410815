"""The published tokenizer files give SentencePiece's ids, whoever reads them."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zhllama.artifacts.open import open_artifact
from zhllama.errors import InputError
from zhllama.tokenizer.fast_tokenizer import load_fast
from zhllama.tokenizer.prompt import RECIPE
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from zhllama.tokenizer.sentencepiece_model import parse_model
from zhllama.tokenizer.vocabulary import Encoder, load_encoder

ADVERSARIAL = [
    "",
    " ",
    "  two  spaces  ",
    "▁",
    " ▁a",
    "\n\n\tindent\n",
    "\r\n",
    "a" * 300,
    "aaaa" + " " * 37 + "b",
    "def f(x):\n        return x  # eight",
    "中文 and English 混排，100％！",
    "🤗 emoji 👩‍👩‍👧 é e\u0301",
    "\u3000全角空格\u00a0不换行",
    "<0x0A> is text, not a byte",
    "null \x00 and bell \x07",
    "\ufeffbom",
]


@pytest.fixture(scope="module")
def folder(llama_tokenizer, tmp_path_factory) -> Path:
    """A model folder as it is published, without weights."""
    path = tmp_path_factory.mktemp("model")
    for name, content in SentencePieceEncoder(llama_tokenizer).files().items():
        (path / name).write_bytes(content)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return path


@pytest.fixture(scope="module")
def auto(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def encoder(llama_tokenizer) -> Encoder:
    return SentencePieceEncoder(llama_tokenizer)


def test_auto_tokenizer_gives_bos_and_sentencepieces_ids(auto, encoder, english_text, chinese_text):
    texts = english_text[:500] + chinese_text + ADVERSARIAL
    assert auto(texts)["input_ids"] == [[encoder.bos, *ids] for ids in encoder.encode_batch(texts)]


def test_the_plain_tokenizers_library_gives_the_same(llama_tokenizer, encoder, chinese_text):
    fast = load_fast(SentencePieceEncoder(llama_tokenizer).files())
    texts = chinese_text + ADVERSARIAL
    assert [found.ids for found in fast.encode_batch(texts)] == [[1, *ids] for ids in encoder.encode_batch(texts)]


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.sampled_from("  ▁\nabtheing.,<>1中文，\t") | st.characters(codec="utf-8"), max_size=60))
def test_any_text_is_encoded_alike(auto, encoder, text):
    if any(special in text for special in ("<s>", "</s>", "<unk>")):
        return
    assert auto(text)["input_ids"] == [encoder.bos, *encoder.encode(text)]


def test_ids_are_decoded_to_the_text(auto, english_text, chinese_text):
    for text in english_text[:50] + chinese_text[:50]:
        assert auto.decode(auto(text)["input_ids"], skip_special_tokens=True) == text


def test_a_chat_is_encoded_as_training_encodes_prompts(auto, encoder):
    chat = [{"role": "user", "content": "写一首诗"}]
    ids = auto.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert ids == [encoder.bos, *encoder.encode(RECIPE.wrap("写一首诗"))]


def test_the_second_turn_of_a_chat_begins_as_the_first(auto, encoder):
    chat = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    ids = auto.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert ids[: ids.index(encoder.eos)] == [encoder.bos, *encoder.encode(RECIPE.wrap("one") + "two")]
    assert ids[ids.index(encoder.eos) + 1 :] == encoder.encode(RECIPE.wrap("three"))


def test_special_tokens_have_their_ids(auto):
    assert (auto.bos_token_id, auto.eos_token_id, auto.unk_token_id, auto.pad_token_id) == (1, 2, 0, None)


def test_the_padding_piece_is_the_padding_token(llama_tokenizer, tmp_path):
    from transformers import AutoTokenizer

    proto = parse_model(llama_tokenizer)
    proto.pieces.add(piece="[PAD]", score=-40000)
    for name, content in SentencePieceEncoder(proto.SerializeToString()).files(max_length=77).items():
        (tmp_path / name).write_bytes(content)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.pad_token_id == len(proto.pieces) - 1
    assert tokenizer.model_max_length == 77


def test_a_parsed_model_is_written_as_it_was(llama_tokenizer):
    assert parse_model(llama_tokenizer).SerializeToString() == llama_tokenizer


def test_the_encoder_is_loaded_from_a_model_folder(folder, llama_tokenizer):
    assert load_encoder(open_artifact(str(folder)), "--tokenizer").model == llama_tokenizer


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(InputError, match=r"--tokenizer .*no tokenizer\.model"):
        load_encoder(open_artifact(str(tmp_path)), "--tokenizer")


@pytest.mark.parametrize("content", [b"", b"no model", b"\x00" * 50], ids=["empty", "text", "zeros"])
def test_what_is_no_sentencepiece_model_is_refused(content):
    with pytest.raises(InputError, match=r"not a SentencePiece model|without pieces"):
        parse_model(content)
