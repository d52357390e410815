"""No minute holds more than its limit; Retry-After is read in every form; back-off grows and is random."""

import asyncio
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.generate_instructions import limits
from components.generate_instructions.limits import MINUTE, Limits, backoff, retry_after


@given(
    st.floats(1, 50),
    st.lists(st.tuples(st.floats(0, 30), st.floats(0.5, 20), st.floats(0, 30)), min_size=1, max_size=40),
)
def test_no_minute_holds_more_than_the_limit(limit: float, asked: list[tuple[float, float, float]]) -> None:
    window, now, sent = Limits(0, limit), 0.0, []
    for pause, amount, truly in asked:
        now += pause
        while (wait := window.wait(now, amount)) > 0:
            now += wait + 1e-9
        correct = window.take(now, amount)
        sent.append([now, amount])
        if truly < amount:
            correct(truly)
            sent[-1][1] = truly
        inside = [amount for at, amount in sent if at > now - MINUTE]
        # one that is larger than the limit goes alone
        assert sum(inside) <= limit + 1e-6 or len(inside) == 1 or sum(inside[:-1]) < 1e-9


def test_without_a_limit_nothing_waits() -> None:
    window = Limits(0, 0)
    for _ in range(1000):
        window.take(0.0, 1e9)
    assert window.wait(0.0, 1e9) == 0


def test_a_window_waits_just_as_long_as_it_must() -> None:
    window = Limits(0, 10)
    window.take(0.0, 6)
    window.take(20.0, 4)
    assert window.wait(30.0, 1) == pytest.approx(30.0)
    assert window.wait(30.0, 7) == pytest.approx(50.0)
    assert window.wait(60.5, 6) == 0


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "9", "retry-after-ms": "250"}, 0.25),
        ({}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "²"}, None),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
    ],
)
def test_retry_after_is_read(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds


def test_retry_after_as_a_date_is_until_then() -> None:
    said = retry_after({"retry-after": format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)})
    assert said is not None
    assert 60 < said <= 100


def test_backoff_grows_to_its_limit_and_is_random() -> None:
    assert all(0 <= backoff(failures) <= limits.LONGEST_WAIT for failures in range(1, 2000))
    assert len({backoff(5) for _ in range(20)}) > 1


def test_tokens_that_were_not_used_are_the_next_requests_at_once() -> None:
    """A request counts with its longest answer until its bill is known; whoever waits for room hears of it."""

    async def work() -> None:
        pace = Limits(0, 100)
        correct = await pace.turn(90)
        waiting = asyncio.create_task(pace.turn(50))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        correct(60)
        await asyncio.sleep(0.01)
        assert not waiting.done()
        correct(50)
        # some milliseconds; a minute where it sleeps on
        await asyncio.wait_for(waiting, 30)

    asyncio.run(work())


def test_a_pause_holds_for_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    now = [100.0]

    async def wait(_: Limits, seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(limits.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Limits, "_wait", wait)

    async def work() -> None:
        pace = Limits(0, 0)
        pace.pause(7)
        pace.pause(3)
        await asyncio.gather(pace.turn(1), pace.turn(1))

    asyncio.run(work())
    assert slept == [pytest.approx(7)]
