"""What is scored does not depend on order, stays within its limits, and tells choices from answers."""

import pytest

from components.evaluate.held_out import chance, choose_items


def item(instruction: str, given: str, output: str) -> dict[str, str]:
    return {"instruction": instruction, "input": given, "output": output}


judged = [item("好还是坏？", f"第{index}句", "好" if index % 3 else "坏") for index in range(30)]
translated = [item("翻译。", f"word {index}", f"词{index}") for index in range(10)]
named = [item(f"写一首关于{topic}的诗。", "", topic) for topic in ("山", "水")]


def test_recurring_answers_are_choices_and_the_rest_are_not() -> None:
    found = choose_items([*judged, *translated, *named], 500)
    choice, free = found[:30], found[30:]
    assert {each.item["instruction"] for each in choice} == {"好还是坏？"}
    assert {each.choices for each in choice} == {("坏", "好")}
    assert len(free) == 12
    assert all(each.choices == (each.item["output"],) for each in free)
    assert all(each.choices[each.answer] == each.item["output"] for each in found)


@pytest.mark.parametrize("answers", [1, 9], ids=["one answer", "nine answers"])
def test_one_answer_or_many_are_not_multiple_choice(answers: int) -> None:
    items = [item("选一个。", str(index), f"答{index % answers}") for index in range(40)]
    assert all(len(each.choices) == 1 for each in choose_items(items, 500))


def test_duplicates_are_scored_once_and_limits_hold() -> None:
    found = choose_items([*judged, *judged, *translated], 10)
    assert [len(each.choices) for each in found] == [2] * 10 + [1] * 2
    assert len({each.item["input"] for each in found[:10]}) == 10


def test_chance_is_the_share_of_each_instructions_commonest_answer() -> None:
    other = [item("是吗？", str(index), "是" if index < 9 else "否") for index in range(10)]
    assert chance(choose_items([*judged, *other], 500)) == pytest.approx((20 + 9) / 40)
    assert chance(()) == 0
