"""When a request that failed is made again, and after how long: one policy for every server, exponential with jitter.

What follows something (a watch, a log, a job until its end) is no retry and has its own pauses.
"""

import random
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def pause_after(failures: int, first: float, longest: float) -> float:
    """Seconds to wait after so many failures in a row (1 or more): doubled each time from `first` up to `longest`, of
    which a random half may be left out, so that many clients do not come back at once."""
    return min(longest, first * 2.0 ** min(failures - 1, 30)) * random.uniform(0.5, 1)


def with_retries(
    request: Callable[[], Result],
    worth: Callable[[BaseException], bool],
    *,
    tries: int | None = None,
    seconds: float | None = None,
    first: float = 0.2,
    longest: float = 5.0,
    asked: Callable[[BaseException], float] = lambda error: 0.0,
    goes_on: Callable[[], bool] = lambda: True,
    say: Callable[[BaseException, int, float], None] = lambda error, failures, spent: None,
) -> Result:
    """What `request` returns, tried again while its errors are `worth` it; the last error as it came.

    tries, seconds: after which it is given up (None: never by that). first, longest: of the pauses. asked: the pause
    that the server asked for, waited if it is longer. goes_on: false ends it. say: told of each error before a pause,
    with the failures so far and the seconds since the first attempt.
    """
    from tenacity import RetryCallState, Retrying, retry_if_exception

    def error_of(state: RetryCallState) -> BaseException:
        error = state.outcome.exception() if state.outcome else None
        assert error is not None, "asked after a failure alone"
        return error

    def spent(state: RetryCallState) -> float:
        return state.seconds_since_start or 0.0

    return Retrying(
        retry=retry_if_exception(worth),
        wait=lambda state: max(pause_after(state.attempt_number, first, longest), asked(error_of(state))),
        stop=lambda state: (
            (tries is not None and state.attempt_number >= tries)
            or (seconds is not None and spent(state) >= seconds)
            or not goes_on()
        ),
        before_sleep=lambda state: say(error_of(state), state.attempt_number, spent(state)),
        reraise=True,
    )(request)
