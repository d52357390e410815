"""When a request that failed is made again, and after how long: one policy for every server, exponential with jitter.

What follows something (a watch, a log, a job until its end) is no retry and has its own pauses.
"""

import math
import random
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


def pause_after(failures: int, first: float, longest: float) -> float:
    """Seconds to wait after so many failures in a row (1 or more): doubled each time from `first` up to `longest`, of
    which a random half may be left out, so that many clients do not come back at once."""
    return min(longest, first * 2.0 ** min(failures - 1, 30)) * random.uniform(0.5, 1)


def with_retries(
    request: Callable[[], Result],
    worth: Callable[[BaseException], bool],
    *,
    tries: float = math.inf,
    seconds: float = math.inf,
    first: float = 0.2,
    longest: float = 5.0,
    asked: Callable[[BaseException], float] = lambda error: 0.0,
    goes_on: Callable[[], bool] = lambda: True,
    say: Callable[[BaseException, int, float], None] = lambda error, failures, spent: None,
) -> Result:
    """What `request` returns, tried again while its errors are `worth` it; the last error as it came.

    tries, seconds: after which it is given up. first, longest: of the pauses. asked: the pause
    that the server asked for, waited if it is longer. goes_on: false ends it. say: told of each error before a pause,
    with the failures so far and the seconds since the first attempt.
    """
    from tenacity import Retrying, retry_if_exception

    def failed(state: Any) -> tuple[BaseException, int, float]:
        return state.outcome.exception(), state.attempt_number, state.seconds_since_start

    return Retrying(
        retry=retry_if_exception(worth),
        wait=lambda state: max(pause_after(state.attempt_number, first, longest), asked(failed(state)[0])),
        stop=lambda state: failed(state)[1] >= tries or failed(state)[2] >= seconds or not goes_on(),
        before_sleep=lambda state: say(*failed(state)),
        reraise=True,
    )(request)
