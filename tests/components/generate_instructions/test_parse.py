"""Items are found however a model wraps them, a cut-off one is never taken for a whole one, and nothing is fatal."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.generate_instructions.harvest import CUT_OFF, objects_in

ITEMS = [
    {"instruction": "写一句话。", "input": "", "output": "今天{天气}好。"},
    {"instruction": "翻译。", "input": 'say "hi"', "output": "说“你好”"},
]
LIST = json.dumps(ITEMS, ensure_ascii=False)
SINGLE = (
    "[{'instruction': '写一句话。', 'input': '', 'output': '今天{天气}好。'}, "
    "{'instruction': '翻译。', 'input': 'say \"hi\"', 'output': '说“你好”'}]"
)


@pytest.mark.parametrize(
    "text",
    [
        LIST,
        f"好的，以下是数据：\n```json\n{LIST}\n```\n希望有帮助！",
        "\n".join(json.dumps(item, ensure_ascii=False) for item in ITEMS),
        json.dumps({"items": ITEMS}, ensure_ascii=False),
        json.dumps({"count": 2, "items": ITEMS}, ensure_ascii=False),
        json.dumps({"data": ITEMS[:1], "more": ITEMS[1:]}),
        LIST.replace("}, {", "},\n\n{")[:-1] + ", ]",
        LIST.replace('"}', '",}'),
        "{ 说明：下面是 } " + LIST,
        SINGLE,
        f'{{"items": {SINGLE}}}',
    ],
    ids=[
        "list", "fence", "lines", "wrapped", "wrapped with more", "two lists", "trailing comma", "commas in objects",
        "stray braces", "single quotes", "single quotes wrapped",
    ],
)  # fmt: skip
def test_items_are_found_in_what_models_write(text: str) -> None:
    assert list(objects_in(text)) == ITEMS


def test_a_models_thoughts_are_no_items() -> None:
    draft = '{"instruction": "草稿", "output": "不要"}'
    assert list(objects_in(f"\n<think>先写 {draft} 再改</think>\n{LIST}")) == ITEMS
    assert list(objects_in(f"<think>先写 {draft} 再")) == [CUT_OFF]
    asked = {"instruction": "解释 <think> 标签", "output": "见 </think>。"}
    assert list(objects_in(json.dumps([asked], ensure_ascii=False))) == [asked]


@pytest.mark.parametrize(
    ("text", "item"),
    [
        (
            '{"instruction": "解释"守株待兔"的意思", "output": "等"}',
            {"instruction": '解释"守株待兔"的意思', "output": "等"},
        ),
        ('{"instruction": "写两行", "output": "一\n二"}', {"instruction": "写两行", "output": "一\n二"}),
        ("{'instruction': 'it's', 'output': '它'}", {"instruction": "it's", "output": "它"}),
        ('{instruction: "写", output: "好"}', {"instruction": "写", "output": "好"}),
    ],
    ids=["quotation inside", "line break inside", "apostrophe", "bare names"],
)
def test_what_is_nearly_json_is_mended(text: str, item: dict[str, str]) -> None:
    assert list(objects_in(f"[{text},]")) == [item]


@pytest.mark.parametrize("text", [LIST, json.dumps({"items": ITEMS}, ensure_ascii=False), SINGLE], ids=str)
def test_a_cut_off_answer_gives_its_whole_items_and_says_that_one_was_cut(text: str) -> None:
    for cut in range(len(text)):
        found = list(objects_in(text[:cut]))
        whole = [value for value in found if value is not CUT_OFF]
        assert whole == ITEMS[: len(whole)]
        assert CUT_OFF not in found[:-1]
    inside = text.index("翻译") + 1
    assert list(objects_in(text[:inside])) == [ITEMS[0], CUT_OFF]


@given(st.text(st.sampled_from('{}[]":,\\a好\n`'), max_size=60))
def test_rubbish_is_passed_over(text: str) -> None:
    assert all(value is CUT_OFF or isinstance(value, dict | list | str | int | float) for value in objects_in(text))


@pytest.mark.parametrize(
    "text",
    ["{" * 300_000, '{"a":' * 300_000, '{"a":' + "[" * 300_000, "{'a': " + "[" * 5_000 + "}", '{"a" ' * 100_000],
    ids=["braces", "objects", "lists", "lists mended", "broken objects"],
)
def test_a_hostile_answer_costs_neither_time_nor_a_crash(text: str) -> None:
    # a few seconds, where reading it again from every brace on would take hours
    assert len(list(objects_in(text))) <= 1


_words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
_items = st.fixed_dictionaries({"instruction": _words, "input": st.just(""), "output": _words})


@given(st.lists(_items, max_size=5), st.sampled_from([None, 2]), st.booleans())
def test_every_text_survives(items: list[dict[str, str]], indent: Any, escaped: bool) -> None:
    text = json.dumps(items, ensure_ascii=escaped, indent=indent)
    assert list(objects_in(f"```json\n{text}\n```")) == items


DRAFT = '[{"instruction": "草稿", "output": "不是数据"}]'


@pytest.mark.parametrize(
    ("opening", "closing"),
    [
        ("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<thought>", "</thought>"),
        ("<seed:think>", "</seed:think>"), ("<antThinking>", "</antThinking>"), ("<scratchpad>", "</scratchpad>"),
        ('<think effort="high">', "</think >"), ("<|think|>", "<|/think|>"), ("<思考过程>", "</思考过程>"),
        ("[THINK]", "[/THINK]"), ("◁think▷", "◁/think▷"),
        ("<|begin_of_thought|>", "<|end_of_thought|>"), ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
        ("analysis我们", "assistantfinal"), ("Here is my thought process:", "Here is my response:"),
    ],
)  # fmt: skip
def test_what_stands_before_the_last_closing_marker_is_no_answer(opening: str, closing: str) -> None:
    thoughts = f"draft: {DRAFT} 再想 {{'instruction': '坏的' "
    for text in (f"{opening}{thoughts}{closing}{LIST}", f"{thoughts}{closing}\n{LIST}"):
        assert list(objects_in(text)) == ITEMS
    assert list(objects_in(f"{opening}{DRAFT}{closing}更好：{DRAFT}{closing}{LIST}")) == ITEMS
    assert list(objects_in(f"{opening}{thoughts}")) == [CUT_OFF]


def test_thoughts_that_open_after_items_and_never_end_leave_the_items() -> None:
    assert list(objects_in(f"{LIST}\n<think>还有 {DRAFT}")) == [*ITEMS, CUT_OFF]


def test_a_marker_that_an_item_quotes_closes_nothing() -> None:
    asked = [{"instruction": f"解释 {{x}} 和 </think> 第 {number} 次", "output": "<think>"} for number in range(9)]
    text = json.dumps(asked, ensure_ascii=False)
    assert list(objects_in(text)) == asked
    assert list(objects_in(f"draft {DRAFT}</think>{text}")) == asked
