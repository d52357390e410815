"""The index gives exactly what comparing with everything one by one gives, at any threshold's edge."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score import rouge_scorer, tokenizers

from components.generate_instructions.dedup import Seen, bit_set, question


class ByTheCharacter(tokenizers.Tokenizer):
    """Chinese for the rouge-score package, whose own tokenizer drops everything that is not a-z and 0-9."""

    def tokenize(self, text: str) -> list[str]:
        return [sign for sign in text if not sign.isspace()]


ROUGE = rouge_scorer.RougeScorer(["rougeL"], tokenizer=ByTheCharacter())


def lcs(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for one in a:
        before = 0
        for index, other in enumerate(b, start=1):
            before, row[index] = row[index], before + 1 if one == other else max(row[index], row[index - 1])
    return row[-1]


def plainly(texts: list[str], tokens: list[str]) -> list[str]:
    """What `Seen` is to say of each text, by definition."""
    kept: list[str] = []
    said = []
    for one in tokens:
        near = any(10 * 2 * lcs(one, other) > 7 * (len(one) + len(other)) for other in kept)
        said.append("exact" if one in kept else "near" if near else "")
        if not said[-1]:
            kept.append(one)
    return said


def indexed(texts: list[str]) -> tuple[list[str], list[str]]:
    seen, said = Seen(), []
    for text in texts:
        said.append(seen.duplicate_of(text))
        if not said[-1]:
            seen.add(text)
    return said, [seen.tokens(text) for text in texts]


_texts = st.lists(st.text("天地玄黄宇宙", min_size=1, max_size=40), max_size=14)


@given(_texts)
def test_no_duplicate_is_missed_and_none_is_invented(texts: list[str]) -> None:
    said, tokens = indexed(texts)
    assert said == plainly(texts, tokens)


@given(st.text("天地玄黄宇宙洪荒", min_size=10, max_size=400), st.data())
def test_edited_texts_of_every_length_are_judged_right(text: str, data: st.DataObject) -> None:
    edited = list(text)
    for _ in range(data.draw(st.integers(0, len(text)))):
        at = data.draw(st.integers(0, max(0, len(edited) - 1)))
        edited[at : at + data.draw(st.integers(0, 2))] = data.draw(st.text("日月盈昃", max_size=2))
    said, tokens = indexed([text, "".join(edited) or "空"])
    assert said == plainly([], tokens)


@given(st.text("天地玄黄", max_size=60), st.text("天地玄黄宇", max_size=60), st.sampled_from([128, 512]))
def test_bits_that_differ_are_a_lower_bound_of_the_distance(a: str, b: str, bits: int) -> None:
    differing = int(np.bitwise_count(bit_set(a, bits) ^ bit_set(b, bits)).sum())
    assert differing <= len(a) + len(b) - 2 * lcs(a, b)


@pytest.mark.parametrize(
    ("a", "b"), [("天地玄黄宇宙洪荒日月", "天地玄黄宇宙洪盈昃辰"), ("天地玄黄宇宙洪荒日月", "天地玄黄宇宙洪荒昃辰")]
)
def test_the_rule_is_rouge_scores_own(a: str, b: str) -> None:
    score = ROUGE.score(a, b)["rougeL"].fmeasure
    seen = Seen()
    seen.add(a)
    assert bool(seen.duplicate_of(b)) == (score > 0.7)
    assert score == pytest.approx(0.7) or score == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ("写一首诗！", "写一首诗。", "exact"),
        ("ＡＢＣ是什么", "abc 是什么？", "exact"),
        ("翻译：the cat sat on the mat", "翻译：the cat sat on a mat", "near"),
        ("介绍 Python", "介绍 Java", ""),
        ("？？？", "！！！", ""),
        ("？？？", "？？？", "exact"),
        ("한국어로 번역하세요", "한국어로 번역하시오", "near"),
    ],
)
def test_marks_widths_and_case_do_not_count_and_words_count_as_one(a: str, b: str, said: str) -> None:
    seen = Seen()
    seen.add(a)
    assert seen.duplicate_of(b) == said


def test_instruction_and_input_count_together() -> None:
    item = {"instruction": "把句子翻译成英文", "output": ""}
    seen = Seen()
    seen.add(question({**item, "input": "今天早上我在图书馆看到了一本很有意思的书"}))
    assert seen.duplicate_of(question({**item, "input": "火车站附近新开的饭馆价格偏高味道也一般"})) == ""
    assert seen.duplicate_of(question({**item, "input": "今天早上我在图书馆看到了一本很有趣的书"})) == "near"
    assert seen.duplicate_of(question({**item, "input": ""})) == ""
