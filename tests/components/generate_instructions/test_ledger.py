"""A limit is never passed, and the ledger adds up whatever the order of its lines."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.generate_instructions.ledger import Budget, Ledger, Tokens, bought, replayed, usual


@given(
    st.floats(0, 20), st.floats(0, 20), st.floats(0.001, 1), st.integers(1, 50_000),
    st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 9000), st.floats(0, 1))),
)  # fmt: skip
def test_what_is_charged_never_passes_a_limit(
    prompt: float, answer: float, cost: float, tokens: int, asked: list[tuple[int, int, float]]
) -> None:
    budget, ledger = Budget(prompt, answer, cost, tokens), Ledger()
    for number, (most_prompt, most_answer, share) in enumerate(asked):
        if budget.stops(ledger.charged, Tokens(most_prompt, most_answer)):
            continue
        key = {"request": number, "attempt": 1}
        ledger.apply({"event": "sent", "prompt_tokens": most_prompt, "answer_tokens": most_answer, **key})
        assert budget.cost(ledger.charged) <= cost
        assert ledger.charged.total <= tokens
        if share < 0.8:
            usage = {"prompt_tokens": int(most_prompt * share), "answer_tokens": int(most_answer * share)}
            ledger.apply({"event": "answered", "content": "", "finish": "stop", **usage, **key})
        assert budget.cost(ledger.charged) <= cost
        assert ledger.charged.total <= tokens


def test_an_estimate_is_of_tokens_and_cost() -> None:
    tokens = usual(20, 2000, 8192) * 63
    assert tokens == Tokens(600 * 63, 4400 * 63)
    assert Budget(1, 2).said(tokens) == "37,800 + 277,200 tokens, cost 0.5922"
    assert Budget().said(tokens) == "37,800 + 277,200 tokens"


def test_limits_buy_items_and_the_tighter_one_counts() -> None:
    # for 16 items
    one = Tokens(600, 4400)
    assert bought(Budget(), 20, one) == 0
    assert bought(Budget(max_tokens=50_000), 20, one) == 160
    assert bought(Budget(1, 1, max_cost=0.025, max_tokens=50_000), 20, one) == 80
    assert bought(Budget(0, 0, max_cost=1), 20, one) == 0


def sent(number: int, attempt: int = 1) -> dict[str, object]:
    return {"event": "sent", "request": number, "attempt": attempt, "prompt_tokens": 10, "answer_tokens": 100}


def answered(number: int, prompt: int | None = 5, answer: int | None = 50, attempt: int = 1) -> dict[str, object]:
    line = {"event": "answered", "request": number, "attempt": attempt, "content": f"c{number}", "finish": "stop"}
    return {**line, "prompt_tokens": prompt, "answer_tokens": answer, "model": "m"}


def failed(number: int, may_be_billed: bool) -> dict[str, object]:
    return {"event": "failed", "request": number, "attempt": 1, "reason": "r", "may_be_billed": may_be_billed}


@pytest.mark.parametrize(
    ("lines", "billed", "unseen"),
    [
        ([sent(0), answered(0)], 55, 0),
        ([sent(0), answered(0, None, None)], 0, 110),
        ([sent(0), failed(0, False)], 0, 0),
        ([sent(0), failed(0, True), sent(0, 2), answered(0, attempt=2)], 55, 110),
        ([sent(0)], 0, 110),
        ([sent(0), sent(1), answered(1)], 55, 110),
    ],
    ids=["answered", "not counted", "refused", "lost, then answered", "killed", "killed beside an answer"],
)
def test_what_may_have_to_be_paid_is_charged(lines: list[dict[str, object]], billed: int, unseen: int) -> None:
    ledger = replayed(lines)
    assert (ledger.billed.total, ledger.unseen.total, ledger.open) == (billed, unseen, {})


def test_a_batch_that_is_out_stays_open() -> None:
    planned = {"event": "batch planned", "batch": "b", "requests": [[3, 1, 10, 100], [4, 2, 10, 100]]}
    ledger = replayed([planned, {"event": "batch created", "batch": "b", "id": "batch_1"}])
    assert ledger.charged.total == 220
    assert ledger.unseen.total == 0
    assert ledger.batches["b"].identity == "batch_1"
    ledger.apply(answered(4, attempt=2))
    ledger.apply(failed(3, False))
    ledger.apply({"event": "batch ended", "batch": "b"})
    assert (ledger.charged.total, ledger.batches, set(ledger.settled)) == (55, {}, {4})
