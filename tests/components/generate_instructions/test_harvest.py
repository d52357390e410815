"""Every rule has items that fall at it and neighbours that do not; an item falls at one rule, and is stripped."""

import json
from typing import Any

import pytest

from components.generate_instructions.catalogue import load_catalogue
from components.generate_instructions.dedup import Seen
from components.generate_instructions.harvest import CUT_OFF, RULES, UNNAMED, Harvest, judged, share_of

CATALOGUE = load_catalogue()


def rule_of(instruction: Any, output: Any, given: Any = "") -> str:
    return judged({"instruction": instruction, "input": given, "output": output}, CATALOGUE)[1]


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (CUT_OFF, "cut off"),
        ("一段文字", "unreadable"),
        (["写诗"], "unreadable"),
        ({"instruction": {"text": "写诗"}, "output": "好"}, "unreadable"),
        ({"instruction": "写诗", "output": ["好"]}, "unreadable"),
        ({"instruction": "写诗", "output": "半个\ud83d字"}, "unreadable"),
        ({"instruction": "写诗", "output": "丢了\ufffd字"}, "unreadable"),
        ({"question": "写诗", "answer": "好"}, "no instruction"),
        ({"instruction": "  ", "output": "好诗"}, "no instruction"),
        ({"instruction": "写诗"}, "no output"),
        ({"instruction": "写诗", "output": "\n"}, "no output"),
        ({"instruction": "写", "output": "好诗"}, "instruction length"),
        ({"instruction": "写诗" * 600, "output": "好诗"}, "instruction length"),
        ({"instruction": "写诗", "input": "字" * 2001, "output": "好诗"}, "input length"),
        ({"instruction": "写诗", "output": "字" * 4001}, "output length"),
    ],
)  # fmt: skip
def test_what_is_no_item_falls(value: Any, rule: str) -> None:
    assert judged(value, CATALOGUE)[1] == rule
    assert rule in RULES


@pytest.mark.parametrize(
    "output",
    [
        "抱歉，我无法回答这个问题。",
        "很抱歉，我不能提供医疗建议。",
        "对不起，我无法访问互联网。",
        "我无法完成这个任务。",
        "作为助手，我不能提供这类信息。",
        "I'm sorry, but I can't help with that.",
        "Sorry, I cannot answer this.",
        "I cannot assist with that request.",
    ],
)
def test_refusals_fall(output: str) -> None:
    assert rule_of("今天的天气怎么样？请用中文回答我", output) == "refusal"


@pytest.mark.parametrize(
    ("instruction", "output"),
    [
        ("替我写一封道歉的短信", "很抱歉，我明天不能参加会议，请见谅。"),
        ("把“我不能去”换一种说法", "我去不了。"),
        ("翻译成英文：对不起，我迟到了，路上堵车", "I'm sorry I'm late; there was a traffic jam."),
        ("写出“无能为力”的意思", "无法帮上忙，没有办法。"),
    ],
)
def test_apologies_and_inabilities_in_texts_stay(instruction: str, output: str) -> None:
    assert rule_of(instruction, output) == ""


@pytest.mark.parametrize(
    ("instruction", "output"),
    [
        ("介绍一下你的感受", "作为一个人工智能助手，我没有感受。"),
        ("介绍一下你的感受", "作为AI语言模型，我没有感受。"),
        ("介绍一下你的感受", "我是一个AI，没有感受。"),
        ("你是谁开发的？", "我是由OpenAI开发的。"),
        ("你是谁？请介绍", "我是ChatGPT，很高兴见到你。"),
        ("介绍一下今天的新闻", "我的训练数据截止到去年。"),
        ("用英文介绍你的感受，中文也行", "As an AI language model, I have none. 没有感受，谢谢你的关心。"),
        ("作为一个AI，你怎么看？", "我看很好，没有问题。"),
    ],
)
def test_what_speaks_as_a_model_falls(instruction: str, output: str) -> None:
    assert rule_of(instruction, output) == "speaks as a model"


@pytest.mark.parametrize(
    ("instruction", "output"),
    [
        ("人工智能有哪些应用？", "人工智能用于翻译、语音识别和自动驾驶。"),
        ("给AI工程师写一份简历开头", "作为AI工程师，我熟悉机器学习与数据处理。"),
        ("语言模型是什么？", "语言模型估计一段文字出现的概率。"),
    ],
)
def test_what_speaks_about_models_stays(instruction: str, output: str) -> None:
    assert rule_of(instruction, output) == ""


@pytest.mark.parametrize(
    ("instruction", "output", "rule"),
    [
        ("What is the capital of France?", "Paris is the capital of France.", "language"),
        ("Привет, как дела?", "Хорошо, спасибо.", "language"),
        ("日本の首都はどこですか", "とうきょうです", "language"),
        ("把下面的句子翻译成英文：今天天气很好", "The weather is fine today.", ""),
        ("用 Python 打印一句话", 'print("hello")', ""),
        ("12 + 30 = ?", "42", ""),
    ],
)
def test_the_language_is_counted_by_character_and_by_word(instruction: str, output: str, rule: str) -> None:
    assert rule_of(instruction, output) == rule


def test_shares_are_of_characters_and_words() -> None:
    assert share_of("han", "今天 hello world, it's 2 o'clock") == 2 / 6
    assert share_of("latin", "今天 hello") == 1 / 3
    assert share_of("any", "hello") == share_of("han", "…42!") == 1.0


@pytest.mark.parametrize("said", ["无", "（无）", "N/A", "None", "<noinput>", "无输入。", None, " "])
def test_an_input_that_says_that_there_is_none_is_empty(said: Any) -> None:
    item, rule = judged({"instruction": " 写诗。\n", "input": said, "output": " 好诗 "}, CATALOGUE)
    assert item == {"instruction": "写诗。", "input": "", "output": "好诗"}
    assert rule == ""


def test_the_harvest_counts_each_item_once_and_stops_when_it_is_full() -> None:
    harvest = Harvest(CATALOGUE, Seen(), 3)
    items = [
        {"topic": 2, "task_type": 1, "instruction": "写一首关于春天的短诗", "input": "", "output": "春天来了。"},
        {"topic": 9, "instruction": "写一首关于春天的短诗。", "input": "", "output": "花开了。"},
        {"topic": 1, "instruction": "写一首关于春天的小短诗", "input": "", "output": "花开了。"},
        {"topic": 9, "task_type": "x", "instruction": "列出三种水果的名字", "input": "", "output": "苹果、梨、桃。"},
        {"topic": 1, "instruction": "早上好", "input": "", "output": ""},
        {
            "topic": 1,
            "task_type": 1,
            "instruction": "今天是星期几的英文怎么说",
            "input": "星期三",
            "output": "Wednesday",
        },
        {"topic": 1, "instruction": "再来一条完全不同的指令", "input": "", "output": "好的。"},
    ]
    assert harvest.take_text(json.dumps(items, ensure_ascii=False), ("春", "夏"), ("诗",)) == 3
    assert harvest.full
    assert [item["instruction"][:4] for item in harvest.items] == ["写一首关", "列出三种", "今天是星"]
    assert {rule: count for rule, count in harvest.fallen.items() if count} == {
        "no output": 1, "exact duplicate": 1, "near duplicate": 1,
    }  # fmt: skip
    assert harvest.topics == {"夏": 1, UNNAMED: 1, "春": 1}
    assert harvest.task_types == {"诗": 2, UNNAMED: 1}
    assert "小短诗" in harvest.samples["near duplicate"][0]
