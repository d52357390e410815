"""Token for token: what training encodes is what the published tokenizer gives, on every kind of line."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.extend_tokenizer.pieces import extended
from tests.texts import mixed_lines
from zhllama.tokenizer.fast_tokenizer import load_fast
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from zhllama.tokenizer.vocabulary import Encoder

LINES = 20_500
SPECIAL = ("<s>", "</s>", "<unk>", "[PAD]")


@pytest.fixture(scope="module")
def model(llama_tokenizer, chinese_tokenizer) -> bytes:
    """The small LLaMA-shaped vocabulary, extended as by default."""
    return extended(llama_tokenizer, [("chinese", chinese_tokenizer)], "distinct", "han", pad=True).model


@pytest.fixture(scope="module")
def encoder(model) -> Encoder:
    return SentencePieceEncoder(model)


@pytest.fixture(scope="module")
def auto(model, tmp_path_factory):
    """transformers' AutoTokenizer on the published files."""
    from transformers import AutoTokenizer

    folder: Path = tmp_path_factory.mktemp("published")
    for name, content in SentencePieceEncoder(model).files().items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def lines() -> list[str]:
    # in a text of the standard library a special token may stand: the one exception, which is declared
    return [line for line in mixed_lines(LINES + 500) if not any(special in line for special in SPECIAL)]


@pytest.fixture(scope="module")
def ids(encoder, lines) -> list[list[int]]:
    return encoder.encode_batch(lines)


def test_the_lines_are_many_and_of_every_kind(lines):
    assert len(lines) >= 20_000
    text = "\n".join(lines)
    for kind in ("的", "def ", "🤗", "    ", "\t", "１", "𠀀", "한국어", "\x00", "▁"):
        assert kind in text
    assert "" in lines
    assert max(map(len, lines)) >= 3000


def test_auto_tokenizer_gives_sentencepieces_ids_on_every_line(auto, encoder, lines, ids):
    found = auto(lines)["input_ids"]
    different = [line for line, ours, theirs in zip(lines, ids, found, strict=True) if [encoder.bos, *ours] != theirs]
    assert different == []


def test_the_plain_library_gives_sentencepieces_ids_on_every_line(model, encoder, lines, ids):
    found = load_fast(SentencePieceEncoder(model).files()).encode_batch(lines)
    different = [line for line, ours, one in zip(lines, ids, found, strict=True) if [encoder.bos, *ours] != one.ids]
    assert different == []


def test_a_line_comes_back_wherever_sentencepiece_brings_it_back(auto, encoder, lines, ids):
    back = [line for line, one in zip(lines, ids, strict=True) if encoder.decode(one) == line]
    # what does not: lines with the mark that stands for a space
    assert len(back) > 0.95 * len(lines)
    assert all("▁" in line or "\x00" in line for line in set(lines) - set(back))
    found = auto.batch_decode(auto(back)["input_ids"], skip_special_tokens=True)
    assert [line for line, one in zip(back, found, strict=True) if line != one] == []


texts = st.text(
    st.sampled_from("的是不了在人我有中大  \t\n，。！（）▁abcdefs<>/[]PAD0123一二𠮷🤗　Ａ")
    | st.characters(codec="utf-8"),
    max_size=80,
)


@settings(max_examples=500, deadline=None)
@given(text=texts)
def test_made_up_text_is_encoded_and_brought_back_alike(auto, encoder, text):
    if any(special in text for special in SPECIAL):
        return
    ours = encoder.encode(text)
    assert auto(text)["input_ids"] == [encoder.bos, *ours]
    if encoder.decode(ours) == text:
        assert auto.decode([encoder.bos, *ours], skip_special_tokens=True) == text


@given(before=texts, special=st.sampled_from(SPECIAL), after=texts)
def test_a_special_token_in_a_users_text_stays_text(encoder, before, special, after):
    """[PAD] too, since it is a control piece."""
    assert not {encoder.bos, encoder.eos, encoder.pad} & set(encoder.encode(before + special + after))
    array, lengths = encoder.encode_flat([before + special + after], begin=True, end=True)
    assert lengths.tolist() == [len(array)]
    assert array[0] == encoder.bos
    assert array[-1] == encoder.eos
    assert array[1:-1].tolist() == encoder.encode(before + special + after)
