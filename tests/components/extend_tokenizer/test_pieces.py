"""The rule of extension: what is appended, with which score, and that nothing else changes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from components.extend_tokenizer.extender import differing, probe
from components.extend_tokenizer.pieces import extended, is_chinese, splits, unreachable
from zhllama.errors import InputError
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from zhllama.tokenizer.sentencepiece_model import CONTROL, NORMAL, parse_model
from zhllama.tokenizer.vocabulary import Relation


def extension_of(llama_tokenizer, *chinese, scores="distinct", pieces="han", pad=True):
    named = [(f"model {index}", model) for index, model in enumerate(chinese)]
    return extended(llama_tokenizer, named, scores, pieces, pad)


def test_the_recipes_switches_give_the_recipes_bytes(llama_tokenizer, chinese_tokenizer):
    # the rule in the recipe's own words: absent pieces, in order, score 0, type unset; then [PAD]
    recipe, there = parse_model(llama_tokenizer), {piece.piece for piece in parse_model(llama_tokenizer).pieces}
    for piece in [*(piece.piece for piece in parse_model(chinese_tokenizer).pieces), "[PAD]"]:
        if piece not in there:
            new = type(recipe).SentencePiece()
            new.piece, new.score = piece, 0
            recipe.pieces.append(new)
    made = extension_of(llama_tokenizer, chinese_tokenizer, scores="zero", pieces="all")
    assert made.model == recipe.SerializeToString()
    assert not parse_model(made.model).pieces[-1].HasField("type")


def test_nothing_that_was_there_changes(llama_tokenizer, chinese_tokenizer):
    old, new = parse_model(llama_tokenizer), parse_model(extension_of(llama_tokenizer, chinese_tokenizer).model)
    assert list(new.pieces)[: len(old.pieces)] == list(old.pieces)
    assert new.trainer_spec == old.trainer_spec
    assert new.normalizer_spec == old.normalizer_spec


def test_scores_are_distinct_and_below_the_lowest_ordinary_one(llama_tokenizer, chinese_tokenizer):
    old = parse_model(llama_tokenizer)
    lowest = min(piece.score for piece in old.pieces if piece.type == NORMAL and piece.score > -1e8)
    new = list(parse_model(extension_of(llama_tokenizer, chinese_tokenizer).model).pieces)[len(old.pieces) :]
    assert [piece.score for piece in new] == [lowest - 1 - index for index in range(len(new))]
    assert (new[-1].piece, new[-1].type) == ("[PAD]", CONTROL)


def test_the_padding_piece_is_never_encoded(llama_tokenizer, chinese_tokenizer):
    encoder = SentencePieceEncoder(extension_of(llama_tokenizer, chinese_tokenizer).model)
    assert encoder.pad == encoder.size - 1
    assert encoder.pad not in encoder.encode("[PAD] [PAD]")


def test_english_keeps_every_id(llama_tokenizer, chinese_tokenizer, english_text):
    before, after = (
        SentencePieceEncoder(llama_tokenizer),
        SentencePieceEncoder(extension_of(llama_tokenizer, chinese_tokenizer).model),
    )
    assert len(english_text) >= 1500
    assert after.encode_batch(english_text) == before.encode_batch(english_text)


def test_chinese_takes_fewer_tokens(llama_tokenizer, chinese_tokenizer, chinese_text):
    before, after = (
        SentencePieceEncoder(llama_tokenizer),
        SentencePieceEncoder(extension_of(llama_tokenizer, chinese_tokenizer).model),
    )
    tokens = [sum(map(len, encoder.encode_batch(chinese_text))) for encoder in (before, after)]
    assert tokens[0] / tokens[1] > 3


@pytest.mark.parametrize(
    ("piece", "chinese"),
    [
        ("的", True), ("▁我们", True), ("。", True), ("，但", True), ("（", True), ("𠮷", True), ("々", True),
        ("ing", False), ("...", False), ("▁", False), ("“", False), ("１", False), ("Ａ", False), ("é", False),
    ],
)  # fmt: skip
def test_what_counts_as_chinese(piece, chinese):
    assert is_chinese(piece) is chinese


def test_by_default_only_chinese_pieces_are_appended(llama_tokenizer, chinese_tokenizer):
    chosen = extension_of(llama_tokenizer, chinese_tokenizer)
    everything = extension_of(llama_tokenizer, chinese_tokenizer, pieces="all")
    assert all(is_chinese(piece) for piece in chosen.appended[:-1])
    assert len(everything.appended) == len(chosen.appended) + chosen.left_out
    assert chosen.present + chosen.left_out + len(chosen.appended) - 1 == len(parse_model(chinese_tokenizer).pieces)


def test_a_piece_with_a_character_that_has_no_piece_stays_away(llama_tokenizer, chinese_tokenizer):
    stray = parse_model(chinese_tokenizer)
    for text in ("☆", "☆好", "好，☆"):
        stray.pieces.add(piece=text, score=0)
    made = extension_of(llama_tokenizer, stray.SerializeToString())
    assert not {"☆", "☆好", "好，☆"} & set(made.appended)
    assert (
        differing(SentencePieceEncoder(made.model).files(), SentencePieceEncoder(made.model), ["☆好", "很好，☆☆好"])
        == 0
    )
    recipe = extension_of(llama_tokenizer, stray.SerializeToString(), pieces="all")
    assert {"☆", "☆好", "好，☆"} <= set(recipe.appended)


def test_several_models_are_appended_in_turn(llama_tokenizer, chinese_tokenizer, chinese_text):
    from components.train_tokenizer.sentencepiece_trainer import trained

    second = trained([text.replace("的", "之") for text in chinese_text], 700, 0.9995, "text")
    first_alone = extension_of(llama_tokenizer, chinese_tokenizer, pad=False)
    both = extension_of(llama_tokenizer, chinese_tokenizer, second, pad=False)
    assert both.appended[: len(first_alone.appended)] == first_alone.appended
    assert len(set(both.appended)) == len(both.appended) > len(first_alone.appended)


def test_without_a_chinese_model_only_the_padding_piece_is_appended(llama_tokenizer, chinese_tokenizer):
    plain = extension_of(llama_tokenizer, chinese_tokenizer, scores="zero", pieces="all", pad=False)
    padded = extended(plain.model, [], "zero", "all", pad=True)
    assert padded.appended == ["[PAD]"]
    contract = SentencePieceEncoder(padded.model).vocabulary(also_at=[SentencePieceEncoder(plain.model).size])
    assert contract.relation_to(SentencePieceEncoder(plain.model).vocabulary()) is Relation.EXTENDS


def test_a_model_that_gives_nothing_new_is_named(llama_tokenizer, chinese_tokenizer):
    with pytest.raises(InputError, match="model 1: all its Chinese pieces are in the vocabulary already"):
        extension_of(llama_tokenizer, chinese_tokenizer, chinese_tokenizer)


def test_padding_twice_is_refused(llama_tokenizer):
    padded = extension_of(llama_tokenizer)
    with pytest.raises(InputError, match=r"nothing to append: \[PAD\] is there already"):
        extension_of(padded.model)


def test_pieces_are_split_as_the_old_vocabulary_splits_them(llama_tokenizer):
    encoder = SentencePieceEncoder(llama_tokenizer)
    (han, english) = splits(llama_tokenizer, ["中", "string"])
    assert [encoder.pieces[index] for index in han] == ["<0xE4>", "<0xB8>", "<0xAD>"]
    assert "".join(encoder.pieces[index] for index in english) == "string"


def with_pieces(model, *texts):
    """A model that has these pieces too."""
    proto = parse_model(model)
    for text in texts:
        proto.pieces.add(piece=text, score=0)
    return bytes(proto.SerializeToString())


def test_a_unigram_models_pieces_are_completed_and_all_reached(llama_tokenizer, unigram_tokenizer, chinese_text):
    made = extension_of(llama_tokenizer, unigram_tokenizer)
    recipe = extension_of(llama_tokenizer, unigram_tokenizer, scores="zero")
    assert unreachable(recipe) > 0
    assert unreachable(made) == 0
    assert made.completing
    assert made.dropped == []
    # appended after the models' own pieces, which keep the recipe's ids
    own = [text for text in recipe.appended if text != "[PAD]"]
    assert made.appended == [*own, *made.completing, "[PAD]"]
    assert all(is_chinese(text) for text in made.completing)
    lines = probe(made.appended, seed=5) + chinese_text
    assert differing(SentencePieceEncoder(made.model).files(), SentencePieceEncoder(made.model), lines) == 0


def test_models_of_both_kinds_are_appended_in_turn(llama_tokenizer, chinese_tokenizer, unigram_tokenizer, english_text):
    made = extension_of(llama_tokenizer, chinese_tokenizer, unigram_tokenizer)
    assert unreachable(made) == 0
    encoder = SentencePieceEncoder(made.model)
    assert encoder.encode_batch(english_text) == SentencePieceEncoder(llama_tokenizer).encode_batch(english_text)
    assert differing(SentencePieceEncoder(made.model).files(), encoder, probe(made.appended, seed=6)) == 0


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text("甲乙丙丁1a▁", min_size=2, max_size=7), min_size=1, max_size=12, unique=True))
def test_whatever_is_appended_merges_reach_it(llama_tokenizer, texts):
    letters = "甲乙丙丁"
    texts = [text for text in texts if is_chinese(text) and "▁▁" not in text]
    if not texts:
        return
    made = extension_of(llama_tokenizer, with_pieces(llama_tokenizer, *letters, *texts))
    assert unreachable(made) == 0
    assert {*letters, *texts} <= {*made.appended, *made.dropped}
    lines = ["".join(texts), " ".join(texts), "".join(reversed(texts))]
    assert differing(SentencePieceEncoder(made.model).files(), SentencePieceEncoder(made.model), lines) == 0


def test_a_piece_with_two_spaces_in_a_row_is_left_out(llama_tokenizer):
    made = extension_of(llama_tokenizer, with_pieces(llama_tokenizer, "丁", "丁▁", "丁▁▁▁", "▁▁丁"))
    assert made.appended == ["丁", "丁▁", "[PAD]"]
    assert made.left_out == 2
    assert (
        differing(
            SentencePieceEncoder(made.model).files(),
            SentencePieceEncoder(made.model),
            ["丁    丁", "丁   丁", "  丁  丁"],
        )
        == 0
    )


def test_with_zero_scores_nothing_is_completed_and_what_is_missed_is_counted(llama_tokenizer):
    stray = with_pieces(llama_tokenizer, "龘", "龘龘龘龘")
    assert unreachable(extension_of(llama_tokenizer, stray, scores="zero", pieces="all")) == 1
    made = extension_of(llama_tokenizer, stray)
    assert made.appended == ["龘", "龘龘龘龘", "龘龘", "龘龘龘", "[PAD]"]
    assert made.completing == ["龘龘", "龘龘龘"]


def test_with_all_pieces_a_character_without_a_piece_gets_one(llama_tokenizer):
    made = extension_of(llama_tokenizer, with_pieces(llama_tokenizer, "☆好☆"), pieces="all", pad=False)
    assert made.appended == ["☆好☆", "☆", "好", "好☆"]
    assert (
        differing(SentencePieceEncoder(made.model).files(), SentencePieceEncoder(made.model), ["☆好☆好", "a☆好☆"]) == 0
    )


def test_with_distinct_scores_the_fast_tokenizer_differs_on_no_line(
    llama_tokenizer, tying_tokenizer, chinese_text, english_text
):
    made = extension_of(llama_tokenizer, tying_tokenizer)
    lines = probe(made.appended, seed=5) + chinese_text + english_text
    assert differing(SentencePieceEncoder(made.model).files(), SentencePieceEncoder(made.model), lines) == 0


def test_with_zero_scores_the_differing_lines_are_counted(llama_tokenizer, tying_tokenizer):
    made = extension_of(llama_tokenizer, tying_tokenizer, scores="zero")
    lines = probe(made.appended, seed=5)
    assert differing(SentencePieceEncoder(made.model).files(), SentencePieceEncoder(made.model), lines) > 0


def test_the_probe_holds_what_breaks_tokenizers(llama_tokenizer):
    text = "\n".join(probe([], seed=5))
    for trap in ("        ", "\t", "▁", "🤗", "𠮷", "　", "<0x0A>", "中文  之间", "trailing spaces  \n"):
        assert trap in text
    assert SentencePieceProcessor(model_proto=llama_tokenizer).encode(text)
