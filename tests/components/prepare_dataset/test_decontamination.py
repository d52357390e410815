"""Near-duplicates and overlaps are found, what only looks alike is kept."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.prepare_dataset.decontamination import RUN, NearDuplicates, evaluation_texts, runs
from zhllama.artifacts.open import open_artifact
from zhllama.errors import InputError

LONG = "今天早上我们在图书馆借走了这本书，内容非常丰富，值得推荐给每一位同学和老师阅读，下个星期我还会再来。"


@pytest.mark.parametrize(
    ("second", "near"),
    [
        (LONG, True),
        (LONG.replace("图书馆", "博物馆"), True),
        (LONG + "！", True),
        (LONG.replace("，", "，  "), False),
        (LONG[:20], False),
        ("昨天晚上邻居在饭馆里谈起一台电脑，声音清楚，可是价格偏高，不值这个钱，以后再也不去那里了。", False),
    ],
    ids=["the same", "one word", "one sign", "white space in many places", "a part", "another"],
)
def test_what_is_nearly_the_same_is_found(second, near):
    index = NearDuplicates()
    assert not index.is_one(LONG)
    assert index.is_one(second) is near


def test_different_texts_are_no_duplicates_and_every_one_is_its_own(chinese_text):
    texts = list(dict.fromkeys("".join(chinese_text[at : at + 3]) for at in range(0, 600, 3)))
    index = NearDuplicates()
    assert sum(index.is_one(text) for text in texts) == 0
    assert all(index.is_one(text) for text in texts)


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        (f"开头{LONG[5:30]}结尾", True),
        (LONG[5:30].replace("，", " ！"), True),
        (LONG[: RUN - 1], False),
        (LONG[:6] + "改" + LONG[7:15] + "改", False),
        ("The quick brown fox jumps over the lazy dog and runs away from the farm", True),
        ("the QUICK, brown fox: jumps over the lazy dog and runs away -- from me", True),
        ("The quick brown fox jumps over the lazy cat and runs away from the farm", False),
        ("短句", True),
        ("短句子", False),
        ("", False),
        ("！！", False),
    ],
)
def test_thirteen_words_in_a_row_are_an_overlap(text, seen):
    evaluated = (LONG, "the quick brown fox jumps over the lazy dog and runs away from", "短句。", "")
    overlaps = {run for one in evaluated for run in runs(one)}
    assert overlaps.isdisjoint(runs(text)) is not seen


@settings(max_examples=100, deadline=None)
@given(
    words=st.lists(st.sampled_from("一二三四五六七八九十甲乙丙丁"), min_size=RUN, max_size=40),
    before=st.text("abc ，。", max_size=10),
    data=st.data(),
)
def test_any_run_of_an_evaluated_text_is_found_wherever_it_stands(words, before, data):
    start = data.draw(st.integers(0, len(words) - RUN))
    overlaps = set(runs("，".join(words)))
    assert not overlaps.isdisjoint(runs(before + " ".join(words[start : start + RUN]) + before))


ITEM = {"instruction": "判断", "input": "房间很干净", "output": "正面"}


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.json", json.dumps([ITEM, {"instruction": "问"}]), ["房间很干净\n正面", "问\n"]),
        ("a.jsonl", json.dumps(ITEM) + "\n", ["房间很干净\n正面"]),
        ("a.jsonl", '{"text": "一行"}\n', ["一行"]),
        ("a.txt", "一行\n两行\n", ["一行", "两行"]),
    ],
    ids=["list of items", "lines of items", "lines of text", "text"],
)
def test_an_evaluation_may_be_items_or_text(tmp_path, name, content, texts):
    (tmp_path / name).write_text(content)
    assert list(evaluation_texts(open_artifact(str(tmp_path)))) == texts


@pytest.mark.parametrize("beside", ["report.json", "card.json"])
@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [("a.txt", "一行\n", ["一行"]), ("a.jsonl", json.dumps(ITEM) + "\n", ["房间很干净\n正面"])],
    ids=["text", "lines of items"],
)
def test_what_lies_beside_an_evaluation_does_not_decide_what_it_is(tmp_path, beside, name, content, texts):
    (tmp_path / name).write_text(content)
    (tmp_path / beside).write_text("{}")
    assert list(evaluation_texts(open_artifact(str(tmp_path)))) == texts


def test_a_bad_evaluation_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text("{")
    with pytest.raises(InputError, match=r"a\.jsonl: line 1 is not JSON"):
        list(evaluation_texts(open_artifact(str(tmp_path))))
