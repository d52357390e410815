"""Progress of long work: a live bar on a terminal, a line every 30 seconds elsewhere, and a last line with the rate."""

import logging
import sys
import time
from types import TracebackType
from typing import Any, Self

log = logging.getLogger("progress")
LINE_EVERY = 30.0
QUIET_BELOW = 5.0
"""Seconds: work that is over sooner prints nothing where there is no terminal."""


def human(count: float, unit: str) -> str:
    """`1.5 GB` for bytes (unit "B"), `12,345 lines` for the rest."""
    if unit != "B":
        return f"{count:,.0f} {unit}"
    for name in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or name == "TB":
            return f"{count:.0f} {name}" if name == "B" else f"{count:.1f} {name}"
        count /= 1000
    raise AssertionError("unreachable")


class Progress:
    """`with Progress("fetching", total, "B") as bar: bar.advance(n)`. `total` may be None when it is not known."""

    def __init__(self, title: str, total: float | None, unit: str = "B") -> None:
        self._title = title
        self._total = total
        self._unit = unit
        self._done = 0.0
        self._bar: Any = None
        self.note = ""
        """What stands behind the figures, for as long as it is not changed."""
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[shown]}"),
                TimeRemainingColumn(),
            )
            self._bar = RichProgress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total, shown="")
        return self

    def advance(self, count: float) -> None:
        self._done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, shown=self._text())
        elif time.monotonic() - self._last_line >= LINE_EVERY:
            self._last_line = time.monotonic()
            log.info("%s: %s", self._title, self._text())

    def _text(self) -> str:
        elapsed = max(time.monotonic() - self._started, 1e-6)
        rate = self._done / elapsed
        text = human(self._done, self._unit)
        if self._total:
            text += f" of {human(self._total, self._unit)}"
            if rate:
                text += f", {(self._total - self._done) / rate:.0f} s left"
        text += f", {human(rate, self._unit)}/s"
        return f"{text}, {self.note}" if self.note else text

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        elapsed = time.monotonic() - self._started
        if self._bar is not None:
            self._bar.stop()
        if kind is None and elapsed >= QUIET_BELOW:
            rate = human(self._done / elapsed, self._unit)
            log.info("%s: %s in %.0f s, %s/s", self._title, human(self._done, self._unit), elapsed, rate)
