"""One policy of retries for every server."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zhllama.retries import pause_after, with_retries

QUICK = {"first": 0.001, "longest": 0.002}


class Server:
    """Fails as often as it is told, then answers."""

    def __init__(self, *errors):
        self.errors = list(errors)
        self.asked = 0

    def __call__(self):
        self.asked += 1
        if self.errors:
            raise self.errors.pop(0)
        return "answer"


def of_network(error):
    return isinstance(error, OSError)


@given(st.integers(1, 10_000), st.floats(0.001, 10), st.floats(10, 100))
def test_a_pause_is_doubled_up_to_the_longest_and_half_of_it_is_chance(failures, first, longest):
    whole = min(longest, first * 2 ** min(failures - 1, 30))
    assert whole / 2 <= pause_after(failures, first, longest) <= whole


def test_it_asks_again_while_an_error_is_worth_it():
    server = Server(OSError(1), OSError(2))
    assert with_retries(server, of_network, **QUICK) == "answer"
    assert server.asked == 3


def test_any_other_error_comes_as_it_is_and_at_once():
    server = Server(ValueError("wrong"))
    with pytest.raises(ValueError, match="wrong"):
        with_retries(server, of_network)
    assert server.asked == 1


def test_after_so_many_tries_the_last_error_comes_as_it_was():
    server = Server(*(OSError(number) for number in range(9)))
    with pytest.raises(OSError, match="2"):
        with_retries(server, of_network, tries=3, **QUICK)
    assert server.asked == 3


def test_after_so_many_seconds_it_gives_up():
    server = Server(*(OSError(number) for number in range(1000)))
    with pytest.raises(OSError, match=r"\d"):
        with_retries(server, of_network, seconds=0.05, **QUICK)
    assert 1 < server.asked < 1000


def test_nothing_goes_on_when_what_was_waited_for_is_gone():
    server = Server(OSError(1), OSError(2))
    with pytest.raises(OSError, match="1"):
        with_retries(server, of_network, goes_on=lambda: False)


def test_a_longer_pause_that_the_server_asks_for_is_kept_and_each_failure_is_told():
    told = []
    with_retries(
        Server(OSError(1), OSError(2)), of_network, asked=lambda error: 0.05 * error.args[0],
        say=lambda error, failures, spent: told.append((error.args[0], failures, spent)), **QUICK,
    )  # fmt: skip
    assert [(error, failures) for error, failures, _ in told] == [(1, 1), (2, 2)]
    # told before its pause
    assert told[1][2] >= 0.05
