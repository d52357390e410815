"""The gate's grammar, what it refuses before anything is measured, and what it says of a figure that misses."""

import operator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zhllama.errors import InputError
from zhllama.stage.requirements import (
    SOURCES,
    canonical,
    check_requirements,
    judge,
    missed,
    parse_requirements,
)

EVERYTHING = ("text", "english", "instructions", "choices", "questions")
COMPARED = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
spaces = st.sampled_from(["", " ", "  "])
numbers = st.floats(0, 1e6, allow_nan=False)


def test_the_form_of_the_issue_is_read() -> None:
    first, second = parse_requirements("english_bits_per_byte<=1.03*base,accuracy>=0.85")
    assert first[1:] == ("bits_per_byte_en", False, "<=", 1.03, "base")
    assert second[1:] == ("accuracy", False, ">=", 0.85, "")


@given(st.sampled_from(sorted(SOURCES)), st.booleans(), st.sampled_from(sorted(COMPARED)), numbers,
       st.sampled_from(["", "base", "stage 1", "阶段"]), spaces)  # fmt: skip
def test_what_is_written_is_what_is_read(figure, optional, comparison, number, label, space) -> None:
    words = [figure, "?" * optional, comparison, repr(number), *(["*", label] if label else [])]
    (one,) = parse_requirements(space.join(words))
    assert one[1:] == (figure, optional, comparison, number, label)


@given(st.lists(st.sampled_from(sorted(SOURCES)), min_size=1, max_size=4))
def test_several_stand_behind_commas(figures: list[str]) -> None:
    text = ", ".join(f"{figure} < 1" for figure in figures)
    assert [one.figure for one in parse_requirements(text)] == figures


@given(st.text(alphabet="ab_<>=*?0123456789.,e- \t\u00b2\u0663√", max_size=20))
def test_any_text_is_read_or_refused_in_one_line_with_the_form(text: str) -> None:
    try:
        found = parse_requirements(text)
    except InputError:
        with pytest.raises(InputError, match=r"write figure<=number or figure<=number\*base"):
            parse_requirements(text)
    else:
        assert len(found) == (len(text.split(",")) if text.strip() else 0)


@pytest.mark.parametrize(
    "text",
    [
        "accuracy", "accuracy=0.8", "accuracy==0.8", "accuracy<=", "<=0.8", "accuracy<=-1", "accuracy<=1*",
        "1<=accuracy", "accuracy<=1e999", "accuracy<=nan", "accuracy<=85%", "accuracy<=0.8,", ",",
        "accuracy<=0.8;items>=3", "accuracy<=base*2", "accuracy<=0.8<=1",
        "accuracy??<=1", "accuracy<=2*base*base", "accuracy<=٣", "accuracy=>0.8",
    ],
)  # fmt: skip
def test_what_is_no_requirement_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="write figure<=number"):
        parse_requirements(text)


def test_readable_names_are_those_of_the_metrics() -> None:
    names = {
        "english_bits_per_byte": "bits_per_byte_en", "chinese_bits_per_byte": "bits_per_byte_zh",
        "chinese_tokens_per_character": "tokens_per_character", "tokens_per_character_zh": "tokens_per_character",
        "english_tokens_per_character": "tokens_per_character_en", "english_facts_kept": "facts_kept_en",
        "chinese_answer_language": "answer_language_zh", "accuracy": "accuracy",
        "english_test_0_shots": "english_test_0_shots",
    }  # fmt: skip
    assert {name: canonical(name) for name in names} == names


# --- before anything is measured --------------------------------------------------------------------------------------


def check(text: str, labels=("start", "stage 1", "adapted"), measured=EVERYTHING, **more) -> None:
    check_requirements(parse_requirements(text), labels, measured, **more)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bits_per_bite_en<1", r"no figure bits_per_bite_en \(did you mean bits_per_byte_en\?\)"),
        ("english_bits_per_bite<1", r"did you mean english_bits_per_byte\?"),
        ("bits_per_byte_en_baseline<1", "no figure bits_per_byte_en_baseline"),
        ("ceval_5_shots>0.3", "no figure ceval_5_shots"),
        ("accuracy<=1*stage1", r"no model stage1 \(did you mean stage 1\?\); there is base, start, stage 1"),
        ("accuracy?<=1*stage1", "no model stage1"),
        ("accuracy<=1*adapted", "adapted is the model itself"),
    ],
)
def test_unknown_figures_and_models_are_named_with_the_nearest(text: str, said: str) -> None:
    with pytest.raises(InputError, match=f"^--require {text.replace('*', '[*]').replace('?', '[?]')}: .*{said}"):
        check(text)


@pytest.mark.parametrize(
    ("text", "source", "mend"),
    [
        ("english_bits_per_byte<2", "english", "give --english"),
        ("tokens_per_character<2", "text", "give --text"),
        ("accuracy>0.5", "choices", "give --instructions"),
        ("exact_match>0.5", "instructions", "give --instructions"),
        ("facts_kept_en>0.9", "questions", "give --questions"),
    ],
)
def test_a_figure_that_will_not_be_measured_is_refused_by_name(text: str, source: str, mend: str) -> None:
    there = [one for one in EVERYTHING if one != source]
    name = text.partition("<")[0].partition(">")[0]
    with pytest.raises(InputError, match=f"{name} is not measured here; {mend}.*or write {name}[?] where"):
        check(text, measured=there)
    check(text, measured=EVERYTHING)
    check(text.replace(name, f"{name}?"), measured=there)


def test_without_a_baseline_there_is_no_base_and_nothing_was_kept() -> None:
    with pytest.raises(InputError, match="no model base; there is none: there is no --baseline"):
        check("accuracy>1*base", labels=("model",))
    with pytest.raises(InputError, match="facts_kept_en is not measured here; give a --baseline"):
        check("facts_kept_en>0.5", labels=("model",))
    check("accuracy?>1*base,facts_kept_en?>0.5", labels=("model",))


def test_base_is_the_first_baseline_whatever_it_is_called_and_no_other() -> None:
    check("accuracy>1*base")
    with pytest.raises(InputError, match="base is the first baseline, start, and another one is called so"):
        check("accuracy>1*base", labels=("start", "base", "model"))


def test_figures_of_exams_and_tasks_are_known_by_what_is_asked() -> None:
    check("law_5_shots>0.3", exams=["law_0_shots", "law_5_shots"])
    # exams that are not read yet
    check("law_5_shots>0.3", exams=[""])
    check("xnli_zh_acc>0.3", tasks=["xnli_zh"])
    with pytest.raises(InputError, match=r"no figure law_3_shots \(did you mean law_0_shots|law_5_shots"):
        check("law_3_shots>0.3", exams=["law_0_shots", "law_5_shots"])


# --- what holds -------------------------------------------------------------------------------------------------------


@given(st.sampled_from(sorted(COMPARED)), numbers, numbers, st.floats(0, 4))
def test_a_verdict_is_the_comparison_of_figure_and_bound(comparison, mine, theirs, factor) -> None:
    alone, against = judge(
        parse_requirements(f"accuracy{comparison}{factor!r},accuracy{comparison}{factor!r}*base"),
        ("start", "model"), [{"accuracy": theirs}, {"accuracy": mine}],
    )  # fmt: skip
    assert (alone["value"], alone["bound"], against["bound"]) == (mine, factor, factor * theirs)
    assert (alone["label"], against["label"]) == (None, "start")
    for one in (alone, against):
        assert one["holds"] is COMPARED[comparison](mine, one["bound"])
        said = missed([one])
        assert bool(said) is not one["holds"]
        assert "\n" not in said


def test_the_line_says_which_figure_missed_and_by_how_much() -> None:
    verdicts = judge(
        parse_requirements("english_bits_per_byte<=1.03*base,accuracy>=0.85,items>=10"),
        ("base", "adapted"),
        [{"bits_per_byte_en": 1.30}, {"bits_per_byte_en": 1.42, "accuracy": 0.8, "items": 60.0}],
    )
    assert missed(verdicts) == (
        "english_bits_per_byte<=1.03*base: it is 1.42, 0.081 (6.0%) above 1.339 (1.03 × 1.3 of base); "
        "accuracy>=0.85: it is 0.8, 0.05 (5.9%) below 0.85"
    )
    assert missed(verdicts[2:]) == ""


def test_a_miss_by_a_hair_is_written_with_the_digits_that_show_it() -> None:
    verdicts = judge(parse_requirements("accuracy<=0.1"), ("model",), [{"accuracy": 0.1000001}])
    assert "it is 0.1000001, 1e-07 (0.0%) above 0.1" in missed(verdicts)
    equal = judge(parse_requirements("accuracy<0.1,accuracy>0.1"), ("model",), [{"accuracy": 0.1}])
    assert "it is 0.1, not below 0.1; " in missed(equal)
    assert missed(equal).endswith("it is 0.1, not above 0.1")


@pytest.mark.parametrize("comparison", COMPARED)
def test_a_figure_that_is_no_number_holds_nothing(comparison: str) -> None:
    verdicts = judge(parse_requirements(f"accuracy{comparison}0.5"), ("model",), [{"accuracy": float("nan")}])
    assert "it is nan" in missed(verdicts)


def test_what_was_not_measured_after_all_is_refused_or_left_open() -> None:
    figures = [{"accuracy": 0.5}, {"items": 3.0}]
    with pytest.raises(InputError, match=r"accuracy is not measured here; it has no figure in the report, or write"):
        judge(parse_requirements("accuracy>0.5"), ("base", "model"), figures)
    with pytest.raises(InputError, match=r"items is not measured here; it has no figure in the report of base"):
        judge(parse_requirements("items>1*base"), ("base", "model"), figures)
    open_ones = judge(parse_requirements("accuracy?>0.5,items?>1*base"), ("base", "model"), figures)
    assert [one["holds"] for one in open_ones] == [None, None]
    assert missed(open_ones) == ""
