"""Progress of long work: a live bar on a terminal, a line every 30 seconds elsewhere, and a last line with the rate.

What is over within a second draws nothing. Work inside other work has a row of its own below it. Lines come by the
clock and not by the bytes, so that a transfer that stands still says so.
"""

import logging
import sys
import threading
import time
from functools import cache
from typing import Any, Self

from zhllama import terminal

log = logging.getLogger("progress")
LINE_EVERY = 30.0
SHOW_AFTER = 1.0
QUIET_BELOW = 5.0
"""Seconds: work that is over sooner says nothing at its end."""


def human(count: float, unit: str) -> str:
    """`1.5 GB` for bytes (unit "B"), `12,345 lines` for the rest."""
    if unit != "B":
        return f"{count:,.0f} {unit}"
    for name, digits in (("B", 0), ("kB", 1), ("MB", 1), ("GB", 1)):
        if count < 1000:
            return f"{count:.{digits}f} {name}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 07 min`."""
    whole = round(max(seconds, 0))
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


_drawing = threading.Lock()


@cache
def _rows() -> Any:
    """The one live display of all rows that are on the terminal now."""
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as RichProgress

    # a title names what others named
    title = TextColumn("{task.description}", markup=False)
    columns = (title, BarColumn(), TextColumn("{task.fields[shown]}", markup=False))
    return RichProgress(*columns, console=terminal.console(sys.stderr), transient=True)


class Progress:
    """`with Progress("fetching", total, "B") as bar: bar.advance(n)`. `total` may be None when it is not known.
    `advance` may be called from any thread."""

    def __init__(self, title: str, total: float | None, unit: str = "B") -> None:
        self._title, self._total, self._unit = title, total, unit
        self._done = 0.0
        self.note = ""
        """What stands behind the figures, for as long as it is not changed."""
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._clock = threading.Thread(target=self._show if sys.stderr.isatty() else self._tell, daemon=True)

    def __enter__(self) -> Self:
        self._clock.start()
        return self

    def advance(self, count: float) -> None:
        with self._lock:
            self._done += count

    def _show(self) -> None:
        """On a terminal: a row, drawn again ten times a second."""
        if self._ended.wait(SHOW_AFTER):
            return
        with _drawing:
            row = _rows().add_task(self._title, total=self._total, shown=self._text(), completed=self._done)
        try:
            _rows().start()
            while not self._ended.wait(0.1):
                _rows().update(row, completed=self._done, shown=self._text())
        finally:
            with _drawing:
                if len(_rows().tasks) > 1:
                    _rows().remove_task(row)
                    _rows().refresh()
                else:
                    # with its row still in it: what it does not know it does not erase
                    _rows().stop()
                    _rows.cache_clear()

    def _tell(self) -> None:
        """Elsewhere: a line every 30 seconds."""
        before, since = 0.0, self._started
        while not self._ended.wait(LINE_EVERY):
            still = ""
            if self._done == before:
                still = f", nothing for {time.monotonic() - since:.0f} s"
            else:
                before, since = self._done, time.monotonic()
            log.info("%s: %s%s", self._title, self._text(), still)

    def _text(self) -> str:
        elapsed = max(time.monotonic() - self._started, 1e-6)
        rate = self._done / elapsed
        text = human(self._done, self._unit)
        if self._total:
            text += f" of {human(self._total, self._unit)}"
            if rate:
                text += f", {duration((self._total - self._done) / rate)} left"
        text += f", {human(rate, self._unit)}/s"
        return f"{text}, {self.note}" if self.note else text

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        elapsed = time.monotonic() - self._started
        self._ended.set()
        self._clock.join()
        if kind is None and elapsed >= QUIET_BELOW:
            done, rate = human(self._done, self._unit), human(self._done / elapsed, self._unit)
            log.info("%s: %s in %s, %s/s", self._title, done, duration(elapsed), rate)
