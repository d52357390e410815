"""Progress: a bar on a terminal, lines elsewhere, nothing for what is over at once."""

import logging
import os
import pty
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.shared import progress
from components.shared.progress import Progress, human


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


def test_long_work_says_how_far_it_is_and_at_last_its_rate(caplog, monkeypatch):
    clock = iter([0.0, 31.0, 31.0, 31.0, 40.0, 62.0, 62.0, 62.0, 100.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO), Progress("fetching", 4_000_000) as bar:
        bar.advance(1_000_000)
        bar.advance(1_000_000)
        bar.advance(2_000_000)
    assert [record.message for record in caplog.records] == [
        "fetching: 1.0 MB of 4.0 MB, 93 s left, 32.3 kB/s",
        "fetching: 4.0 MB of 4.0 MB, 0 s left, 64.5 kB/s",
        "fetching: 4.0 MB in 100 s, 40.0 kB/s",
    ]


def test_work_that_fails_claims_nothing(caplog, monkeypatch):
    clock = iter([0.0, 100.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO), pytest.raises(ValueError, match="x"), Progress("fetching", None):
        raise ValueError("x")
    assert caplog.records == []


def test_a_terminal_gets_a_bar(monkeypatch):
    """The bar is drawn when it is closed at the latest, so nothing has to be waited for."""
    controller, terminal = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with os.fdopen(terminal, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with Progress("fetching", 4_000_000) as bar:
            bar.advance(1_000_000)
        stream.write("end")
    said = b""
    while not said.endswith(b"end"):
        said += os.read(controller, 65_536)
    os.close(controller)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode())
    assert "fetching" in plain
    assert "1.0 MB of 4.0 MB" in plain
