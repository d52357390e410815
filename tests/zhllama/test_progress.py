"""Progress: a bar on a terminal, lines elsewhere, nothing for what is over at once."""

import logging
import os
import pty
import re
import sys
import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zhllama import progress
from zhllama.progress import Progress, human


@pytest.mark.parametrize(
    ("count", "unit", "text"),
    [
        (0, "B", "0 B"),
        (999, "B", "999 B"),
        (1000, "B", "1.0 kB"),
        (1_500_000, "B", "1.5 MB"),
        (13_000_000_000, "B", "13.0 GB"),
        (2.5e15, "B", "2500.0 TB"),
        (12_345, "lines", "12,345 lines"),
    ],
)
def test_figures_are_for_people(count, unit, text):
    assert human(count, unit) == text


@given(st.floats(0, 1e18))
def test_a_figure_keeps_its_size(count):
    value, unit = human(count, "B").split()
    assert float(value) * 1000 ** ("B", "kB", "MB", "GB", "TB").index(unit) == pytest.approx(count, rel=0.06, abs=0.5)


def test_short_work_says_nothing(caplog):
    with caplog.at_level(logging.INFO), Progress("fetching", 100) as bar:
        bar.advance(100)
    assert caplog.records == []


def until(condition: Callable[[], bool]) -> None:
    """Waits for what another thread will bring about."""
    for _ in range(2000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not come about")


def test_long_work_says_how_far_it_is_and_at_last_its_rate(caplog, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.01)
    monkeypatch.setattr(progress, "QUIET_BELOW", 0.0)
    said = caplog.records
    with caplog.at_level(logging.INFO), Progress("fetching", 4_000_000) as bar:
        bar.advance(1_000_000)
        line = r"fetching: 1\.0 MB of 4\.0 MB, \d+ s left, [\d.]+ .?B/s"
        until(lambda: any(re.fullmatch(line, record.message) for record in said))
        bar.advance(3_000_000)
    assert re.fullmatch(r"fetching: 4\.0 MB in \d+ s, [\d.]+ .?B/s", said[-1].message)


def test_work_that_stands_still_says_so(caplog, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.01)
    with caplog.at_level(logging.INFO), Progress("fetching", 4_000_000) as bar:
        bar.advance(1_000_000)
        until(lambda: any(re.search(r", nothing for \d+ s$", record.message) for record in caplog.records))


def test_what_many_threads_do_is_counted_whole():
    with Progress("fetching", None) as bar:
        threads = [threading.Thread(target=lambda: [bar.advance(1) for _ in range(5000)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert bar._done == 40_000


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (185, "3 min 05 s"), (7620, "2 h 07 min"), (-1, "0 s")]
)
def test_durations_are_for_people(seconds, text):
    assert progress.duration(seconds) == text


def test_work_that_fails_claims_nothing(caplog, monkeypatch):
    monkeypatch.setattr(progress, "QUIET_BELOW", 0.0)
    with caplog.at_level(logging.INFO), pytest.raises(ValueError, match="x"), Progress("fetching", None):
        raise ValueError("x")
    assert caplog.records == []


def test_a_terminal_gets_a_bar_and_work_inside_it_a_row(monkeypatch):
    controller, terminal = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(progress, "SHOW_AFTER", 0.0)
    said = bytearray()

    def listen() -> None:
        while not said.endswith(b"end"):
            said.extend(os.read(controller, 65_536))

    reader = threading.Thread(target=listen)
    reader.start()
    with os.fdopen(terminal, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with Progress("merging", 4_000_000) as outer:
            outer.advance(1_000_000)
            until(lambda: b"1.0 MB of 4.0 MB" in said)
            # what others named: no markup
            with Progress("fetching [/x][red]:bus:", 7_000_000) as inner:
                inner.advance(2_000_000)
                until(lambda: b"2.0 MB of 7.0 MB" in said)
        stream.write("end")
        stream.flush()
        reader.join()
    os.close(controller)
    assert b"merging" in said
    assert b"fetching [/x][red]:bus:" in said
    assert not progress._rows.cache_info().currsize


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_row_that_the_terminal_refuses_leaves_none_behind(monkeypatch):
    def refused(display: object) -> None:
        raise BlockingIOError

    controller, terminal = pty.openpty()
    monkeypatch.setattr(progress, "SHOW_AFTER", 0.0)
    monkeypatch.setattr("rich.progress.Progress.start", refused)
    with os.fdopen(terminal, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with Progress("merging", 1):
            until(lambda: not any(thread.name.endswith("(_show)") for thread in threading.enumerate()))
    assert not progress._rows.cache_info().currsize
    os.close(controller)
