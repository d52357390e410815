"""Scores against the plain way: one document, one choice, one full matrix of logits at a time."""

import dataclasses
import math
from typing import Any

import pytest

from components.evaluate import scoring
from components.evaluate.held_out import choose_items
from zhllama.inference.generate import answer
from zhllama.inference.load import LoadedModel
from zhllama.inference.sampling import Sampling
from zhllama.tokenizer.prompt import DEFAULT, PROMPTS, RECIPE, Prompt, question_of
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from zhllama.tokenizer.sentencepiece_model import parse_model


def plain_log_probs(loaded: LoadedModel, prompt: list[int], answer: list[int]) -> Any:
    """(answer,): natural log-probabilities, from transformers' own forward with all logits."""
    import torch

    with torch.inference_mode():
        logits = loaded.model(torch.tensor([prompt + answer])).logits[0].double()
    found = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return found.gather(1, torch.tensor(answer)[:, None])[:, 0]


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


@pytest.fixture
def without_bytes(loaded: LoadedModel) -> LoadedModel:
    """The model with its tokenizer bereft of byte fallback: Chinese is one unknown piece to it."""
    proto = parse_model(loaded.encoder.model)
    proto.trainer_spec.byte_fallback = False
    for piece in proto.pieces:
        piece.type = 1 if piece.type == 6 else piece.type
    return dataclasses.replace(loaded, encoder=SentencePieceEncoder(proto.SerializeToString()))


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
    items = choose_items([{"instruction": "q", "input": "", "output": "汉字"}], 500)
    assert scoring.score_items(guess, items, "items")["exact_match"] == 0


def test_an_answer_that_a_tokenizer_cannot_spell_wins_nothing_by_that(
    without_bytes: LoadedModel,
) -> None:
    items = choose_items([{"instruction": "q", "input": "", "output": "汉字汉字"}], 500)
    prompt = without_bytes.prompt_ids(RECIPE.wrap(question_of(items[0].item)))
    ids = [*without_bytes.encoder.encode("汉字汉字"), without_bytes.encoder.eos]
    bits = -plain_log_probs(without_bytes, prompt, ids).sum().item() / math.log(2)
    score = scoring.score_items(without_bytes, items, "items")
    assert score["answer_bits_per_byte"] == pytest.approx((bits + 8 * 12) / 12, rel=1e-5)


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_answers_are_scored_behind_the_prompt_that_the_model_was_taught(loaded: LoadedModel, prompt: Prompt) -> None:
    items = choose_items([{"instruction": "q", "input": "x</s>", "output": "The end"}], 500)
    asked = loaded.prompt_ids(prompt.wrap("q\nx</s>"))
    ids = loaded.encoder.encode("The end")
    if prompt is DEFAULT:
        ids = loaded.prompt_ids(prompt.wrap("q\nx</s>") + "The end")[len(asked) :]
    bits = -plain_log_probs(loaded, asked, [*ids, loaded.encoder.eos]).sum().item() / math.log(2)
    taught = dataclasses.replace(loaded, template=prompt.plain)
    score = scoring.score_items(taught, items, "items")
    assert score["answer_bits_per_byte"] == pytest.approx(bits / 7, rel=1e-5)


def test_rows_that_only_pad_the_embedding_take_no_part(loaded: LoadedModel, chinese_text: list[str]) -> None:
    import copy

    padded = copy.deepcopy(loaded.model)
    padded.resize_token_embeddings(loaded.encoder.size + 64, mean_resizing=False)
    padded.get_output_embeddings().weight.data[loaded.encoder.size :] = 9.0
    score = scoring.score_text(dataclasses.replace(loaded, model=padded), chinese_text[:5], "text")
    assert score == scoring.score_text(loaded, chinese_text[:5], "text")


def test_choices_behind_one_prompt_score_as_rows_of_their_own(
    loaded: LoadedModel, reviews: list[dict[str, str]]
) -> None:
    prompts = [loaded.prompt_ids(RECIPE.wrap(question_of(item))) for item in reviews[:6]]
    answers = [[*loaded.encoder.encode(text), loaded.encoder.eos] for text in ("好评", "差评，不推荐", "很")]
    scored = scoring._score_rows(loaded, [scoring._row(prompt, answers) for prompt in prompts])
    for prompt, (log_probs, _) in zip(prompts, scored):
        expected = [value for answer in answers for value in plain_log_probs(loaded, prompt, answer).tolist()]
        assert log_probs.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.xdist_group("a model that learnt the answers")
def test_exact_match_is_what_greedy_decoding_gives(judge: Any, reviews: list[dict[str, str]]) -> None:
    from tests.loaded_model import load_model

    learnt = load_model(str(judge))
    selection = choose_items([*reviews[:20], {"instruction": "别的。", "input": "", "output": "答案"}], 500)
    greedy = Sampling(do_sample=False, repetition_penalty=1.0, max_new_tokens=12)
    items = [each.item for each in selection]
    said = answer(learnt, [learnt.prompt_ids(RECIPE.wrap(question_of(item))) for item in items], greedy)
    expected = [ids == learnt.encoder.encode(item["output"]) for ids, item in zip(said, items)]
    assert any(expected)
    assert not all(expected)
    asked = [
        (learnt.prompt_ids(RECIPE.wrap(question_of(item))), learnt.encoder.encode(item["output"])) for item in items
    ]
    rows = [scoring._row(prompt, [[*ids, learnt.encoder.eos]]) for prompt, ids in asked]
    found = {index: bool(hits[0]) for index, _, hits in scoring._scored_rows(learnt, rows, "rows", "items")}
    assert [found[index] for index in range(len(items))] == expected
    scored = scoring.score_items(learnt, selection, "items")
    assert (scored["exact_match"], scored["exact_match_items"]) == (sum(expected) / len(items), len(items))


@pytest.mark.xdist_group("a model that learnt the answers")
def test_a_model_that_learnt_the_answers_has_them_right(
    loaded: LoadedModel, judge: Any, reviews: list[dict[str, str]]
) -> None:
    from tests.loaded_model import load_model

    selection = choose_items(reviews, 500)
    before = scoring.score_items(loaded, selection, "items")
    after = scoring.score_items(load_model(str(judge)), selection, "items")
    assert before["items"] == after["items"] == 60
    assert before["accuracy"] < 45 / 60
    assert after["accuracy"] >= 57 / 60
    assert after["answer_bits_per_byte"] < before["answer_bits_per_byte"] / 10


def test_items_that_do_not_fit_are_counted_not_scored(loaded: LoadedModel, reviews: list[dict[str, str]]) -> None:
    long = [{**item, "input": item["input"] * 40} for item in reviews[:5]]
    narrow = dataclasses.replace(loaded, positions=256)
    score = scoring.score_items(narrow, choose_items([*reviews, *long], 500), "items")
    assert score["too_long"] == 5
    assert score["items"] == score["exact_match_items"] == 60


def test_no_items_give_no_figures(loaded: LoadedModel) -> None:
    score = scoring.score_items(loaded, [], "items")
    assert score["items"] == score["exact_match_items"] == 0
    assert score["accuracy"] is score["exact_match"] is score["answer_bits_per_byte"] is None


def test_a_model_that_says_no_number_has_no_bits_per_byte(loaded: LoadedModel, reviews: list[dict[str, str]]) -> None:
    import copy

    broken = copy.deepcopy(loaded.model)
    broken.get_output_embeddings().weight.data.fill_(math.nan)
    score = scoring.score_items(dataclasses.replace(loaded, model=broken), choose_items(reviews, 8), "items")
    assert score["answer_bits_per_byte"] is None
