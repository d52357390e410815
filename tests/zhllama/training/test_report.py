"""The loss curve: every point in the picture, round ticks, nothing from outside."""

import math
import re
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from zhllama.training.report import HEIGHT, WIDTH, _ticks, curve, loss_report

LINES = [
    {"step": 1, "loss": 9.9, "learning_rate": 0.0, "tokens_per_second": 4000},
    {"step": 10, "loss": 7.5, "tokens_per_second": 4100, "mfu": 0.412, "peak_memory_gb": 38.42},
    {"step": 10, "eval_loss": 7.7, "eval_perplexity": 2208.3, "eval_accuracy": 0.125},
]

losses = st.lists(st.tuples(st.integers(0, 10**5), st.floats(1e-3, 20)), min_size=1, max_size=30)


@given(losses, losses)
def test_every_point_lies_in_the_picture(training, held_out):
    root = ElementTree.fromstring(curve({"loss": training, "eval_loss": held_out}))
    lines = [line.attrib["points"].split() for line in root.iter("polyline")]
    assert [len(line) for line in lines] == [len(training), len(held_out)]
    for point in (point for line in lines for point in line):
        x, y = map(float, point.split(","))
        assert 0 <= x <= WIDTH
        assert 0 <= y <= HEIGHT


@given(st.floats(1e-3, 1e5), st.floats(1e-3, 1e5))
def test_ticks_are_few_and_enclose_the_values(one, other):
    low, high = sorted((one, other))
    ticks = _ticks(low, high)
    assert 2 <= len(ticks) <= 10 or math.isclose(low, high)
    assert ticks[0] <= low * (1 + 1e-9)
    assert ticks[-1] >= high * (1 - 1e-9)


def test_the_page_shows_the_figures_and_loads_nothing():
    page = loss_report("pretrain <lora>", LINES, "loss 9.90 → 7.50 in 10 steps")
    assert "pretrain &lt;lora&gt;" in page
    for figure in ("7.5000", "7.7000", "12.50%", "4,100", "41.2%", "38.4"):
        assert figure in page
    assert not re.search(r"https?://|<script|src=|@import", page)


def test_a_loss_that_is_no_number_leaves_a_gap():
    root = ElementTree.fromstring(curve({"loss": [(1, 2.0)]}))
    assert len(list(root.iter("circle"))) == 1
    assert "nan" not in loss_report("t", [*LINES, {"step": 11, "loss": math.nan}], "s").split("<table>")[0]
