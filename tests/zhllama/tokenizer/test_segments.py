"""Encoding by segments gives SentencePiece's ids, whatever the vocabulary and the text; other models are not cut."""

import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.extend_tokenizer.pieces import extended
from tests.texts import mixed_lines, unigram_model
from zhllama.tokenizer import segments
from zhllama.tokenizer.segments import SegmentEncoder
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from zhllama.tokenizer.sentencepiece_model import BPE, BYTE, CONTROL, NORMAL, UNKNOWN, new_model, parse_model
from zhllama.tokenizer.vocabulary import Encoder

USER_DEFINED, UNUSED = 4, 5


def plain(encoder, texts, begin=True, end=True):
    """SentencePiece's own ids of each text."""
    return [[encoder.bos] * begin + ids + [encoder.eos] * end for ids in encoder.encode_batch(texts)]


def by_segments(encoder, texts, begin=True, end=True):
    """The same by the way under test, of a model that it fits."""
    assert SegmentEncoder.fits(parse_model(encoder.model))
    return listed(encoder.encode_flat(texts, begin, end))


def listed(flat):
    ids, lengths = flat
    assert len(ids) == lengths.sum()
    return [part.tolist() for part in np.split(ids, lengths.cumsum()[:-1])] if len(lengths) else []


@pytest.fixture(scope="module")
def encoders(llama_tokenizer, chinese_tokenizer) -> dict[str, Encoder]:
    """The small LLaMA-shaped vocabulary, and what the stage and the recipe make of it."""
    chinese = [("chinese", chinese_tokenizer)]
    return {
        "base": SentencePieceEncoder(llama_tokenizer),
        "ours": SentencePieceEncoder(extended(llama_tokenizer, chinese, "distinct", "han", pad=True).model),
        "recipe": SentencePieceEncoder(extended(llama_tokenizer, chinese, "zero", "all", pad=True).model),
    }


@pytest.mark.parametrize("which", ["base", "ours", "recipe"])
def test_every_kind_of_line_has_its_ids(encoders, which):
    lines = mixed_lines(20_500)
    found = [one for at in range(0, len(lines), 3000) for one in by_segments(encoders[which], lines[at : at + 3000])]
    different = [
        line for line, ours, one in zip(lines, found, plain(encoders[which], lines), strict=True) if ours != one
    ]
    assert different == []


texts = st.text(
    st.sampled_from(
        "的是不了在人我有中大  \t\n\r\x00，。！（）▁▁abcdefs<>/[]PAD0x123一二𠮷🤗　Ａ\u2028\ufeff\U0010ffff"
    )
    | st.characters(codec="utf-8"),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(given_texts=st.lists(texts, max_size=8), begin=st.booleans(), end=st.booleans())
def test_made_up_texts_have_their_ids(encoders, given_texts, begin, end):
    for encoder in encoders.values():
        assert by_segments(encoder, given_texts, begin, end) == plain(encoder, given_texts, begin, end)


@st.composite
def vocabularies(draw):
    """A BPE model whose pieces overlap in every way: of three letters and the mark, with scores of which many tie."""
    proto = new_model()
    for piece, kind in (("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)):
        proto.pieces.add(piece=piece, type=kind)
    for byte in range(256):
        proto.pieces.add(piece=f"<0x{byte:02X}>", type=BYTE)
    alphabet = st.sampled_from("ab好▁")
    for piece in draw(st.lists(st.text(alphabet, min_size=1, max_size=5), max_size=25, unique=True)):
        proto.pieces.add(piece=piece, score=draw(st.integers(-6, 0)), type=NORMAL)
    proto.trainer_spec.model_type = BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.remove_extra_whitespaces = False
    return bytes(proto.SerializeToString())


@settings(max_examples=400, deadline=None)
@given(model=vocabularies(), given_texts=st.lists(st.text(st.sampled_from("ab好▁ c\n"), max_size=30), max_size=6))
def test_any_vocabulary_gives_sentencepieces_ids(model, given_texts):
    encoder = SentencePieceEncoder(model)
    assert by_segments(encoder, given_texts) == plain(encoder, given_texts)
    # what is known by now changes nothing
    assert by_segments(encoder, given_texts[::-1], end=False) == plain(encoder, given_texts[::-1], end=False)


@settings(max_examples=50, deadline=None)
@given(batches=st.lists(st.lists(texts, max_size=4), max_size=6), known=st.integers(0, 20), size=st.integers(0, 200))
def test_forgetting_changes_nothing(llama_tokenizer, batches, known, size):
    encoder = SentencePieceEncoder(llama_tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "KNOWN", known)
        patch.setattr(segments, "KNOWN_BYTES", size)
        for batch in batches:
            assert by_segments(encoder, batch) == plain(encoder, batch)


def test_places_that_share_a_hash_change_nothing(llama_tokenizer, monkeypatch, chinese_text):
    monkeypatch.setattr(segments, "TABLE_BITS", 3)
    encoder = SentencePieceEncoder(llama_tokenizer)
    lines = ["\n".join(chinese_text[at : at + at % 3]) + "\n\n" * (at % 2) for at in range(500)]
    assert by_segments(encoder, lines) == plain(encoder, lines)


def test_many_threads_share_what_is_known(encoders, chinese_text, english_text):
    encoder = SentencePieceEncoder(encoders["ours"].model)
    lines = chinese_text + english_text
    batches = [lines[at : at + 40] for at in range(0, len(lines), 40)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda batch: by_segments(encoder, batch), batches))
    assert found == [plain(encoder, batch) for batch in batches]


def test_memory_is_bounded_however_many_segments_there_are(llama_tokenizer, monkeypatch):
    monkeypatch.setattr(segments, "KNOWN", 5000)
    monkeypatch.setattr(segments, "KNOWN_BYTES", 200_000)
    encoder = SentencePieceEncoder(llama_tokenizer)
    held = []
    tracemalloc.start()
    for round_ in range(40):
        encoder.encode_flat(
            [f"a{number}b" * 5 for number in range(round_ * 1000, round_ * 1000 + 1000)] + ["x" * 100_000]
        )
        if round_ in (9, 39):
            held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert held[1] < held[0] + 2_000_000


def changed(model: bytes, change) -> bytes:
    proto = parse_model(model)
    change(proto)
    return bytes(proto.SerializeToString())


def typed(kind: int):
    def change(proto) -> None:
        next(piece for piece in proto.pieces if piece.type == NORMAL and len(piece.piece) == 3).type = kind

    return change


def without_bytes(proto) -> None:
    proto.trainer_spec.byte_fallback = False
    for piece in proto.pieces:
        if piece.type == BYTE:
            piece.type = CONTROL


@pytest.mark.parametrize(
    "change",
    [
        typed(UNUSED),
        typed(USER_DEFINED),
        without_bytes,
        lambda proto: setattr(proto.trainer_spec, "treat_whitespace_as_suffix", True),
        lambda proto: setattr(proto.normalizer_spec, "remove_extra_whitespaces", True),
        lambda proto: setattr(proto.normalizer_spec, "add_dummy_prefix", False),
        lambda proto: setattr(proto.normalizer_spec, "escape_whitespaces", False),
        lambda proto: proto.pieces.add(piece="\n\n", score=-3, type=NORMAL),
    ],
    ids=["unused", "user-defined", "no bytes", "suffix", "spaces removed", "no mark", "no escape", "line breaks"],
)
def test_a_model_that_may_not_be_cut_is_not(llama_tokenizer, english_text, change):
    model = changed(llama_tokenizer, change)
    assert SegmentEncoder.fits(parse_model(llama_tokenizer))
    assert not SegmentEncoder.fits(parse_model(model))
    lines = [*english_text[:200], "  two  spaces ", "a\n\nb", "", "好"]
    encoder = SentencePieceEncoder(model)
    assert listed(encoder.encode_flat(lines, begin=True)) == plain(encoder, lines, end=False)
    assert listed(encoder.encode_flat([])) == []


def test_a_unigram_model_and_one_that_normalises_are_not_cut(chinese_text, tmp_path):
    import sentencepiece

    model = unigram_model(chinese_text, 1000)
    assert not SegmentEncoder.fits(parse_model(model))
    encoder = SentencePieceEncoder(model)
    assert listed(encoder.encode_flat(chinese_text[:100])) == plain(encoder, chinese_text[:100], False, False)
    (tmp_path / "text").write_text("\n".join(chinese_text), "utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "nfkc"),
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    assert not SegmentEncoder.fits(parse_model((tmp_path / "nfkc.model").read_bytes()))


def test_half_a_surrogate_pair_is_no_text(encoders):
    with pytest.raises(UnicodeEncodeError):
        encoders["ours"].encode_flat(["a\ud83e"])
