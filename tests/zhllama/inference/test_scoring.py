"""Scores of text against the plain way: one document, one full matrix of logits at a time."""

import dataclasses
import math
from typing import Any

import pytest

from tests.loaded_model import plain_log_probs
from zhllama.inference import scoring
from zhllama.inference.load import LoadedModel


def test_bits_per_byte_is_the_plain_log_loss_over_bytes(loaded: LoadedModel, chinese_text: list[str]) -> None:
    texts = [*chinese_text[:20], "a", "多" * 7]
    losses = [
        -plain_log_probs(loaded, [loaded.encoder.bos], loaded.encoder.encode(text)).sum().item() for text in texts
    ]
    score = scoring.score_text(loaded, texts, "text")
    assert score["bits_per_byte"] == pytest.approx(sum(losses) / math.log(2) / len("".join(texts).encode()), rel=1e-5)
    tokens = sum(len(loaded.encoder.encode(text)) for text in texts)
    assert score["tokens_per_character"] == tokens / len("".join(texts))


def test_a_long_document_is_scored_in_windows_every_id_once(loaded: LoadedModel, english_text: list[str]) -> None:
    text = " ".join(english_text[:12])
    narrow = dataclasses.replace(loaded, positions=32)
    ids = loaded.encoder.encode(text)
    assert len(ids) > 100
    loss = sum(
        -plain_log_probs(loaded, [loaded.encoder.bos], ids[start : start + 31]).sum().item()
        for start in range(0, len(ids), 31)
    )
    score = scoring.score_text(narrow, [text], "text")
    assert score["tokens_per_character"] == len(ids) / len(text)
    assert score["bits_per_byte"] == pytest.approx(loss / math.log(2) / len(text.encode()), rel=1e-5)


def test_a_model_that_says_nothing_costs_the_logarithm_of_its_pieces(loaded: LoadedModel) -> None:
    import copy

    silent = copy.deepcopy(loaded.model)
    silent.get_output_embeddings().weight.data.zero_()
    score = scoring.score_text(dataclasses.replace(loaded, model=silent), ["汉字"], "text")
    tokens = len(loaded.encoder.encode("汉字"))
    assert score["bits_per_byte"] == pytest.approx(tokens * math.log2(loaded.encoder.size) / 6)


def test_bytes_that_a_tokenizer_cannot_spell_cost_eight_bits_each(without_bytes: LoadedModel, caplog: Any) -> None:
    encoder = without_bytes.encoder
    text = "the 汉字 book"
    loss = -plain_log_probs(without_bytes, [encoder.bos], encoder.encode(text)).sum().item() / math.log(2)
    score = scoring.score_text(without_bytes, [text], "text")
    assert score["bits_per_byte"] == pytest.approx((loss + 8 * 6) / len(text.encode()), rel=1e-5)
    assert "cannot spell 6 of 15 bytes" in caplog.text
    assert encoder.unknown_bytes([text, "the", ""]) == [6, 0, 0]
    # as many tokens as bytes: the unknown piece is no one
    tokens = len(encoder.encode(text)) - 1 + 6
    assert score["tokens_per_character"] == tokens / len(text)
    assert math.log2(score["perplexity"]) == pytest.approx((loss + 8 * 6) / tokens, rel=1e-5)


def test_an_unknown_piece_is_never_foretold(without_bytes: LoadedModel) -> None:
    import copy

    # of equal logits the first piece counts as the likeliest, and that is <unk>
    silent = copy.deepcopy(without_bytes.model)
    silent.get_output_embeddings().weight.data.zero_()
    guess = dataclasses.replace(without_bytes, model=silent)
    assert without_bytes.encoder.unknown == 0
    assert scoring.score_text(guess, ["汉字"], "text")["next_token_accuracy"] == 0


def test_rows_that_only_pad_the_embedding_take_no_part(loaded: LoadedModel, chinese_text: list[str]) -> None:
    import copy

    padded = copy.deepcopy(loaded.model)
    padded.resize_token_embeddings(loaded.encoder.size + 64, mean_resizing=False)
    padded.get_output_embeddings().weight.data[loaded.encoder.size :] = 9.0
    score = scoring.score_text(dataclasses.replace(loaded, model=padded), chinese_text[:5], "text")
    assert score == scoring.score_text(loaded, chinese_text[:5], "text")
