"""Every form of a conversation is the same item, and what is none is refused by name, with its place."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zhllama.artifacts.open import open_artifact
from zhllama.data import conversations
from zhllama.data.conversations import item_of, messages_of, texts_of
from zhllama.data.corpus import Skipped
from zhllama.data.instructions import read_instructions
from zhllama.errors import InputError

ITEM = {"instruction": "再来一个", "input": "", "output": "好", "system": "短", "history": [["写诗", "春风"]]}
SAID = [("system", "短"), ("user", "写诗"), ("assistant", "春风"), ("user", "再来一个"), ("assistant", "好")]
SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt"}
MESSAGES: list[Any] = [{"role": role, "content": text} for role, text in SAID]
TURNS = [{"from": SHAREGPT[role], "value": text} for role, text in SAID]
PARTS = [
    {"role": role, "content": [{"type": "text", "text": text[:1]}, {"type": "text", "text": text[1:]}]}
    for role, text in SAID
]
FORMS = {
    "OpenAI's": {"messages": MESSAGES},
    "OpenAI's, in parts": {"messages": PARTS},
    "OpenAI's, a developer's": {"messages": [{"role": "developer", "content": "短"}, *MESSAGES[1:]]},
    "ShareGPT's": {"conversations": TURNS, "id": 5},
    "ShareGPT's, more in a turn": {
        "conversations": [{**turn, "weight": 1, "tool_calls": None, "id": 0} for turn in TURNS]
    },
    "ShareGPT's, system beside": {"conversations": TURNS[1:], "system": "短", "tools": ""},
    "Alpaca's": ITEM,
    "both": {"instruction": "x", "output": "y", "messages": MESSAGES},
}


def items_in(folder, *records: Any, skipped: Skipped | None = None, **more: Any) -> list[Any]:
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    return list(read_instructions(open_artifact(str(folder)), skipped=skipped, **more))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_item(tmp_path, form):
    assert items_in(tmp_path, FORMS[form]) == [ITEM]
    assert messages_of(ITEM) == MESSAGES[:-1]
    assert list(texts_of(ITEM)) == ["短", "写诗", "春风", "再来一个", "", "好"]


@pytest.mark.parametrize("content", ["[{}]", "{}", "{}\n{}\n"], ids=["list", "one line", "lines"])
def test_a_json_file_may_hold_them_too(tmp_path, content):
    (tmp_path / "a.json").write_text(content.replace("{}", json.dumps({"messages": MESSAGES})))
    assert set(map(str, read_instructions(open_artifact(str(tmp_path))))) == {str(ITEM)}


def test_nothing_beside_an_item_is_nothing(tmp_path):
    plain = {"instruction": "写诗", "input": "", "output": "春风"}
    assert items_in(tmp_path, {**plain, "system": "", "history": [], "images": None, "tools": "[]"}) == [plain]
    assert items_in(tmp_path, {**plain, "system": None, "history": None}) == [plain]


def test_a_question_may_wait_for_its_answer_where_it_is_to_be_asked(tmp_path):
    (item,) = items_in(tmp_path, {"messages": MESSAGES[:-1]}, answered=False)
    assert item == {**ITEM, "output": ""}


def turn(role: str, content: Any = "好", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ASKED, ANSWERED = turn("user"), turn("assistant")
IMAGE = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "x"}}]
REFUSED: dict[str, tuple[Any, str]] = {
    "an unknown role": ([turn("judge"), ANSWERED], "turn 1 has the role 'judge'; system, user and assistant are known"),
    "no role": ([{"content": "x"}, ANSWERED], "turn 1 has no role"),
    "a role that is no text": ([turn([1]), ANSWERED], r"turn 1 has the role \[1\]"),
    "no object": (["x", ANSWERED], "turn 1 is a str where an object with role and content is needed"),
    "an empty turn": ([ASKED, turn("assistant", " \n")], "turn 2 is empty"),
    "an empty system text": ([turn("system", ""), ASKED, ANSWERED], "turn 1 is empty"),
    "no content": ([{"role": "user"}, ANSWERED], "turn 1 has nothing where text is needed"),
    "a number": ([turn("user", 5), ANSWERED], "turn 1 has a int where text is needed"),
    "two questions in a row": ([ASKED, ASKED, ANSWERED], "turn 2 is the user's, as the one before it"),
    "two answers in a row": ([ASKED, ANSWERED, ANSWERED], "turn 3 is the assistant's, as the one before it"),
    "an answer first": ([ANSWERED, ASKED, ANSWERED], "it begins with an answer"),
    "an answer behind the system text": ([turn("system"), ANSWERED], "it begins with an answer"),
    "no answer": ([ASKED], "a conversation without an answer; add the assistant's turn"),
    "a question last": ([ASKED, ANSWERED, ASKED], "its last question has no answer"),
    "nothing": ([], "a conversation without a question"),
    "a system text alone": ([turn("system")], "a conversation without a question"),
    "a system text in the middle": (
        [ASKED, ANSWERED, turn("system"), ASKED, ANSWERED],
        "turn 3 is a second system text",
    ),
    "two system texts": ([turn("system"), turn("system"), ASKED, ANSWERED], "turn 2 is a second system text"),
    "a tool's turn": ([ASKED, turn("tool"), ANSWERED], r"turn 2 is a tool's \('tool'\), and tool calls are not taught"),
    "ShareGPT's tool": ([ASKED, {"from": "observation", "value": "x"}], "turn 2 is a tool's"),
    "a tool call": ([ASKED, turn("assistant", None, tool_calls=[{"id": 1}])], "turn 2 has 'tool_calls': tool calls"),
    "a function call": ([ASKED, turn("assistant", "x", function_call={"name": "f"})], "turn 2 has 'function_call'"),
    "an image": ([turn("user", IMAGE), ANSWERED], r"turn 1 has a part that is no text \('image_url'\)"),
    "an image beside": ([turn("user", images=["x.png"]), ANSWERED], "turn 1 has 'images': what is no text"),
    "reasoning beside": (
        [ASKED, turn("assistant", reasoning_content="嗯")],
        "turn 2 has 'reasoning_content': reasoning",
    ),
    "an unlearned answer": ([ASKED, turn("assistant", weight=0)], "turn 2 is an answer that is not to be learned"),
    "axolotl's": ([ASKED, turn("assistant", train=False)], "turn 2 is an answer that is not to be learned"),
}
PLAIN = {"instruction": "写诗", "output": "春风"}
REFUSED_ITEMS: dict[str, tuple[Any, str]] = {
    "a history of texts": ({**PLAIN, "history": ["x"]}, r"field 'history' is no list of \[instruction, answer\] pairs"),
    "a history that is text": ({**PLAIN, "history": "x"}, "field 'history' is no list"),
    "an empty text in a history": ({**PLAIN, "history": [["x", "y"], ["x", ""]]}, "pair 2 of its history is empty"),
    "a number in a history": ({**PLAIN, "history": [["x", 5]]}, "pair 1 of its history has a int where text is needed"),
    "a system text that is none": ({**PLAIN, "system": ["x"]}, "field 'system' has a list where text is needed"),
    "tools beside": ({**PLAIN, "tools": [{"name": "f"}]}, "it has 'tools': tool calls cannot be taught here"),
    "an image of the item's": ({**PLAIN, "image": "x.png"}, "it has 'image': what is no text cannot be taught here"),
    "system twice": ({"messages": [turn("system"), ASKED, ANSWERED], "system": "x"}, "turn 1 is a second system text"),
}
EVERY = {name: ({"messages": turns}, why) for name, (turns, why) in REFUSED.items()} | REFUSED_ITEMS


@pytest.mark.parametrize("name", EVERY)
def test_what_cannot_be_taught_is_refused_by_name_and_left_out_on_request(tmp_path, name):
    record, why = EVERY[name]
    with pytest.raises(InputError, match=rf"a\.jsonl: line 2: {why}.*(mend|leave|take|let|remove|answer)"):
        items_in(tmp_path, PLAIN, record)
    skipped = Skipped()
    assert items_in(tmp_path, PLAIN, record, ITEM, skipped=skipped) == [{**PLAIN, "input": ""}, ITEM]
    assert skipped.count == 1
    assert "line 2" in skipped.first[0]


def test_a_conversation_has_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(conversations, "MOST_TURNS", 4)
    with pytest.raises(InputError, match="line 1: a conversation of 6 turns; 4 are read at most: cut it"):
        items_in(tmp_path, {"messages": [ASKED, ANSWERED] * 3})
    with pytest.raises(InputError, match="line 1: a conversation of 5 turns"):
        items_in(tmp_path, {**PLAIN, "history": [["x", "y"]] * 2})


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(str.strip)
_JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from"]) | texts, inner, max_size=3)
    ),
    max_leaves=6,
)
_FIELDS = ("messages", "conversations", "instruction", "output", "input", "system", "history", "tools")


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=5), st.none() | texts)
def test_any_conversation_comes_back_as_it_was_said(pairs, system):
    said = [one for asked, answered in pairs for one in (turn("user", asked), turn("assistant", answered))]
    whole = [turn("system", system), *said] if system else said
    item = item_of({"messages": whole})
    assert [*messages_of(item), turn("assistant", item["output"])] == whole
    assert item_of(item) == item
    assert item_of(json.loads(json.dumps(item))) == item


@given(st.dictionaries(st.sampled_from(_FIELDS), _JSON), st.booleans())
def test_whatever_a_record_holds_it_is_an_item_or_refused(record, answered):
    try:
        item = item_of(record, answered)
    except InputError:
        return
    assert all(isinstance(text, str) for text in texts_of(item))
    assert item["instruction"].strip()
    assert item["output"].strip() or not answered
