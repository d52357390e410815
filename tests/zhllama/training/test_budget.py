"""The forgetting budget's control on made-up curves: it follows the figure, within bounds, and lets go again."""

import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zhllama.training.budget import LEAST, MOST, SLOWEST, Budget, Decision, decide

shares = st.floats(0, 0.9)
losses = st.floats(0.01, 20)
spent = st.floats(-20, 20)


def budget(share: float = 0.1, **more: float) -> Budget:
    return Budget(**{"budget": 0.03, "share": share, **more})


def course(told: Budget, harm: Callable[[Decision], float], steps: int = 40) -> list[Decision]:
    """Decisions where each measurement finds the figure changed by `harm` of what was decided before."""
    loss, found = 2.0, [told.measured(2.0)]
    for _ in range(steps):
        loss *= 1 + harm(found[-1])
        found.append(told.measured(loss))
    return found


# --- properties -------------------------------------------------------------------------------------------------------


@given(shares, st.lists(losses, min_size=1, max_size=20))
def test_share_and_rate_stay_within_their_bounds(share, measured):
    told = budget(share)
    for loss in measured:
        decision = told.measured(loss)
        assert LEAST * share <= decision.share <= max(share, MOST)
        assert SLOWEST <= decision.rate <= 1


@given(shares, spent, spent, st.floats(0.1, 0.9), st.floats(SLOWEST, 1))
def test_the_more_is_forgotten_the_more_is_replayed_and_the_slower_it_learns(share, one, other, replayed, rate):
    before = Decision(replayed, rate)
    less, more = (decide(share, expected, 0.0, before) for expected in sorted((one, other)))
    assert less.share <= more.share + 1e-12
    assert less.rate >= more.rate - 1e-12


@given(shares, spent)
def test_the_rate_comes_down_only_where_replay_is_not_enough(share, expected):
    decision = decide(share, expected, 0.0, Decision(share))
    assert decision.rate == 1 or decision.share == max(share, MOST)


@given(shares, st.lists(losses, min_size=1, max_size=20), losses)
def test_share_and_rate_recover_when_nothing_is_lost_any_more(share, measured, base):
    told = budget(share, base=base)
    for loss in measured:
        told.measured(loss)
    decisions = [told.measured(base) for _ in range(40)]
    assert {one.rate for one in decisions[4:]} == {1.0}
    assert decisions[-1].share == pytest.approx(LEAST * share, abs=1e-5)


@given(shares, st.lists(losses, min_size=2, max_size=12), st.integers(0, 11))
def test_one_that_goes_on_from_a_checkpoint_decides_alike(share, measured, at):
    whole, resumed = budget(share), budget(share)
    for number, loss in enumerate(measured):
        if number == at:
            told = json.loads(json.dumps(resumed.state()))
            resumed = budget(share)
            resumed.restore(told)
        assert whole.measured(loss) == resumed.measured(loss)


# --- curves -----------------------------------------------------------------------------------------------------------


def test_a_text_that_does_harm_is_held_within_the_budget():
    """Harm that replay and a lower rate undo; without either it would be 1% at each measurement."""
    decisions = course(budget(), lambda told: told.rate * (0.01 * (1 - told.share) - 0.02 * told.share))
    assert max(one.spent for one in decisions) < 1
    assert decisions[-1].share > 0.1


def test_where_replay_does_not_help_the_rate_brings_it_to_a_halt():
    decisions = course(budget(), lambda told: 0.002 * told.rate)
    assert decisions[-1].rate < 0.2
    assert max(one.spent for one in decisions) < 1.5
    assert course(budget(), lambda _: 0.002)[-1].spent > 2


def test_a_text_that_does_no_harm_is_given_more_room():
    decisions = course(budget(), lambda told: -0.001)
    assert decisions[0] == Decision(0.1)
    assert decisions[-1].share == pytest.approx(LEAST * 0.1)
    assert {one.rate for one in decisions} == {1.0}


def test_without_a_budget_nothing_moves():
    told = Budget(0.0, 0.1)
    assert [told.measured(loss) for loss in (2.0, 3.0, 9.0)] == [Decision(0.1)] * 3
    assert told.base == 2.0


def test_one_that_counts_from_an_earlier_training_begins_with_what_is_spent():
    assert budget(base=2.0).measured(2.06).rate == SLOWEST
    assert budget(base=2.0).measured(2.015).rate == 1
    assert budget(base=2.0).measured(2.015).share == pytest.approx(0.1)
