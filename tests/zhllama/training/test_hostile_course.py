"""A text that turns hostile in the middle: what the model knows is kept within its budget, and is lost without."""

import pytest

from tests.zhllama.training.hostile_course import Course, made

BUDGET = 0.1


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Course:
    return made(str(tmp_path_factory.mktemp("course")))


def lost(lines) -> list[float]:
    """By how much of itself the loss of held-out replay text is above the base's, evaluation by evaluation."""
    return [line["eval_replay_loss"] / line["base_replay_loss"] - 1 for line in lines]


@pytest.mark.slow
def test_the_budget_holds_where_replay_alone_does_not(course, tmp_path, monkeypatch):
    without = course.run(tmp_path / "without", monkeypatch)
    within = course.run(tmp_path / "within", monkeypatch, forgetting_budget=BUDGET)
    assert lost(without)[-1] > 2 * BUDGET
    assert max(lost(within)) < BUDGET
    # more is replayed from where it turned, and it is told at each evaluation
    middle = len(within) // 2
    assert within[-1]["replay_share"] > within[middle]["replay_share"]
    assert [line["budget_spent"] for line in within] == pytest.approx([part / BUDGET for part in lost(within)])
    assert lost(without)[0] == lost(within)[0] == 0
