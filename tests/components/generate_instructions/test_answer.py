"""Items are found however a model wraps them, and what is no item is counted, never kept."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.generate_instructions.answer import items_in

ITEMS = [
    {"instruction": "写一句话。", "input": "", "output": "今天{天气}好。"},
    {"instruction": "翻译。", "input": 'say "hi"', "output": "说“你好”"},
]
LIST = json.dumps(ITEMS, ensure_ascii=False)


@pytest.mark.parametrize(
    "text",
    [
        LIST,
        f"好的，以下是数据：\n```json\n{LIST}\n```\n希望有帮助！",
        "\n".join(json.dumps(item, ensure_ascii=False) for item in ITEMS),
        json.dumps({"items": ITEMS}, ensure_ascii=False),
        json.dumps({"data": ITEMS[:1], "more": ITEMS[1:]}),
        LIST.replace("}, {", "},\n\n{")[:-1] + ", ]",
        "{ 说明：下面是 } " + LIST,
    ],
    ids=["list", "fence", "lines", "wrapped", "two lists", "trailing comma", "stray braces"],
)
def test_items_are_found_in_what_models_write(text: str) -> None:
    assert items_in(text) == (ITEMS, 0)


def test_a_cut_off_answer_gives_its_whole_items() -> None:
    for cut in range(len(LIST)):
        found, bad = items_in(LIST[:cut])
        assert bad == 0
        assert found == ITEMS[: len(found)]
    assert items_in(LIST[:-5])[0] == ITEMS[:1]


@pytest.mark.parametrize(
    "item",
    [
        {"instruction": "", "input": "", "output": "x"},
        {"instruction": "x", "input": ""},
        {"instruction": "x", "output": "  "},
        {"instruction": "x", "output": ["y"]},
        {"instruction": {"text": "x"}, "output": "y"},
        {"question": "x", "answer": "y"},
    ],
)
def test_what_is_no_item_is_counted(item: object) -> None:
    assert items_in(json.dumps([item, *ITEMS])) == (ITEMS, 1)


def test_a_missing_input_is_an_empty_one_and_white_space_goes() -> None:
    found, _ = items_in('{"instruction": " 写诗。\\n", "output": " 好 "}')
    assert found == [{"instruction": "写诗。", "input": "", "output": "好"}]


@given(st.text(st.sampled_from('{}[]":,\\ a好\n`'), max_size=60))
def test_rubbish_is_passed_over(text: str) -> None:
    found, bad = items_in(text)
    assert found == []
    assert bad >= 0


_words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).map(str.strip).filter(bool)


@given(st.lists(st.fixed_dictionaries({"instruction": _words, "input": st.just(""), "output": _words}), max_size=5))
def test_every_text_survives(items: list[dict[str, str]]) -> None:
    assert items_in(f"```json\n{json.dumps(items, ensure_ascii=False, indent=2)}\n```") == (items, 0)
