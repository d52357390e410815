"""The loss curve: every point in the picture, nothing from outside."""

import math
import re

from hypothesis import given
from hypothesis import strategies as st

from zhllama.stage.report_page import curves
from zhllama.training.worker import loss_report

LINES = [
    {"step": 1, "loss": 9.9, "learning_rate": 0.0, "tokens_per_second": 4000},
    {"step": 10, "loss": 7.5, "tokens_per_second": 4100, "mfu": 0.412, "peak_memory_gb": 38.42},
    {"step": 10, "eval_loss": 7.7, "eval_perplexity": 2208.3, "eval_accuracy": 0.125},
]

losses = st.lists(st.tuples(st.integers(0, 10**5), st.floats(1e-3, 20)), min_size=2, max_size=30)


@given(losses, losses)
def test_every_point_lies_in_the_picture(training, held_out):
    points = [{"step": step, "loss": loss, "eval_loss": None} for step, loss in training]
    points += [{"step": step, "loss": None, "eval_loss": loss} for step, loss in held_out]
    lines = [line.points.split() for line in curves({"label": "t", "points": points}).lines]
    assert [len(line) for line in lines] == [len(training), len(held_out)]
    for point in (point for line in lines for point in line):
        x, y = map(float, point.split(","))
        assert 0 <= x <= 100
        assert 0 <= y <= 100


def test_the_page_shows_the_figures_and_loads_nothing():
    page = loss_report("pretrain <lora>", LINES, "loss 9.90 → 7.50 in 10 steps")
    assert "pretrain &lt;lora&gt;" in page
    for figure in ("7.5000", "7.7000", "12.50%", "4,100", "41.2%", "38.4"):
        assert figure in page
    assert not re.search(r"https?://|<script|src=|@import", page)


def test_a_loss_that_is_no_number_leaves_a_gap_and_a_point_alone_is_a_dot():
    page = loss_report("t", [*LINES, {"step": 11, "loss": math.nan}], "s").split("<table>")[0]
    assert "nan" not in page
    _, held_out = re.findall(r'<polyline class="[a-z]+" points="([^"]*)"', page)
    first, second = held_out.split()
    assert first == second


def test_without_a_loss_there_is_no_curve():
    assert "<polyline" not in loss_report("t", [], "s")


def test_the_page_tells_each_decision_of_the_forgetting_budget():
    steered = {"base_replay_loss": 2.0, "budget_spent": 0.5, "replay_share": 0.515, "rate_factor": 0.9}
    page = loss_report("t", [*LINES, {"step": 1200, "eval_replay_loss": 2.03, **steered}], "s")
    assert page.count("<polyline") == 3
    row = "".join(re.findall(r"<td>1,200</td><td>.*", page))
    assert row == "<td>1,200</td><td>2.0300</td><td>50%</td><td>51.5%</td><td>90%</td></tr>"
    assert "forgetting" not in loss_report("t", LINES, "s")
