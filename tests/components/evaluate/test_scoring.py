"""Scores against the plain way: one document, one choice, one full matrix of logits at a time."""

import dataclasses
import math
from typing import Any

import pytest

from components.evaluate import scoring
from components.evaluate.held_out import choose_items
from tests.loaded_model import plain_log_probs
from zhllama.data.conversations import Item, messages_of
from zhllama.errors import InputError
from zhllama.inference.generate import answer
from zhllama.inference.load import LoadedModel
from zhllama.inference.sampling import Sampling
from zhllama.tokenizer.prompt import DEFAULT, PROMPTS, RECIPE, Prompt, question_of


def test_an_unknown_piece_is_no_answer(without_bytes: LoadedModel) -> None:
    import copy

    # of equal logits the first piece counts as the likeliest, and that is <unk>
    silent = copy.deepcopy(without_bytes.model)
    silent.get_output_embeddings().weight.data.zero_()
    guess = dataclasses.replace(without_bytes, model=silent)
    assert without_bytes.encoder.unknown == 0
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


def test_the_answer_of_a_conversation_is_scored_behind_all_that_was_said(loaded: LoadedModel) -> None:
    turns = {"system": "be short", "history": [["q", "a1"]]}
    items = choose_items([Item(instruction="r", input="", output="The end", **turns)], 500)
    taught = dataclasses.replace(loaded, template=DEFAULT.template)
    asked = taught.chat.ids(messages_of(items[0].item), trained=True)
    assert asked == [
        *loaded.prompt_ids(DEFAULT.wrap("be short\nq") + "a1"), loaded.encoder.eos,
        *loaded.encoder.encode(DEFAULT.wrap("r")),
    ]  # fmt: skip
    _, (said,) = taught.chat.answered("r", ["The end"])
    bits = -plain_log_probs(loaded, asked, said).sum().item() / math.log(2)
    score = scoring.score_items(taught, items, "items")
    assert score["answer_bits_per_byte"] == pytest.approx(bits / 7, rel=1e-5)


def test_an_item_that_the_models_template_refuses_is_named(loaded: LoadedModel) -> None:
    items = choose_items([Item(instruction="r", input="", output="x", system="y")], 500)
    items[0].item.place = "held-out.json: item 1"
    refuses = dataclasses.replace(loaded, template="{{ raise_exception('no system') if messages[0].role == 'system' }}")
    with pytest.raises(InputError, match=r"held-out.json: item 1: the model's chat template refuses .*no system; eval"):
        scoring.score_items(refuses, items, "items")


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
