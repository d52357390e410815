"""What a person sees of a run: a live table on a terminal, plain lines elsewhere."""

import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TextIO

from pipelines.local.plan import State
from zhllama import terminal
from zhllama.secret_text import mask
from zhllama.terminal import visible

TAIL = 2000
"""Bytes from the end of a log that are looked at for its last line."""

_LOOKS = {State.RUNNING: "bold yellow", State.DONE: "green", State.UNCHANGED: "green", State.FAILED: "bold red"}


@dataclass
class Row:
    """One step as it is shown."""

    name: str
    log: Path
    state: State = State.WAITING
    started: float = 0.0
    seconds: float = 0.0
    figure: str = ""

    @property
    def shown_time(self) -> str:
        seconds = time.monotonic() - self.started if self.state is State.RUNNING else self.seconds
        return duration(seconds) if seconds else ""


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def last_lines(log: Path, count: int) -> list[str]:
    """The last lines of a log, without empty ones."""
    with suppress(OSError), open(log, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL * count))
        lines = file.read().decode(errors="replace").splitlines()
        return [visible(mask(line.rstrip())) for line in lines if line.strip()][-count:]
    return []


class RunTable:
    """`with RunTable(rows) as table: table.change(row, state)`. Rows not in `rows` are tracked but not shown."""

    def __init__(self, rows: list[Row], stream: TextIO | None = None) -> None:
        self._rows = rows
        self._stream = stream or sys.stdout
        self._width = max((len(row.name) for row in rows), default=0)
        self._live: Any = None

    def __enter__(self) -> Self:
        if self._stream.isatty():
            from rich.live import Live

            self._live = Live(console=terminal.console(self._stream), get_renderable=self._table, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def change(self, row: Row, state: State, figure: str = "") -> None:
        """A step's new state. Where there is no terminal, a line says so."""
        if state is State.RUNNING:
            row.started = time.monotonic()
        elif row.state is State.RUNNING:
            row.seconds = time.monotonic() - row.started
        row.state, row.figure = state, figure
        if self._live is None and row in self._rows:
            told = {State.RUNNING: "started", State.DONE: f"done in {row.shown_time}"}
            text = told.get(state, state) + (f": {figure}" if figure else "")
            line = f"{time.strftime('%H:%M:%S')} {row.name:<{self._width}} {text}"
            print(line, file=self._stream, flush=True)

    def _table(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        # a long key figure is cut, never the columns before it
        for title, width in (("stage", self._width), ("state", len(State.UNCHANGED)), ("time", len("12 min 34 s"))):
            table.add_column(title, no_wrap=True, min_width=width)
        table.add_column("", overflow="ellipsis", no_wrap=True)
        for row in self._rows:
            running = row.state is State.RUNNING
            figure = "".join(last_lines(row.log, 1)) if running else row.figure
            table.add_row(
                Text(row.name, style="" if row.state in _LOOKS else "dim"),
                Text(row.state, style=_LOOKS.get(row.state, "dim")),
                Text(row.shown_time),
                Text(figure, style="dim" if running else ""),
            )
        return table
