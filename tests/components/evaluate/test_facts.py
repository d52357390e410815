"""Questions with known answers: the set itself, what counts as right, and what is made of a model's answers."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.evaluate.answers import distinct, mostly_in, repetition, say
from components.evaluate.facts import TOKENS, Fact, figures_of, is_right, read_facts
from zhllama.tokenizer.chat import asked

LANGUAGES = ("en", "zh")
BY_LANGUAGE = {language: read_facts(language, 1000) for language in LANGUAGES}
ALL = [fact for facts in BY_LANGUAGE.values() for fact in facts]
by_question = pytest.mark.parametrize("language", LANGUAGES)


@by_question
def test_there_are_200_of_each_language_and_each_asks_something_else(language: str) -> None:
    facts = BY_LANGUAGE[language]
    assert len(facts) == 200
    assert len({fact.question for fact in facts}) == 200
    assert all(fact.question.endswith("?" if language == "en" else "？") for fact in facts)


@by_question
def test_the_answers_are_many_so_that_one_word_to_everything_is_wrong(language: str) -> None:
    commonest = Counter(fact.answer for fact in BY_LANGUAGE[language]).most_common(1)
    assert commonest[0][1] <= 8


def test_every_question_has_three_wrong_answers_that_are_not_the_right_one() -> None:
    for fact in ALL:
        right = (fact.answer, *fact.also)
        assert len(set(fact.wrong)) == 3, fact
        assert all(is_right(fact, one) for one in right), fact
        assert not any(is_right(fact, one) for one in fact.wrong), fact
        # of a like length
        assert max(map(len, fact.wrong)) <= 3 * len(fact.answer) + 4, fact


def test_who_repeats_the_question_has_not_answered_it() -> None:
    for fact in ALL:
        assert not is_right(fact, fact.question), fact
        # nor is a wrong answer in it, which would stand before the right one
        assert is_right(fact, f"{fact.question} {fact.answer}"), fact


PARIS = Fact("en", "What is the capital of France?", "Paris", ("London", "Rome", "Madrid"))
SEVEN = Fact("en", "What is 3 plus 4?", "7", ("6", "8", "9"), ("seven",))
WEEK = Fact("zh", "一周有几天？", "7", ("5", "6", "8"), ("七",))
BEIJING = Fact("zh", "中国的首都是哪座城市？", "北京", ("南京", "上海", "西安"))


@pytest.mark.parametrize(
    ("fact", "said", "right"),
    [
        (PARIS, "The capital of France is Paris.", True),
        (PARIS, "PARIS", True),
        (PARIS, "It is London, not Paris.", False),
        (PARIS, "Paris, and not London.", True),
        (PARIS, "The Parisian one.", False),
        (PARIS, "", False),
        (PARIS, "好评", False),
        (SEVEN, "3 + 4 = 7", True),
        (SEVEN, "Seven.", True),
        (SEVEN, "17", False),
        (SEVEN, "６, no: ７", False),
        (SEVEN, "７", True),
        (WEEK, "一周有七天。", True),
        (WEEK, "一周有7天。", True),
        (WEEK, "十七天", False),
        (WEEK, "七十天", False),
        (BEIJING, "中国的首都是北京。", True),
        (BEIJING, "是南京，不是北京。", False),
    ],
)
def test_right_is_who_names_the_answer_as_a_word_and_first(fact: Fact, said: str, right: bool) -> None:
    assert is_right(fact, said) is right


@given(st.sampled_from(ALL), st.text(alphabet=" .,:;!?。，：\n", max_size=8))
def test_signs_around_an_answer_do_not_matter(fact: Fact, signs: str) -> None:
    assert is_right(fact, f"{signs}{fact.answer}{signs}")


def test_a_part_of_them_is_of_every_kind_and_the_same_each_time() -> None:
    some = read_facts("en", 40)
    assert some == read_facts("en", 200)[:40]
    begun = {" ".join(fact.question.split()[:3]) for fact in some}
    assert {"What is the", "How many"} <= {*begun, *(" ".join(one.split()[:2]) for one in begun)}
    assert read_facts("zh", 0) == []


def test_figures_count_what_is_right_and_what_the_base_knew_and_is_kept() -> None:
    facts = [PARIS, SEVEN, PARIS._replace(question="Where is the Louvre?")]
    found = figures_of(facts, ["Paris", "8", "法国巴黎"], [True, True, False])
    assert found is not None
    assert (found["items"], found["right"], found["known"], found["kept"], found["kept_share"]) == (3, 1, 2, 1, 0.5)
    # of those whose answer is a word, one is in Latin letters
    assert found["in_language"] == 0.5
    assert found["distinct"] == 1
    alone = figures_of(facts, ["Paris"] * 3, None)
    assert alone is not None
    assert (alone["known"], alone["kept"], alone["kept_share"], alone["distinct"]) == (None, None, None, 1 / 3)
    nothing = figures_of(facts, ["Paris"] * 3, [False] * 3)
    assert nothing is not None
    assert (nothing["known"], nothing["kept_share"]) == (0, None)
    assert figures_of([], [], None) is None


# --- how a model answers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "share"),
    [
        (["a b c d e f g h"], 0),
        (["a b c d a b c d"], 1 / 5),
        (["the " * 100], 96 / 97),
        (["好" * 7], 3 / 4),
        (["我很好。我很好。我很好。"], 1 - 3 / 6),
        (["好评"], 0),
        ([""], 0),
        (["a b c d e", "x " * 7, None], (0 + 3 / 4) / 2),
        ([None], None),
        ([], None),
    ],
)
def test_repetition_is_the_share_of_runs_of_four_that_were_there(said: list[str | None], share: float | None) -> None:
    assert repetition(said) == (None if share is None else pytest.approx(share))


@given(st.lists(st.text(max_size=60), min_size=1, max_size=5))
def test_repetition_and_distinct_answers_are_shares(said: list[str]) -> None:
    assert 0 <= (repetition(said) or 0) < 1
    assert 0 < (distinct(said) or 0) <= 1


@pytest.mark.parametrize(
    ("language", "text", "holds"),
    [
        ("zh", "是北京。", True), ("zh", "Beijing", False), ("zh", "水的化学式是H2O。", True),
        ("zh", "ok，好", False), ("zh", "7", False),
        ("zh", "ペキン", False), ("en", "Paris.", True), ("en", "Café", True), ("en", "巴黎", False), ("en", "", False),
        ("en", "Москва", False),
    ],
)  # fmt: skip
def test_an_answer_is_in_a_language_where_most_letters_are(language: str, text: str, holds: bool) -> None:
    assert mostly_in(language, text) is holds


def test_answers_come_in_order_and_a_prompt_without_room_has_none(loaded) -> None:
    prompts = [loaded.chat.ids(asked(fact.question), trained=True) for fact in BY_LANGUAGE["en"][:3]]
    whole = [*prompts[:2], [5] * loaded.positions, prompts[2]]
    said = say(loaded, whole, TOKENS, "questions", at_once=2)
    assert said[2] is None
    # one by one they are the same
    assert [said[0], said[1], said[3]] == [say(loaded, [ids], TOKENS, "questions")[0] for ids in prompts]
