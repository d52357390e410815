"""The vocabulary contract: what equals, extends, shrinks or is foreign, and the one encoder."""

import dataclasses
import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from zhllama.tokenizer.sentencepiece_model import parse_model
from zhllama.tokenizer.vocabulary import (
    PAD_PIECE,
    Encoder,
    Relation,
    Vocabulary,
    contract_of,
    load_encoder,
    padding_multiple,
)


def contract(pieces: list[str], marks: set[int], **changed) -> Vocabulary:
    """The contract of a list of pieces, written down again here: digest of length and text of each, in order."""
    running = hashlib.sha256()
    prefixes = {}
    for index, piece in enumerate(pieces):
        if index in marks:
            prefixes[str(index)] = running.hexdigest()
        running.update(len(piece.encode()).to_bytes(4, "little") + piece.encode())
    return dataclasses.replace(Vocabulary(len(pieces), running.hexdigest(), 1, 2, None, prefixes), **changed)


def extended(model: bytes, *pieces: str) -> bytes:
    proto = parse_model(model)
    for piece in pieces:
        proto.pieces.add(piece=piece, score=0.0)
    return bytes(proto.SerializeToString())


pieces = st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=8, unique=True)


@given(pieces, pieces)
def test_a_vocabulary_extends_exactly_those_whose_pieces_are_its_first(base, more):
    long = base + [piece for piece in more if piece not in base]
    one = contract(base, set())
    other = contract(long, set(range(len(long))))
    if len(long) == len(base):
        assert other.relation_to(one) is Relation.EQUAL
    else:
        assert other.relation_to(one) is Relation.EXTENDS
        assert one.relation_to(other) is Relation.SHRINKS


@given(pieces, st.randoms())
def test_another_order_is_foreign(listed, chance):
    shuffled = listed[:]
    chance.shuffle(shuffled)
    wanted = Relation.EQUAL if shuffled == listed else Relation.FOREIGN
    assert contract(listed, set()).relation_to(contract(shuffled, set())) is wanted


@given(pieces, pieces)
def test_relations_mirror_each_other(one, other):
    mirror = {Relation.EXTENDS: Relation.SHRINKS, Relation.SHRINKS: Relation.EXTENDS}
    a, b = contract(one, set(range(9))), contract(other, set(range(9)))
    relation = a.relation_to(b)
    assert b.relation_to(a) is mirror.get(relation, relation)


@pytest.mark.parametrize("changed", [{"bos": 5}, {"eos": 5}])
def test_other_special_ids_are_foreign(changed):
    one = contract(["a", "b"], set())
    assert one.relation_to(dataclasses.replace(one, **changed)) is Relation.FOREIGN


def test_pieces_that_only_join_to_the_same_text_are_foreign():
    assert contract(["ab", "c"], set()).relation_to(contract(["a", "bc"], set())) is Relation.FOREIGN


@given(st.integers(1, 100_000), st.sampled_from([1, 2, 8, 64, 128]))
def test_rows_are_pieces_rounded_up(size, multiple):
    rows = Vocabulary(size, "", 1, 2, None, padding_multiple=multiple).rows
    assert rows % multiple == 0
    assert 0 <= rows - size < multiple
    found = padding_multiple(size, rows)
    assert Vocabulary(size, "", 1, 2, None, padding_multiple=found).rows == rows


def test_an_appended_eos_extends_and_another_of_the_first_pieces_is_foreign():
    base, longer = contract(["a", "b", "c"], set()), contract(["a", "b", "c", "end"], {3})
    assert dataclasses.replace(longer, eos=3).relation_to(base) is Relation.EXTENDS
    assert base.relation_to(dataclasses.replace(longer, eos=3)) is Relation.SHRINKS
    assert dataclasses.replace(longer, eos=0).relation_to(base) is Relation.FOREIGN


def test_a_contract_of_an_earlier_release_takes_in_what_the_folder_names(base, llama_tokenizer, tmp_path):
    out = ArtifactWriter(str(tmp_path), "fetch_weights", "key")
    out.add_bytes("tokenizer.model", llama_tokenizer)
    out.add_json("added_tokens.json", {"<|im_end|>": 800})
    out.vocabulary = base.vocabulary(dtype="float16")
    artifact = open_artifact(out.publish("hf-model").reference)
    found = contract_of(artifact, load_encoder(artifact, ""))
    assert (found.size, found.dtype, found.relation_to(base.vocabulary(also_at=[800]))) == (
        801, "float16", Relation.EXTENDS,
    )  # fmt: skip


# --- of real tokenizers -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(llama_tokenizer: bytes) -> Encoder:
    return SentencePieceEncoder(llama_tokenizer)


@pytest.fixture(scope="module")
def with_chinese(llama_tokenizer: bytes) -> Encoder:
    return SentencePieceEncoder(extended(llama_tokenizer, "你好", "中国", PAD_PIECE))


def test_an_extended_model_extends_its_base(base, with_chinese):
    longer = with_chinese.vocabulary(also_at=[base.size])
    assert longer.relation_to(base.vocabulary()) is Relation.EXTENDS
    assert (longer.bos, longer.eos, longer.pad) == (1, 2, base.size + 2)
    assert base.vocabulary().pad is None


def test_the_contract_is_the_digest_of_length_and_text_of_each_piece(base):
    assert base.vocabulary() == contract(base.pieces, set(), pad=None)


def test_the_contract_survives_a_manifest(with_chinese, tmp_path):
    out = ArtifactWriter(str(tmp_path), "stage", "key")
    out.add_bytes("tokenizer.model", with_chinese.model)
    out.vocabulary = with_chinese.vocabulary(also_at=[100], tied=True, dtype="float16", padding_multiple=64)
    published = out.publish("tokenizer")
    assert open_artifact(published.reference).manifest.vocabulary == out.vocabulary
    assert json.loads(published.to_json())["vocabulary"]["padding_multiple"] == 64


@pytest.mark.parametrize("text", ["</s>", "a</s>b", "<s>", PAD_PIECE, "<unk>", "<0x41>"])
def test_special_pieces_in_a_users_text_stay_text(base, text):
    ids = base.encode(text)
    assert not {base.bos, base.eos} & set(ids)
    assert base.decode(ids) == text


@given(st.text(max_size=40).filter(lambda text: "\x00" not in text and "▁" not in text))
def test_any_text_comes_back(base, text):
    assert base.decode(base.encode(text)) == text


def test_a_batch_is_the_same_as_one_by_one(base, chinese_text, english_text):
    texts = [*chinese_text[:50], *english_text[:50], "", " "]
    assert base.encode_batch(texts) == [base.encode(text) for text in texts]
    assert base.encode_batch([]) == []


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 100])
def test_what_is_no_model_is_refused(content):
    with pytest.raises(InputError, match=r"/x/tokenizer\.model: not a SentencePiece model"):
        SentencePieceEncoder(content, "/x/tokenizer.model")
