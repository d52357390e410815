"""The page: one file that loads nothing, escapes what models say, and draws what the report holds."""

import copy
import itertools
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.evaluate.page import change, exam_bars, front_chart, headlines, ratio, render
from zhllama.stage.report_figures import fact_rows, task_rows
from zhllama.stage.report_page import averaged, curves, ticks


def figures(label: str, bits: float, accuracy: float, tokens: float) -> dict[str, Any]:
    group = {"instruction": "好还是坏？", "choices": ["好", "坏"], "items": 50, "accuracy": accuracy, "chance": 0.52}
    return {
        "label": label,
        "reference": f"s3://store/{label}/manifest.json",
        "digest": label,
        "pieces": 1234,
        "parameters": 5678,
        "tokens_per_character": {"zh": tokens, "en": 0.26},
        "bits_per_byte": {"zh": bits, "en": 2.5},
        "perplexity": {"zh": 9.5, "en": 7.5},
        "next_token_accuracy": {"zh": 0.2, "en": 0.3},
        "exams": [
            {
                "exam": "考试",
                "shots": shots,
                "items": 40,
                "accuracy": accuracy,
                "margin": 0.1,
                "chance": 0.25,
                "too_long": 0,
                "subjects": [{"subject": "历史", "items": 40, "accuracy": accuracy}],
            }
            for shots in (0, 5)
        ],
        "lm_eval": {"xnli_zh": {"acc,none": accuracy}},
        "instructions": {
            "accuracy": accuracy,
            "margin": 0.04,
            "chance": 0.52,
            "items": 50,
            "exact_match": 0.4,
            "exact_match_items": 60,
            "answer_bits_per_byte": 0.5,
            "too_long": 2,
            "groups": [group],
        },
    }


@pytest.fixture
def report() -> dict[str, Any]:
    text = {"reference": "r", "documents": 10, "bytes": 3000, "characters": 1000}
    points = [{"step": step, "loss": 9 - step / 10, "eval_loss": 8.5 if step == 40 else None} for step in range(1, 51)]
    return {
        "models": [figures("base", 4.0, 0.5, 1.4), figures("adapted", 2.0, 0.75, 0.7)],
        "texts": {"zh": text, "en": text},
        "samples": [
            {"kind": "instruction", "prompt": "问", "expected": "答", "answers": {"base": "<script>", "adapted": "答"}},
            {"kind": "prompt", "prompt": "介绍长江", "expected": "", "answers": {"base": "长", "adapted": "长江"}},
            {"kind": "text", "prompt": "很久以前", "expected": "有座山", "answers": {"adapted": ""}},
        ],
        "trainings": [{"label": "pretrain lora", "reference": "t", "points": points}],
    }


class Reader(HTMLParser):
    """Collects tags, what would be fetched, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "data", "poster", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    return reader


def test_the_page_loads_nothing_and_runs_nothing(report: dict[str, Any]) -> None:
    page = render(report, 96)
    reader = read(page)
    assert reader.fetched == []
    assert not {"script", "link", "img", "iframe", "object"} & set(reader.tags)
    assert not re.search(r"url\(|@import|https?://", page)


def test_what_a_model_says_stays_text(report: dict[str, Any]) -> None:
    report["samples"][0]["answers"]["adapted"] = '<script>alert(1)</script> & "好"'
    reader = read(render(report, 96))
    assert "script" not in reader.tags
    assert '<script>alert(1)</script> & "好"' in reader.text


def test_the_headline_says_what_changed(report: dict[str, Any]) -> None:
    shown = {title: (figure, note) for figure, title, note in headlines(report)}
    assert shown["fewer tokens for the same Chinese"] == ("2.00×", "1.40 → 0.70 per character")
    assert shown["bits per byte, Chinese"] == ("2.00", "from 4.00 (−50%)")
    assert shown["accuracy, held-out instructions"] == ("75%", "from 50%; chance 52%")


def test_a_lone_model_is_shown_without_comparison(report: dict[str, Any]) -> None:
    report["models"] = report["models"][1:]
    text = read(render(report, 96)).text
    assert "What the model can do" in text
    assert "fewer" not in text.replace("Fewer: longer texts", "")


@pytest.mark.parametrize(
    ("missing", "heading"),
    [
        ("text", "Bits per byte"),
        ("instructions", "Held-out instructions"),
        ("trainings", "Training"),
        ("samples", "Side"),
        ("exams", "Exams"),
        ("lm_eval", "lm-evaluation-harness"),
    ],
)
def test_what_was_not_measured_has_no_section(report: dict[str, Any], missing: str, heading: str) -> None:
    assert heading in read(render(report, 96)).text
    left = copy.deepcopy(report)
    if missing == "text":
        left["texts"] = {"zh": None, "en": None}
        for model in left["models"]:
            for name in ("tokens_per_character", "bits_per_byte", "perplexity", "next_token_accuracy"):
                model[name] = {"zh": None, "en": None}
    elif missing in ("exams", "lm_eval"):
        for model in left["models"]:
            model[missing] = type(model[missing])()
    elif missing == "instructions":
        for model in left["models"]:
            model["instructions"] = None
    else:
        left[missing] = []
    headings = re.findall(r"<h2>(.*?)</h2>", render(left, 96))
    assert headings
    assert not any(found.startswith(heading) for found in headings)


def test_a_prompt_that_did_not_fit_and_an_empty_answer_are_told_apart(report: dict[str, Any]) -> None:
    text = read(render(report, 96)).text
    assert "the prompt does not fit this model" in text
    assert "(nothing)" in text


def test_exams_and_tasks_are_shown_for_every_model(report: dict[str, Any]) -> None:
    asked, _ = exam_bars(report)
    shown = task_rows(report["models"])
    assert asked.title == "考试, 0 shots"
    assert [text for _, _, text, _, _ in asked.bars] == ["50.0%", "75.0%"]
    assert asked.chance == 25
    assert shown == [("xnli_zh, acc", [0.5, 0.75])]
    assert "perplexity, Chinese" in read(render(report, 96)).text


def test_what_a_model_knows_and_what_it_lost_are_shown_side_by_side(report: dict[str, Any]) -> None:
    assert "What it can still do" not in render(report, 96)
    for model, right in zip(report["models"], (4, 3)):
        known = (
            {"known": None, "kept": None, "kept_share": None}
            if right == 4
            else {"known": 4, "kept": 3, "kept_share": 0.75}
        )
        figures = {
            "items": 5,
            "right": right,
            "accuracy": right / 5,
            "margin": 0.3,
            "in_language": 1.0,
            "distinct": 0.4,
        }
        model |= {"facts": {"zh": None, "en": figures | known}, "repetition": 0.125}
    report["questions"] = [
        {"language": "en", "question": f"Which {n}?", "answer": "this", "right": labels,
         "answers": {"base": "this", "adapted": "<i>that"}}
        for n, labels in enumerate((["base", "adapted"], ["base"], ["adapted"], []))
    ]  # fmt: skip
    page = render(report, 96)
    text = read(page).text
    assert "What base knows and adapted does not say" in text
    assert [n for n in range(4) if f"Which {n}?" in text] == [1]
    assert "&lt;i&gt;that" in page
    rows = {name: values for name, _, values in fact_rows(report["models"])}
    assert rows["facts right, English"] == [4, 3]
    assert rows["  of the base's, kept"] == [None, 0.75]
    assert rows["repetition"] == [0.125, 0.125]
    assert "75.0%" in text


@pytest.mark.parametrize("holds", [True, False, None])
def test_requirements_are_shown_with_what_came_of_them(report: dict[str, Any], holds: bool | None) -> None:
    assert "Requirements" not in render(report, 96)
    value = None if holds is None else 0.75
    report["requirements"] = [
        {"requirement": "accuracy>=0.7", "figure": "accuracy", "value": value, "comparison": ">=", "bound": 0.7,
         "number": 0.7, "label": None, "holds": holds}
    ]  # fmt: skip
    text = "".join(read(render(report, 96)).text.split())
    said = {True: "0.75000.7000yes", False: "0.75000.7000no", None: "–0.7000notmeasured"}[holds]
    assert f"accuracy>=0.7{said}" in text
    assert ("therunendshere" in text) is (holds is False)


@pytest.mark.parametrize(("chosen", "said"), [(0.0, "adapted as it is"), (0.5, "the best Chinese"), (None, "No point")])
def test_the_front_marks_the_chosen_point(report: dict[str, Any], chosen: float | None, said: str) -> None:
    assert "Chinese against English" not in render(report, 96)
    bits = [(0.0, 2.0, 2.9), (0.5, 2.4, 2.6), (1.0, 4.0, 2.5)]
    points = [{"weight": weight, "bits_per_byte": {"zh": zh, "en": en}} for weight, zh, en in bits]
    report["front"] = {"points": points, "chosen": chosen}
    drawn = front_chart(report)
    assert drawn is not None
    assert [(name, is_chosen) for *_, name, is_chosen in drawn.dots] == [
        ("adapted", chosen == 0.0), ("50%", chosen == 0.5), ("base", False)
    ]  # fmt: skip
    assert all(0 <= x <= 100 and 0 <= y <= 100 for x, y, *_ in drawn.dots)
    # more English bits lie further right, fewer Chinese ones lower
    assert drawn.dots[0][0] > drawn.dots[1][0] > drawn.dots[2][0]
    assert drawn.dots[0][1] < drawn.dots[1][1] < drawn.dots[2][1]
    text = read(render(report, 96)).text
    assert said in text
    assert "50% of base" in text


def test_curves_span_their_box(report: dict[str, Any]) -> None:
    drawn = curves(report["trainings"][0])
    training, held = drawn.lines
    points = [tuple(map(float, pair.split(","))) for pair in training.points.split()]
    assert points[0][0] == 0
    assert points[-1][0] == 100
    assert all(0 <= y <= 100 for _, y in points)
    assert points[0][1] < points[-1][1]  # the loss falls, and SVG counts from above
    assert (held.name, held.last) == ("held out", "8.50")


limits = st.floats(-1e6, 1e6, allow_nan=False).map(lambda value: round(value, 3))


@given(limits, limits)
def test_ticks_are_round_even_and_cover_the_range(low: float, high: float) -> None:
    low, high = min(low, high), max(low, high)
    found = ticks(low, high, 4)
    if low == high:
        assert found == [low]
        return
    steps = {round((right - left) / (found[1] - found[0]), 6) for left, right in itertools.pairwise(found)}
    assert steps == {1.0}
    assert found[0] <= low + 1e-6
    assert found[-1] >= high - 1e-6
    assert 2 <= len(found) <= 7
    assert round(10 ** (math.log10(found[1] - found[0]) % 1), 3) in (1, 2, 5, 10)


@given(st.lists(st.floats(0, 10), min_size=2, max_size=900), st.integers(3, 100))
def test_averaging_keeps_the_ends_the_order_and_the_mean_range(losses: list[float], most: int) -> None:
    points = list(enumerate(losses))
    found = averaged(points, most)
    assert len(found) <= most
    assert (found[0], found[-1]) == (points[0], points[-1])
    assert [x for x, _ in found] == sorted({x for x, _ in found})
    assert min(losses) - 1e-9 <= min(y for _, y in found)
    assert max(y for _, y in found) <= max(losses) + 1e-9


@pytest.mark.parametrize(
    ("before", "after", "said"), [(1.4, 0.7, "2.00× fewer"), (0.5, 0.6, "1.20× more"), (1.0, 1.001, "the same")]
)
def test_ratio_says_fewer_more_or_the_same(before: float, after: float, said: str) -> None:
    assert ratio(before, after) == said


def test_change_has_a_sign() -> None:
    assert [change(2, 1), change(2, 3), change(2, 2.001)] == ["−50%", "+50%", "0%"]
