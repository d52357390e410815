"""What is scored does not depend on order, stays within its limits, and tells choices from answers."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.evaluate.held_out import chance, choose_items, choose_texts

texts = st.lists(st.text(min_size=1, max_size=30).filter(lambda text: text.isprintable()), max_size=40)


@pytest.mark.slow
@given(texts, st.integers(1, 400), st.randoms(use_true_random=False))
def test_the_same_texts_are_chosen_whatever_their_order(found: list[str], limit: int, order: random.Random) -> None:
    shuffled = list(found)
    order.shuffle(shuffled)
    assert choose_texts(found, limit) == choose_texts(shuffled, limit)


@given(texts, st.integers(1, 400))
def test_chosen_texts_fill_the_limit_and_never_pass_it(found: list[str], limit: int) -> None:
    chosen = choose_texts(found, limit)
    size = sum(len(text.encode()) for text in chosen)
    available = sum(len(text.encode()) for text in set(found))
    # a cut may leave up to three bytes of a character unused
    assert min(limit, available) - 3 <= size <= limit


def test_a_text_longer_than_the_limit_is_cut_between_characters() -> None:
    assert choose_texts(["汉字" * 50], 10) == ["汉字汉"]


def item(instruction: str, given: str, output: str) -> dict[str, str]:
    return {"instruction": instruction, "input": given, "output": output}


judged = [item("好还是坏？", f"第{index}句", "好" if index % 3 else "坏") for index in range(30)]
translated = [item("翻译。", f"word {index}", f"词{index}") for index in range(10)]
named = [item(f"写一首关于{topic}的诗。", "", topic) for topic in ("山", "水")]


def test_recurring_answers_are_choices_and_the_rest_are_not() -> None:
    selection = choose_items([*judged, *translated, *named], 500)
    assert {choice.item["instruction"] for choice in selection.choice} == {"好还是坏？"}
    assert len(selection.choice) == 30
    assert len(selection.free) == 12
    assert all(choice.choices[choice.answer] == choice.item["output"] for choice in selection.choice)


@pytest.mark.parametrize("answers", [1, 9], ids=["one answer", "nine answers"])
def test_one_answer_or_many_are_not_multiple_choice(answers: int) -> None:
    items = [item("选一个。", str(index), f"答{index % answers}") for index in range(40)]
    assert choose_items(items, 500).choice == ()


def test_duplicates_are_scored_once_and_limits_hold() -> None:
    selection = choose_items([*judged, *judged, *translated], 10)
    assert len(selection.choice) == 10
    assert len({choice.item["input"] for choice in selection.choice}) == 10
    assert len(selection.free) == 2


def test_chance_is_the_share_of_each_instructions_commonest_answer() -> None:
    other = [item("是吗？", str(index), "是" if index < 9 else "否") for index in range(10)]
    selection = choose_items([*judged, *other], 500)
    assert chance(selection.choice) == pytest.approx((20 + 9) / 40)
    assert chance(()) == 0
